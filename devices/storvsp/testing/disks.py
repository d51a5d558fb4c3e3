"""A conformance suite for disks: does a back-end keep every promise of the contract?

:func:`check_disk` needs no test framework::

    async def test_my_disk():
        async def make() -> Disk:
            return MyDisk(...)

        await check_disk(make)

It raises ``AssertionError`` with the broken promise in words, and lets whatever else a disk raises
against the rules escape. It writes to every disk it is given that is not read-only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from storvsp.disk import (
    Disk,
    DiskError,
    DiskUnavailableError,
    Extent,
    OutOfRangeError,
    ReadOnlyError,
)
from storvsp.testing.areas import AREA, areas
from vmbus.errors import ConfigError
from vmbus.testing.scatter import GuestPages, pattern, shapes

MakeDisk = Callable[[], Awaitable[Disk]]


async def check_disk(make: MakeDisk) -> None:
    """Check a back-end against :mod:`storvsp.disk`. A checkpoint; takes about a second.

    What is checked: properties that make sense together; reads and writes in both forms with
    scatter lists of many shapes, at both ends and across internal borders; that nothing beside
    the range is touched; ranges outside; read-only disks; unmap, write_zeroes and extents; flush;
    many requests at once; cancellation; closing; and, if the disk has ``resize(size)``, that
    watchers hear of it. Durability cannot be checked from inside a process.

    Args:
        make: Opens a disk; awaited once for each check, which closes it again. The disks may
            share their storage, because no two are open at the same time. Any contents will do.

    Raises:
        AssertionError: A promise is broken; the text says which.
    """
    for check in _CHECKS:
        disk = await make()
        try:
            await check(disk)
        finally:
            await disk.aclose()


def _require(condition: bool, disk: Disk, text: str) -> None:
    if not condition:
        raise AssertionError(f"{type(disk).__name__}: {text}")


async def _read(
    disk: Disk, offset: int, length: int, lengths: Sequence[int] | None = None
) -> bytes:
    """Read with the slow form and see to it that every byte was delivered, and no other."""
    found = set()
    for fill in (0x00, 0xFF):
        memory = GuestPages(lengths or [length], fill)
        await disk.readv(offset, memory.buffers)
        _require(memory.guards_are_whole(), disk, "readv wrote beside its buffers")
        found.add(memory.contents())
    _require(len(found) == 1, disk, f"readv of {length} bytes at {offset} left bytes unfilled")
    return found.pop()


async def _write(disk: Disk, offset: int, data: bytes) -> None:
    await disk.writev(offset, GuestPages.holding(data, [len(data)]).buffers)


async def _check_info(disk: Disk) -> None:
    info = disk.info
    sector, physical = info.sector_size, info.physical_sector_size
    _require(sector in (512, 2048, 4096), disk, f"info.sector_size is {sector}")
    _require(
        info.size > 0 and info.size % sector == 0,
        disk,
        f"info.size {info.size} is not a positive multiple of sector_size",
    )
    ratio = physical // sector
    _require(
        physical % sector == 0 and ratio > 0 and ratio & (ratio - 1) == 0,
        disk,
        f"info.physical_sector_size {physical} is not a power-of-two multiple of sector_size",
    )
    _require(info.unmap_granularity % sector == 0, disk, "info.unmap_granularity is not in sectors")
    _require(
        info.supports_unmap or not info.unmapped_reads_zero,
        disk,
        "info.unmapped_reads_zero without supports_unmap",
    )
    _require(sector == 2048 or not info.optical, disk, "an optical disk has 2048-byte sectors")
    _require(len(info.identity) <= 16, disk, "info.identity has more than 16 bytes")
    _require(
        info.serial.isascii() and (info.serial.isprintable()),
        disk,
        "info.serial is not printable ASCII",
    )
    _require(
        info.max_transfer == 0 or info.max_transfer >= sector,
        disk,
        "info.max_transfer is less than a sector",
    )
    _require(disk.info == info, disk, "info changes by itself")


async def _check_reads(disk: Disk) -> None:
    if not disk.info.read_only:
        for seed, (offset, length) in enumerate(areas(disk.info)):
            await _write(disk, offset, pattern(length, seed))
    for offset, length in areas(disk.info):
        whole = await _read(disk, offset, length)
        for lengths in shapes(length):
            _require(
                await _read(disk, offset, length, lengths) == whole,
                disk,
                f"readv at {offset} depends on the shape of its buffers",
            )
            memory = GuestPages(lengths)
            done = disk.try_readv(offset, memory.buffers)
            _require(done is True or done is False, disk, "try_readv returned no bool")
            _require(memory.guards_are_whole(), disk, "try_readv wrote beside its buffers")
            _require(
                not done or memory.contents() == whole,
                disk,
                f"try_readv at {offset} said True but delivered something else than readv",
            )
    await disk.readv(0, [])
    await disk.readv(disk.info.size, [])


async def _check_writes(disk: Disk) -> None:
    if disk.info.read_only:
        return
    sector = disk.info.sector_size
    seed = 0
    for offset, length in areas(disk.info):
        left = max(0, offset - sector), min(sector, offset)
        right = offset + length, min(sector, disk.info.size - offset - length)
        for lengths in shapes(length):
            for form in ("writev", "writev(fua=True)", "try_writev"):
                seed += 1
                beside = [await _read(disk, *left), await _read(disk, *right)]
                wanted = await _read(disk, offset, length)
                data = pattern(length, seed)
                memory = GuestPages.holding(data, lengths)
                if form == "try_writev":
                    done = disk.try_writev(offset, memory.buffers, fua=seed % 2 == 0)
                    _require(done is True or done is False, disk, "try_writev returned no bool")
                    if done:
                        wanted = data
                else:
                    await disk.writev(offset, memory.buffers, fua="fua" in form)
                    wanted = data
                _require(
                    memory.contents() == data and memory.guards_are_whole(),
                    disk,
                    f"{form} changed the guest's memory",
                )
                text = f"{form} of {length} bytes at {offset}"
                _require(
                    await _read(disk, offset, length) == wanted,
                    disk,
                    f"{text} cannot be read back, or said False but wrote",
                )
                _require(
                    [await _read(disk, *left), await _read(disk, *right)] == beside,
                    disk,
                    f"{text} changed a sector beside its range",
                )
    await disk.writev(0, [])
    await disk.writev(disk.info.size, [])


async def _check_outside(disk: Disk) -> None:
    size, sector = disk.info.size, disk.info.sector_size
    last = await _read(disk, size - sector, sector)
    for offset, length in [
        (size, sector),
        (size - sector, 2 * sector),
        (size + (1 << 40), sector),
        (0, size + sector) if size < AREA else (size - AREA // 2, AREA),
    ]:
        text = f"of {length} bytes at {offset} on a disk of {size} bytes"
        with _expect(disk, f"readv {text}", OutOfRangeError):
            await disk.readv(offset, GuestPages([length]).buffers)
        buffers = GuestPages.holding(pattern(length, length), [length]).buffers
        with contextlib.suppress(OutOfRangeError):
            done = disk.try_readv(offset, GuestPages([length]).buffers)
            _require(not done, disk, f"try_readv {text} said True")
        # A read-only disk may complain of either.
        with _expect(disk, f"writev {text}", OutOfRangeError, ReadOnlyError):
            await disk.writev(offset, buffers)
        with contextlib.suppress(OutOfRangeError, ReadOnlyError):
            _require(not disk.try_writev(offset, buffers), disk, f"try_writev {text} said True")
        with _expect(disk, f"write_zeroes {text}", OutOfRangeError, ReadOnlyError):
            await disk.write_zeroes(max(offset, size), length)
        with contextlib.suppress(OutOfRangeError, ReadOnlyError):
            await disk.unmap(max(offset, size), length)
        with contextlib.suppress(OutOfRangeError):
            await disk.extents(offset, length)
    _require(
        await _read(disk, size - sector, sector) == last,
        disk,
        "a write that reaches beyond the end changed the last sector",
    )


@contextlib.contextmanager
def _expect(disk: Disk, text: str, *errors: type[DiskError]) -> Iterator[None]:
    try:
        yield
    except errors:
        return
    raise AssertionError(
        f"{type(disk).__name__}: {text} did not raise {' or '.join(e.__name__ for e in errors)}"
    )


async def _check_read_only(disk: Disk) -> None:
    if not disk.info.read_only:
        return
    sector = disk.info.sector_size
    before = await _read(disk, 0, sector)
    buffers = GuestPages.holding(bytes(byte ^ 0xFF for byte in before), [sector]).buffers
    with _expect(disk, "writev on a read-only disk", ReadOnlyError):
        await disk.writev(0, buffers)
    with contextlib.suppress(ReadOnlyError):
        _require(not disk.try_writev(0, buffers), disk, "try_writev on a read-only disk said True")
    for may_unmap in (False, True):
        with _expect(disk, "write_zeroes on a read-only disk", ReadOnlyError):
            await disk.write_zeroes(0, sector, may_unmap=may_unmap)
    with contextlib.suppress(ReadOnlyError):
        await disk.unmap(0, sector)
    await disk.flush()
    _require(await _read(disk, 0, sector) == before, disk, "a read-only disk was changed")


async def _check_clearing(disk: Disk) -> None:
    """Unmap and write_zeroes: what they clear, what they leave alone."""
    if disk.info.read_only:
        return
    sector, reads_zero = disk.info.sector_size, disk.info.unmapped_reads_zero
    for seed, (offset, length) in enumerate(areas(disk.info)):
        data = pattern(length, seed)
        parts = {(0, length), (0, sector), (length - sector, sector)}
        if length >= 3 * sector:
            parts.add((sector, length - 2 * sector))
        for start, size in sorted(parts):
            for operation in ("unmap", "write_zeroes", "write_zeroes(may_unmap=True)"):
                await _write(disk, offset, data)
                if operation == "unmap":
                    await disk.unmap(offset + start, size)
                else:
                    await disk.write_zeroes(
                        offset + start, size, may_unmap="may_unmap" in operation
                    )
                now = await _read(disk, offset, length)
                text = f"{operation} of {size} bytes at {offset + start}"
                _require(
                    now[:start] == data[:start] and now[start + size :] == data[start + size :],
                    disk,
                    f"{text} changed something beside its range",
                )
                _require(
                    not any(now[start : start + size]) or (operation == "unmap" and not reads_zero),
                    disk,
                    f"{text} does not read as zeros",
                )
        await _write(disk, offset, data)
        _require(
            await _read(disk, offset, length) == data, disk, "unmapped sectors cannot be rewritten"
        )
    await disk.unmap(0, 0)
    await disk.write_zeroes(0, 0)


async def _check_extents(disk: Disk) -> None:
    for offset, length in areas(disk.info):
        if not disk.info.read_only:
            await _write(disk, offset, pattern(length, 1))
            _require(
                all(extent.mapped for extent in await _cover(disk, offset, length)),
                disk,
                f"extents calls written sectors at {offset} unmapped",
            )
            middle = length // 2 // disk.info.sector_size * disk.info.sector_size
            await disk.unmap(offset, middle)
        for extent in await _cover(disk, offset, length):
            if not extent.mapped and disk.info.unmapped_reads_zero:
                _require(
                    not any(await _read(disk, extent.offset, extent.length)),
                    disk,
                    f"extents calls sectors at {extent.offset} unmapped that hold data",
                )
    await _cover(disk, 0, disk.info.size)


async def _cover(disk: Disk, offset: int, length: int) -> list[Extent]:
    """All extents of a range, asked for until there are no more."""
    extents: list[Extent] = []
    position, end = offset, offset + length
    while position < end and (found := await disk.extents(position, end - position)):
        extents += found
        for extent in found:
            _require(
                extent.offset == position and extent.length > 0,
                disk,
                f"extents has a gap, an overlap or an empty one at {position}: {extent}",
            )
            position += extent.length
    _require(position == end, disk, f"extents end at {position}, not at {end}")
    return extents


async def _check_concurrency(disk: Disk) -> None:
    """Many requests in flight: independent ones are all right, overlapping ones never torn."""
    info = disk.info
    sector = info.sector_size
    count = min(32, info.size // sector)
    step = info.size // sector // count * sector
    before = [await _read(disk, number * step, sector) for number in range(count)]
    wanted = before
    async with trio.open_nursery() as nursery:
        if not info.read_only:
            wanted = [pattern(sector, 1000 + number) for number in range(count)]
            for number, data in enumerate(wanted):
                nursery.start_soon(_write, disk, number * step, data)
        for number in range(count):
            nursery.start_soon(_read_untorn, disk, number * step, {before[number], wanted[number]})
        nursery.start_soon(disk.flush)
        nursery.start_soon(disk.flush)
    for number, data in enumerate(wanted):
        _require(
            await _read(disk, number * step, sector) == data,
            disk,
            f"with {count} requests in flight, the one at {number * step} went wrong",
        )
    if info.read_only:
        return
    length = min(info.size, 16 * sector, info.max_transfer // sector * sector or AREA)
    fills = [bytes((fill,)) * sector for fill in range(1, 9)]
    async with trio.open_nursery() as nursery:
        for fill in fills:
            nursery.start_soon(_write, disk, 0, fill * (length // sector))
    data = await _read(disk, 0, length)
    _require(
        all(data[start : start + sector] in fills for start in range(0, length, sector)),
        disk,
        "overlapping writes tore a sector",
    )


async def _read_untorn(disk: Disk, offset: int, wanted: set[bytes]) -> None:
    memory = GuestPages([disk.info.sector_size])
    await disk.readv(offset, memory.buffers)
    _require(
        memory.contents() in wanted,
        disk,
        f"a read at {offset} beside a write of the same sector saw neither old nor new data",
    )


async def _check_cancellation(disk: Disk) -> None:
    """Cancelled requests leave their buffers alone afterwards and the disk in order."""
    info = disk.info
    count = min(16, info.size // info.sector_size)
    length = info.sector_size
    old = [await _read(disk, number * length, length) for number in range(count)]
    new = old if info.read_only else [pattern(length, 2000 + n) for n in range(count)]
    memories = [GuestPages([length]) for _ in range(count)]
    for rounds in range(4):  # cancel before the start, and after some progress
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(disk.readv, number * length, memories[number].buffers)
                if not info.read_only:
                    nursery.start_soon(_write, disk, number * length, new[number])
            nursery.start_soon(disk.flush)
            for _ in range(rounds):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        for memory in memories:
            memory.buffers[0][:] = bytes((0x5A,)) * length
        now = [await _read(disk, number * length, length) for number in range(count)]
        _require(
            all(memory.contents() == bytes((0x5A,)) * length for memory in memories),
            disk,
            "a cancelled readv wrote into its buffers after it had returned",
        )
        _require(
            all(data in pair for data, pair in zip(now, zip(old, new, strict=True), strict=True)),
            disk,
            "a cancelled writev left a sector that is neither old nor new",
        )
    if not info.read_only:
        for number, data in enumerate(new):
            await _write(disk, number * length, data)
            _require(
                await _read(disk, number * length, length) == data,
                disk,
                "the disk cannot be used after a cancellation",
            )
    await disk.flush()


async def _check_closing(disk: Disk) -> None:
    sector = disk.info.sector_size

    async def use() -> None:
        with contextlib.suppress(DiskError):  # closed under our feet: allowed
            await disk.readv(0, GuestPages([sector]).buffers)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(use)
        await trio.lowlevel.checkpoint()
        await disk.aclose()
    with trio.CancelScope() as scope:
        scope.cancel()
        await disk.aclose()
    await disk.aclose()
    buffers = GuestPages([sector]).buffers
    with _expect(disk, "readv after aclose", DiskUnavailableError):
        await disk.readv(0, buffers)
    with contextlib.suppress(DiskUnavailableError):
        _require(not disk.try_readv(0, buffers), disk, "try_readv after aclose said True")
    # A read-only disk may complain of either.
    with _expect(disk, "writev after aclose", DiskUnavailableError, ReadOnlyError):
        await disk.writev(0, buffers)
    with contextlib.suppress(DiskUnavailableError, ReadOnlyError):
        _require(not disk.try_writev(0, buffers), disk, "try_writev after aclose said True")
    with _expect(disk, "flush after aclose", DiskUnavailableError):
        await disk.flush()


async def _check_watching(disk: Disk) -> None:
    calls: list[int] = []
    end = disk.watch(lambda: calls.append(disk.info.size))
    other_end = disk.watch(lambda: None)
    other_end()
    other_end()
    resize = getattr(disk, "resize", None)
    old, sector = disk.info.size, disk.info.sector_size
    if resize is None or disk.info.read_only:
        end()
        return
    new = old + 64 * sector
    try:
        await resize(new)
    except ConfigError:  # not this one
        end()
        return
    _require(disk.info.size == new, disk, "resize did not change info.size")
    _require(calls == [new], disk, "a resize was not told to the watchers once")
    data = pattern(sector, 3)
    await _write(disk, new - sector, data)
    _require(await _read(disk, new - sector, sector) == data, disk, "new sectors do not work")
    await resize(old)
    _require(calls == [new, old], disk, "shrinking was not told to the watchers once")
    with _expect(disk, "readv of sectors that were cut off", OutOfRangeError):
        await disk.readv(new - sector, GuestPages([sector]).buffers)
    await resize(new)
    _require(
        not any(await _read(disk, new - sector, sector)),
        disk,
        "sectors that were cut off and added again show old data",
    )
    end()
    await resize(old)
    _require(len(calls) == 3, disk, "a watcher was called after its watch had ended")


_CHECKS: Sequence[Callable[[Disk], Awaitable[None]]] = (
    _check_info,
    _check_reads,
    _check_writes,
    _check_outside,
    _check_read_only,
    _check_clearing,
    _check_extents,
    _check_concurrency,
    _check_cancellation,
    _check_closing,
    _check_watching,
)
