"""``fault:[lba=100-103,on=read,error=medium]SPEC``: another disk that fails on demand.

Errors are of these kinds: ``medium`` is one at the first sector concerned, and nothing is
transferred; ``readonly``, ``nospace`` and ``unavailable`` are what they are called; ``short``
transfers the sectors before the first one concerned, then is a ``medium`` error (if that is the
first of the request, half of the request is transferred); ``hang`` is no answer until the fault is
taken away.

Tests add and remove :class:`Fault` objects while the disk runs, look at their ``hits`` and let
``hang`` requests go on with :meth:`Fault.release`.
"""

# ruff: noqa: D102 - storvsp.disk.Disk describes the methods

from __future__ import annotations

import enum
import random
from collections.abc import Sequence

import trio

from storvsp.disk import (
    Buffers,
    Disk,
    DiskError,
    DiskUnavailableError,
    MediumError,
    NoSpaceError,
    ReadOnlyError,
)
from storvsp.disks.specs import DiskSpec, open_disk
from storvsp.disks.wrapper import DiskWrapper
from vmbus.memory import total_length, window
from vmbus.plugins.options import Option


class Operation(enum.Flag):
    """What a request does."""

    READ = enum.auto()
    WRITE = enum.auto()
    FLUSH = enum.auto()
    UNMAP = enum.auto()


OPTIONS = (
    Option("lba", "sectors whose requests fail; flushes have none", "N|N-M", "all"),
    Option(
        "on",
        "operations that fail: read, write (also of zeros), flush, unmap",
        "OP+OP",
        "read+write",
    ),
    Option(
        "error",
        "how they fail: medium, readonly, nospace, unavailable, short, hang",
        "KIND",
        "medium",
    ),
    Option("count", "how many requests fail", "N", "all"),
    Option("probability", "chance of each request, from 0 to 1", "P", "1"),
    Option("seed", "makes the chances repeat", "N", "0"),
)


class FaultKind(enum.Enum):
    """How a request fails."""

    MEDIUM = "medium"
    """MediumError at the first sector concerned; nothing is transferred."""
    READONLY = "readonly"
    """ReadOnlyError."""
    NOSPACE = "nospace"
    """NoSpaceError."""
    UNAVAILABLE = "unavailable"
    """DiskUnavailableError."""
    SHORT = "short"
    """The sectors before the first one concerned are transferred, then MediumError; if that is
    the first of the request, the first half of the request is transferred."""
    HANG = "hang"
    """No answer until :meth:`Fault.release`; then the request is carried out."""


_ERRORS: dict[FaultKind, type[DiskError]] = {
    FaultKind.MEDIUM: MediumError,
    FaultKind.READONLY: ReadOnlyError,
    FaultKind.NOSPACE: NoSpaceError,
    FaultKind.UNAVAILABLE: DiskUnavailableError,
    FaultKind.SHORT: MediumError,
}


