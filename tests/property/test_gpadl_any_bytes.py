"""GPADL assembly against arbitrary input, and against the list it was made from."""

from __future__ import annotations

from hypothesis import given, strategies as st

from vmbus.errors import GuestProtocolError
from vmbus.gpadl import Gpadl, GpadlAssembly
from vmbus.wire.gpa import GpaRange, build_range, page_count


@given(
    handle=st.integers(0, 2**32 - 1),
    buflen=st.integers(0, 65535),
    count=st.integers(0, 65535),
    pieces=st.lists(st.binary(max_size=224), max_size=20),
)
def test_only_a_protocol_error_escapes_from_arbitrary_pieces(handle, buflen, count, pieces) -> None:
    try:
        assembly = GpadlAssembly(handle, range_buflen=buflen, range_count=count)
        for piece in pieces:
            gpadl = assembly.add_untrusted(piece)
            if gpadl is not None:
                assert gpadl.page_count == assembly.page_count
                assert len(gpadl.ranges) == count
                return
    except GuestProtocolError:
        pass


@st.composite
def range_lists(draw: st.DrawFn) -> tuple[GpaRange, ...]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.integers(0, 4095))
        length = draw(st.integers(1, 40000))
        pages = page_count(offset, length)
        pfns = draw(st.lists(st.integers(0, 2**52), min_size=pages, max_size=pages))
        found.append(GpaRange(length, offset, tuple(pfns)))
    return tuple(found)


@given(
    ranges=range_lists(),
    words=st.lists(st.integers(0, 28), max_size=30),
    odd=st.integers(0, 7),
    junk=st.binary(max_size=60),
)
def test_a_list_is_the_same_however_it_is_cut_into_messages(ranges, words, odd, junk) -> None:
    data = b"".join(build_range(*each) for each in ranges)
    assembly = GpadlAssembly(3, range_buflen=len(data), range_count=len(ranges))
    position = 0
    gpadl = None
    for count in [*words, 8192]:
        piece = data[position : position + 8 * count]
        position += len(piece)
        last = position >= len(data)
        gpadl = assembly.add_untrusted(piece + (junk if last else bytes(odd)))
        assert (gpadl is not None) == last
        if last:
            break
    assert gpadl == Gpadl(3, ranges)
