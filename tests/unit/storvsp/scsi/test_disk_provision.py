"""UNMAP, WRITE SAME and GET LBA STATUS."""

import os
import struct
from typing import Any

import pytest

from storvsp.disk import Extent, NoSpaceError
from storvsp.scsi import DiskUnit
from storvsp.scsi.disk_provision import STATUS_LOOKS, BlockRuns, merge_ranges
from storvsp.scsi.medium import ZERO_PIECE
from tests.support.scsi import MemoryDisk, Reply, run


def make_unit(**changes: Any) -> tuple[MemoryDisk, DiskUnit]:
    changes.setdefault("supports_unmap", True)
    disk = MemoryDisk(**changes)
    disk.data[:] = os.urandom(len(disk.data)).replace(b"\0", b"\1")
    return disk, DiskUnit(disk, luns=lambda: [0])


def unmap_list(
    *ranges: tuple[int, int],
    data: int | None = None,
    descriptors: int | None = None,
    tail: bytes = b"",
) -> bytes:
    size = 16 * len(ranges)
    head = struct.pack(
        ">HH4x",
        size + 6 if data is None else data,
        size if descriptors is None else descriptors,
    )
    return head + b"".join(struct.pack(">QI4x", *pair) for pair in ranges) + tail


def unmap_cdb(size: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIBHB", 0x42, flags, 0, 0, size, 0)


async def unmap(unit: DiskUnit, parameters: bytes) -> Reply:
    return await run(unit, unmap_cdb(len(parameters)), out=parameters)


async def test_unmap_frees_the_ranges():
    disk, unit = make_unit()
    parameters = unmap_list((3, 2), (9, 0), (126, 2))
    reply = await unmap(unit, parameters)
    assert (reply.status, reply.transferred) == (0, len(parameters))
    assert disk.calls == ["unmap 1536+1024", "unmap 64512+1024"]


@pytest.mark.parametrize("ranges", [
    [(0, 1), (129, 0)], [(0, 1), (127, 2)], [(0, 1), (2**64 - 1, 0xFFFFFFFF)], [(0, 0xFFFFFFFF)],
])  # fmt: skip
async def test_unmap_checks_all_ranges_before_it_frees_one(ranges):
    disk, unit = make_unit()
    reply = await unmap(unit, unmap_list(*ranges))
    assert reply.fault == (5, 0x2100)
    assert reply.pointer == (8 + 16 * (len(ranges) - 1), None, False)
    assert disk.calls == []


async def test_an_empty_range_may_begin_behind_the_last_block():
    """``iscsi-test-cu``: Unmap.ZeroBlocks."""
    disk, unit = make_unit()
    assert (await unmap(unit, unmap_list((128, 0), (2, 1)))).status == 0
    assert disk.calls == ["unmap 1024+512"]


async def test_a_partial_descriptor_is_ignored():
    disk, unit = make_unit()
    parameters = unmap_list((3, 2), descriptors=16 + 15, data=16 + 15 + 6, tail=bytes(15))
    assert (await unmap(unit, parameters)).status == 0
    assert disk.calls == ["unmap 1536+1024"]


@pytest.mark.parametrize(("parameters", "code", "pointer"), [
    (bytes(7), 0x1A00, None),
    (unmap_list((3, 2), descriptors=17), 0x2600, (2, None, False)),
    (unmap_list((3, 2), descriptors=0xFFFF), 0x2600, (2, None, False)),
    (unmap_list((3, 2), data=21), 0x2600, (0, None, False)),
    (unmap_list(*[(1, 1)] * 257), 0x2600, (2, None, False)),
])  # fmt: skip
async def test_unmap_lists_that_lie_are_refused(parameters, code, pointer):
    disk, unit = make_unit()
    reply = await unmap(unit, parameters)
    assert reply.fault == (5, code)
    if pointer:
        assert reply.pointer == pointer
    assert disk.calls == []


async def test_unmap_of_nothing_is_good_and_anchors_are_refused():
    disk, unit = make_unit()
    assert (await run(unit, unmap_cdb(0))).status == 0
    assert (await unmap(unit, unmap_list())).status == 0
    assert (await unmap(unit, unmap_list(*[(1, 0)] * 256))).status == 0
    assert (await run(unit, unmap_cdb(24, flags=1), out=bytes(24))).pointer == (1, 0, True)
    assert (await run(unit, unmap_cdb(24), out=bytes(23))).fault == (5, 0x1A00)
    assert (await run(unit, unmap_cdb(24), room=24)).fault == (5, 0x2400)
    assert disk.calls == []
    _, unit = make_unit(supports_unmap=False)
    assert (await run(unit, unmap_cdb(0))).fault == (5, 0x2000)


def same(size: int, flags: int = 0, lba: int = 3, count: int = 5) -> str:
    if size == 10:
        return f"41 {flags:02x} {lba:08x} 00 {count:04x} 00"
    return f"93 {flags:02x} {lba:016x} {count:08x} 00 00"


@pytest.mark.parametrize("size", [10, 16])
@pytest.mark.parametrize("limit", [0, 1024])
async def test_write_same_repeats_the_block(size, limit):
    disk, unit = make_unit(max_transfer=limit)
    before = bytes(disk.data)
    block = os.urandom(512)
    reply = await run(unit, same(size), out=block, pieces=(500,))
    assert (reply.status, reply.transferred) == (0, 512)
    assert disk.data == before[:1536] + block * 5 + before[4096:]
    assert disk.calls == ["write"] * (3 if limit else 1)


@pytest.mark.parametrize("size", [10, 16])
async def test_write_same_of_zeros_may_free_only_with_unmap(size):
    disk, unit = make_unit()
    for flags, call in ((0, "zeroes"), (8, "zeroes may_unmap")):
        disk.calls.clear()
        reply = await run(unit, same(size, flags), out=bytes(512))
        assert (reply.status, reply.transferred) == (0, 512)
        assert disk.calls[0] == call
        assert disk.data[1536:4096] == bytes(2560)
    disk.calls.clear()
    assert (await run(unit, same(size, 8), out=b"x" * 512)).status == 0
    assert disk.calls == ["write"]
    disk, unit = make_unit(supports_unmap=False)
    assert (await run(unit, same(size, 8), out=bytes(512))).pointer == (1, 3, True)


async def test_a_long_range_is_zeroed_in_steps():
    asked = []
    disk, unit = make_unit()
    unit.blocks = 1 << 22

    async def write_zeroes(offset: int, length: int, *, may_unmap: bool) -> None:
        asked.append((offset, length))

    disk.write_zeroes = write_zeroes  # type: ignore[method-assign, assignment]  # records
    count = ZERO_PIECE // 512
    assert (await run(unit, same(16, 1, lba=1, count=2 * count + 3))).status == 0
    assert asked == [
        (512, ZERO_PIECE),
        (512 + ZERO_PIECE, ZERO_PIECE),
        (512 + 2 * ZERO_PIECE, 3 * 512),
    ]


async def test_write_same_without_a_data_buffer_writes_zeros():
    disk, unit = make_unit()
    for flags, call in ((1, "zeroes"), (9, "zeroes may_unmap")):
        disk.calls.clear()
        reply = await run(unit, same(16, flags))
        assert (reply.status, reply.transferred) == (0, 0)
        assert disk.calls[0] == call
    assert disk.data[1536:4096] == bytes(2560)


@pytest.mark.parametrize(("cdb", "pointer"), [
    (same(16, 0x10), (1, 4, True)),
    (same(10, 0x04), (1, 2, True)),
    (same(10, 0x02), (1, 1, True)),
    (same(10, 0x20), (1, 7, True)),
    (same(10, count=0), (7, None, True)),
    (same(16, count=0), (10, None, True)),
])  # fmt: skip
async def test_write_same_names_the_field_it_refuses(cdb, pointer):
    disk, unit = make_unit()
    assert (await run(unit, cdb, out=bytes(512))).pointer == pointer
    assert disk.calls == []


async def test_write_same_is_limited_and_takes_exactly_one_block():
    """``iscsi-test-cu``: WriteSame10.InvalidDataOutSize and its kin."""
    disk, unit = make_unit()
    for size in (511, 1024):
        assert (await run(unit, same(10), out=bytes(size))).pointer == (7, None, True)
    assert (await run(unit, same(10), room=512)).pointer == (0, None, True)
    unit.blocks = 1 << 30
    assert (await run(unit, same(16, count=(1 << 21) + 1), out=bytes(512))).pointer == (
        10, None, True,
    )  # fmt: skip
    assert disk.calls == []


async def test_a_full_back_end_is_reported_as_such():
    disk, unit = make_unit()
    disk.fail = NoSpaceError("full", offset=1536)
    reply = await run(unit, same(10), out=b"x" * 512)
    assert (reply.fault, reply.information) == ((7, 0x2707), 3)


def status(lba: int, allocation: int = 4096) -> str:
    return f"9e 12 {lba:016x} {allocation:08x} 00 00"


async def test_block_status_comes_in_runs():
    disk, unit = make_unit(blocks=16)
    reply = await run(unit, status(4), room=4096)
    assert reply.data.hex() == "00000014" + "00000000" + "0000000000000004" + "0000000c" + "0" * 8
    disk.holes += [(0, 512 * 2), (512 * 6, 1024)]
    reply = await run(unit, status(0), room=4096)
    runs = [struct.unpack_from(">QIB", reply.data, at) for at in range(8, len(reply.data), 16)]
    assert runs == [(0, 2, 1), (2, 4, 0), (6, 2, 1), (8, 8, 0)]
    assert (await run(unit, status(0, 24), room=4096)).data == reply.data[:24]
    assert (await run(unit, status(16), room=24)).fault == (5, 0x2100)


def found(extents: list[Extent], start: int, length: int) -> list[tuple[int, int, bool]]:
    runs = BlockRuns(start, length, 512)
    runs.add(extents)
    return runs.found


def test_blocks_partly_mapped_count_as_mapped():
    extents = [
        Extent(0, 700, mapped=False),
        Extent(700, 400, mapped=True),
        Extent(1100, 100, mapped=False),
        Extent(1200, 2896, mapped=False),
    ]
    assert found(extents, 0, 4096) == [(0, 1, False), (1, 2, True), (3, 5, False)]
    assert found([], 1024, 1024) == [(2, 2, True)]
    assert found([Extent(0, 99999, mapped=False)], 512, 1024) == [(1, 2, False)]


def test_extents_that_say_nothing_of_a_block_leave_it_mapped():
    runs = BlockRuns(0, 4096, 4096)
    runs.add([Extent(0, 512, mapped=False)])
    assert (runs.found, runs.left) == ([(0, 1, True)], 0)


async def test_block_status_goes_on_where_the_back_end_has_stopped():
    disk, unit = make_unit(blocks=64)
    disk.holes += [(512 * at, 512) for at in range(0, 64, 2)]
    whole = (await run(unit, status(0), room=4096)).data
    asked = []
    original = disk.extents

    async def few(offset, length):
        asked.append((offset, length))
        return (await original(offset, length))[:20]

    disk.extents = few  # type: ignore[method-assign]  # tells less
    assert (await run(unit, status(0), room=4096)).data == whole
    assert asked == [(512 * at, 512 * (64 - at)) for at in (0, 20, 40, 60)]
    asked.clear()

    async def fewest(offset, length):
        asked.append((offset, length))
        return (await original(offset, length))[:1]

    disk.extents = fewest  # type: ignore[method-assign]  # tells still less
    told = (await run(unit, status(0), room=4096)).data
    assert len(asked) == STATUS_LOOKS
    assert told[8:] == whole[8 : 8 + 16 * STATUS_LOOKS]


@pytest.mark.parametrize(("ranges", "merged"), [
    ([], []),
    ([(5, 0)], []),
    ([(3, 2), (9, 1)], [(3, 2), (9, 1)]),
    ([(9, 1), (3, 2)], [(3, 2), (9, 1)]),
    ([(3, 2), (5, 1), (6, 4)], [(3, 7)]),
    ([(3, 9), (4, 2), (11, 2)], [(3, 10)]),
    ([(3, 2), (4, 0), (5, 0), (6, 0)], [(3, 2)]),
    ([(3, 2), (3, 2)], [(3, 2)]),
])  # fmt: skip
def test_ranges_that_touch_are_one(ranges, merged):
    assert merge_ranges(ranges) == merged


async def test_unmap_hands_its_list_over_as_one():
    disk, unit = make_unit()
    lists = []

    async def unmap_many(ranges):
        lists.append(list(ranges))

    disk.unmap_many = unmap_many  # type: ignore[method-assign]  # records
    assert (await unmap(unit, unmap_list((9, 1), (3, 2), (5, 1)))).status == 0
    assert lists == [[(1536, 1536), (4608, 512)]]