class Fault:
    """One reason to fail, for a :class:`FaultDisk`.

    Args:
        kind: How.
        on: Which operations.
        first: First sector concerned.
        last: Last sector concerned; None for the end of the disk.
        count: How many requests fail; None for all.
        probability: Chance from 0 to 1 of each request that it could hit.
    """

    def __init__(
        self,
        kind: FaultKind = FaultKind.MEDIUM,
        *,
        on: Operation = Operation.READ | Operation.WRITE,
        first: int = 0,
        last: int | None = None,
        count: int | None = None,
        probability: float = 1.0,
    ) -> None:
        self.kind = kind
        self.on = on
        self.first = first
        self.last = last
        self.count = count
        self.probability = probability
        self.hits = 0
        """Requests that have failed or hung because of this."""
        self._released = trio.Event()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Requests that hang just now."""
        return self._waiting

    def release(self) -> None:
        """Let the requests that hang go on; later ones hang again."""
        self._released.set()
        self._released = trio.Event()

    def covers(self, operation: Operation, first: int, last: int) -> bool:
        """Whether a request for sectors ``first`` to ``last`` could be hit."""
        if operation not in self.on or (self.count is not None and self.hits >= self.count):
            return False
        if operation is Operation.FLUSH:
            return True
        return first <= last and last >= self.first and (self.last is None or first <= self.last)

    async def hang(self) -> None:
        """Wait for :meth:`release`. A checkpoint."""
        self._waiting += 1
        try:
            await self._released.wait()
        finally:
            self._waiting -= 1


class FaultDisk(DiskWrapper):
    """Fails requests to another disk.

    Args:
        base: The disk below, owned from now on.
        faults: What to begin with; the first that hits a request decides.
        seed: For the probabilities.
    """

    def __init__(self, base: Disk, *faults: Fault, seed: int = 0) -> None:
        super().__init__(base)
        self.faults = list(faults)
        self._random = random.Random(seed)  # noqa: S311 - chances, not secrets

    def inject(self, fault: Fault) -> Fault:
        """Add a fault and return it."""
        self.faults.append(fault)
        return fault

    def remove(self, fault: Fault) -> None:
        """Take a fault away and let go what hangs because of it."""
        self.faults.remove(fault)
        fault.release()

    # The fast forms only say no where a fault is possible: the decision is made once, by the
    # slow form.

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        return not self._possible(Operation.READ, offset, total_length(buffers)) and (
            super().try_readv(offset, buffers)
        )

    def try_writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> bool:
        return not self._possible(Operation.WRITE, offset, total_length(buffers)) and (
            super().try_writev(offset, buffers, fua=fua)
        )

    async def readv(self, offset: int, buffers: Buffers) -> None:
        fault = await self._strike(Operation.READ, offset, total_length(buffers))
        if fault is not None:
            good = self._good_length(fault, offset, total_length(buffers))
            await super().readv(offset, window(buffers, 0, good))
            raise self._error(fault, "read", offset + good)
        await super().readv(offset, buffers)

    async def writev(self, offset: int, buffers: Buffers, *, fua: bool = False) -> None:
        fault = await self._strike(Operation.WRITE, offset, total_length(buffers))
        if fault is not None:
            good = self._good_length(fault, offset, total_length(buffers))
            await super().writev(offset, window(buffers, 0, good), fua=fua)
            raise self._error(fault, "write", offset + good)
        await super().writev(offset, buffers, fua=fua)

    async def flush(self) -> None:
        fault = await self._strike(Operation.FLUSH, 0, 0)
        if fault is not None:
            raise self._error(fault, "flush", None)
        await super().flush()

    async def unmap(self, offset: int, length: int) -> None:
        fault = await self._strike(Operation.UNMAP, offset, length)
        if fault is not None:
            good = self._good_length(fault, offset, length)
            await super().unmap(offset, good)
            raise self._error(fault, "unmap", offset + good)
        await super().unmap(offset, length)

    async def unmap_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        if any(self._possible(Operation.UNMAP, *each) for each in ranges):
            for offset, length in ranges:
                await self.unmap(offset, length)
        else:
            await super().unmap_many(ranges)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        fault = await self._strike(Operation.WRITE, offset, length)
        if fault is not None:
            good = self._good_length(fault, offset, length)
            await super().write_zeroes(offset, good, may_unmap=may_unmap)
            raise self._error(fault, "write zeroes", offset + good)
        await super().write_zeroes(offset, length, may_unmap=may_unmap)

    def _possible(self, operation: Operation, offset: int, length: int) -> bool:
        sector = self.info.sector_size
        first, last = offset // sector, (offset + length) // sector - 1
        return any(fault.covers(operation, first, last) for fault in self.faults)

    async def _strike(self, operation: Operation, offset: int, length: int) -> Fault | None:
        """Pick the fault that hits a request, if any, and sit out the ones that hang."""
        sector = self.info.sector_size
        first, last = offset // sector, (offset + length) // sector - 1
        for fault in list(self.faults):
            if not fault.covers(operation, first, last):
                continue
            if fault.probability < 1.0 and self._random.random() >= fault.probability:
                continue
            fault.hits += 1
            if fault.kind is not FaultKind.HANG:
                return fault
            await fault.hang()
        return None

    def _good_length(self, fault: Fault, offset: int, length: int) -> int:
        """Bytes to transfer before failing; without SHORT none are."""
        if fault.kind is not FaultKind.SHORT:
            return 0
        sector = self.info.sector_size
        before = fault.first * sector - offset
        return before if before > 0 else length // 2 // sector * sector

    def _error(self, fault: Fault, action: str, offset: int | None) -> DiskError:
        if fault.kind is FaultKind.MEDIUM and offset is not None:
            offset = max(offset, fault.first * self.info.sector_size)
        return _ERRORS[fault.kind](
            f"{action} failed on purpose ({fault.kind.value})", offset=offset
        )


def _parse_sectors(spec: DiskSpec, text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() or not dash)):
        raise spec.error(f"lba={text} is neither a sector nor a range like 100-103")
    start, end = int(first), int(last or first)
    if end < start:
        raise spec.error(f"lba={text} ends before it begins")
    return start, end


def _parse_operations(spec: DiskSpec, text: str) -> Operation:
    known = {operation.name.lower(): operation for operation in Operation if operation.name}
    operations = Operation(0)
    for word in text.split("+"):
        if word not in known:
            raise spec.error(f"on={word} is not one of {', '.join(known)}")
        operations |= known[word]
    return operations


async def open_spec(spec: DiskSpec) -> FaultDisk:
    """Open ``fault:[lba=N-M,on=OP+OP,error=KIND,count=N,probability=P,seed=N]SPEC``."""
    options = spec.reader()
    sectors = options.text("lba")
    operations = options.text("on")
    kind = options.choice("error", [kind.value for kind in FaultKind])
    count = options.integer("count")
    probability = options.probability("probability")
    seed = options.integer("seed") or 0
    options.finish()
    first, last = _parse_sectors(spec, sectors) if sectors else (0, None)
    fault = Fault(
        FaultKind(kind or "medium"),
        on=_parse_operations(spec, operations or "read+write"),
        first=first,
        last=last,
        count=count,
        probability=probability,
    )
    return FaultDisk(await open_disk(spec.inner()), fault, seed=seed)
