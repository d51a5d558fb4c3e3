"""Cutting scatter lists."""

from hypothesis import given, strategies as st

from vmbus.memory import Cutter, total_length, window


@given(st.lists(st.binary(max_size=6), max_size=6), st.integers(0, 40), st.integers(0, 40))
def test_a_cut_of_a_scatter_list_is_a_slice_of_its_bytes(parts, start, length):
    buffers = [memoryview(bytearray(part)) for part in parts]
    whole = b"".join(parts)
    pieces = window(buffers, start, length)
    assert b"".join(pieces) == whole[start : start + length]
    assert total_length(pieces) == len(whole[start : start + length])
    assert total_length(buffers) == len(whole)


def test_a_cut_is_the_same_memory():
    memory = bytearray(8)
    view = memoryview(memory)
    for piece in window([view[:3], view[3:]], 2, 3):
        piece[:] = b"x" * len(piece)
    assert memory == b"\0\0xxx\0\0\0"


def test_windows_cut_scatter_lists_anywhere():
    buffer = memoryview(bytearray(range(30)))
    data = [buffer[:10], buffer[10:10], buffer[10:11], buffer[11:]]
    for start in range(32):
        for length in range(32):
            pieces = window(data, start, length)
            assert b"".join(pieces) == bytes(range(30))[start : start + length]


@given(st.lists(st.binary(max_size=6), max_size=6), st.lists(st.integers(-1, 9), min_size=1))
def test_a_list_cut_into_parts_is_its_bytes_in_order(parts, lengths):
    cutter = Cutter([memoryview(bytearray(part)) for part in parts])
    left = b"".join(parts)
    for length in lengths:
        taken = b"".join(cutter.take(length))
        assert taken == left[: max(0, length)]
        left = left[len(taken) :]


def test_cutting_a_list_up_goes_through_it_once():
    class Counted(list[memoryview]):
        looked = 0

        def __getitem__(self, index):
            self.looked += 1
            return super().__getitem__(index)

    buffers = Counted(memoryview(bytes(4096)) for _ in range(1000))
    cutter = Cutter(buffers)
    for _ in range(1000 * 8):
        assert sum(map(len, cutter.take(512))) == 512
    assert cutter.take(512) == []
    assert buffers.looked == 1000 * 8
