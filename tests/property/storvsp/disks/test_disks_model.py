"""Random operations against the plainest model of a disk: an array of bytes."""

import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from storvsp.disks.overlay import OverlayDisk, open_scratch
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk
from vmbus.testing.scatter import GuestPages

SECTOR = 512
SECTORS = 3 * 128 + 17
"""Three clusters of an overlay and a piece of a fourth."""

sector_numbers = st.integers(0, SECTORS - 1) | st.sampled_from(
    [0, 1, 127, 128, 129, 255, 256, 383, 384, SECTORS - 1]
)
lengths = st.integers(1, 4) | st.sampled_from([127, 128, 129, 256, SECTORS])
shapes = st.lists(st.integers(0, 5000), max_size=4)
ranges = st.tuples(sector_numbers, lengths).map(lambda r: (r[0], min(r[1], SECTORS - r[0])))
operations = st.one_of(
    st.tuples(st.just("write"), ranges, shapes, st.integers(0, 999)),
    st.tuples(st.just("durable write"), ranges, shapes, st.integers(0, 999)),
    st.tuples(st.just("fast write"), ranges, shapes, st.integers(0, 999)),
    st.tuples(st.just("read"), ranges, shapes, st.just(0)),
    st.tuples(st.just("fast read"), ranges, shapes, st.just(0)),
    st.tuples(st.sampled_from(["unmap", "zero", "zero and free"]), ranges, st.just([]), st.just(0)),
    st.tuples(st.sampled_from(["extents", "flush"]), ranges, st.just([]), st.just(0)),
)


def cut(length, shape):
    """Apply a shape to a length: its pieces as far as they fit, then the rest."""
    pieces = []
    for piece in shape:
        pieces.append(min(piece, length))
        length -= pieces[-1]
    return [*pieces, length]


async def make_disk(kind, directory, content):
    base = Path(directory) / "base.img"
    base.write_bytes(content)
    if kind == "ram":
        disk = RamDisk(len(content))
        await disk.writev(0, [memoryview(bytearray(content))])
        return disk
    if kind == "raw":
        return await RawDisk.open(base)
    if kind == "direct":
        return await RawDisk.open(base, direct=True)
    below = await RawDisk.open(base, read_only=True)
    return OverlayDisk(
        below, await open_scratch(directory, below.info) if kind == "overlay on file" else None
    )


@pytest.mark.parametrize("kind", ["ram", "raw", "direct", "overlay on ram", "overlay on file"])
@given(steps=st.lists(operations, max_size=25), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
async def test_a_disk_behaves_like_an_array_of_bytes(kind, steps, seed):
    model = bytearray(random.Random(seed).randbytes(SECTORS * SECTOR))
    original = bytes(model)
    with tempfile.TemporaryDirectory() as directory:
        disk = await make_disk(kind, directory, original)
        written = set()
        try:
            for name, (start, count), shape, number in steps:
                offset, length = start * SECTOR, count * SECTOR
                end = offset + length
                if name.endswith("write"):
                    data = random.Random(number).randbytes(length)
                    buffers = GuestPages.holding(data, cut(length, shape)).buffers
                    if name != "fast write":
                        await disk.writev(offset, buffers, fua=name == "durable write")
                    elif not disk.try_writev(offset, buffers):
                        continue
                    model[offset:end] = data
                    written |= set(range(start, start + count))
                elif name.endswith("read"):
                    pages = GuestPages(cut(length, shape), 0xEE)
                    if name == "read":
                        await disk.readv(offset, pages.buffers)
                    elif not disk.try_readv(offset, pages.buffers):
                        continue
                    assert pages.contents() == model[offset:end]
                    assert pages.guards_are_whole()
                elif name == "flush":
                    await disk.flush()
                elif name == "extents":
                    extents = await disk.extents(offset, length)
                    assert [e.offset for e in extents] == [
                        offset + sum(e.length for e in extents[:i]) for i in range(len(extents))
                    ]
                    assert sum(extent.length for extent in extents) == length
                    for extent in extents:
                        stop = extent.offset + extent.length
                        assert extent.mapped or not any(model[extent.offset : stop])
                else:
                    if name == "unmap":
                        await disk.unmap(offset, length)
                    else:
                        await disk.write_zeroes(offset, length, may_unmap=name == "zero and free")
                    model[offset:end] = bytes(length)
            pages = GuestPages([len(model)])
            await disk.readv(0, pages.buffers)
            assert pages.contents() == model
        finally:
            await disk.aclose()
        if kind in ("raw", "direct"):
            assert (Path(directory) / "base.img").read_bytes() == model
        else:
            assert (Path(directory) / "base.img").read_bytes() == original
            assert os.listdir(directory) == ["base.img"]
