"""Tries a disk from inside the guest: random data out, everything back, every byte compared.

The trial remembers a fingerprint of each 4 KiB it has written and compares whatever it reads with
it, so a byte that got lost, went elsewhere or came back old is found where it is.
"""

from __future__ import annotations

import dataclasses
import random
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import TypeVar

import trio

from storvsp.guest import GuestDisk, ScsiError
from storvsp.guest.disk import READ_10
from vmbus.errors import VMBusError, leaves

GRAIN = 4096
"""Bytes that have one fingerprint."""
LARGE = 128 << 10
"""Bytes per request of the large requests; no driver takes less."""
UNMAPPED = 4 << 20
"""Bytes that are given back at most."""
_FINGERPRINT = 16
_WRITE_SHARE = 1 / 3
"""Of the small requests; the rest are reads."""
_PROGRESS = 0.1
"""Seconds between reports."""
_MODE_SENSE = struct.pack(">BBBBBB", 0x1A, 0, 0x3F, 0, 192, 0)
_READ_CAPACITY_16 = struct.pack(">BB8xIBB", 0x9E, 0x10, 32, 0, 0)
_WRITE_PROTECTED = 0x80
"""Device-specific parameter of the mode parameter header (SBC-3 6.4.1)."""
_GIVES_BACK = 0xC0
"""LBPME and LBPRZ, byte 14 of READ CAPACITY(16) (SBC-3 5.16.2): what is unmapped reads as zeros."""
_CD = 5
_VOLUME_DESCRIPTOR = 16
"""Sector of the first volume descriptor (ECMA-119 8.1)."""

_UNIT_ATTENTION = 6
_TRIES = 5
"""Unit attentions come one at a time, and there are few kinds."""

T = TypeVar("T")


class CorruptionError(VMBusError):
    """A disk has returned something else than was last written to it."""


@dataclasses.dataclass(slots=True)
class Meter:
    """What a phase has done."""

    phase: str
    block: int
    """Bytes per request."""
    requests: int = 0
    bytes: int = 0
    seconds: float = 0.0
    over: bool = False


def fingerprint(data: bytes | memoryview) -> bytes:
    """Return 16 bytes that stand for ``data``."""
    return blake2b(data, digest_size=_FINGERPRINT).digest()


class DiskTrial:
    """One disk under trial.

    Args:
        disk: Has a medium.
        depth: Requests in flight.
        limit: Bytes of the disk that are used at most, from its beginning.
        progress: Called now and then with the phase so far, and at its end.
    """

    def __init__(
        self, disk: GuestDisk, *, depth: int, limit: int, progress: Callable[[Meter], None]
    ) -> None:
        self.disk = disk
        self.used = min(disk.size, limit) // GRAIN * GRAIN
        self.writable = False
        self.unmaps = False
        """Whether it gives space back and then reads as zeros."""
        self.unmapped = 0
        """Bytes that were given back."""
        self.label: str | None = None
        """Name of the ISO 9660 volume."""
        self._depth = depth
        self._progress = progress
        self._prints: list[bytes] = []
        self._random = random.Random()  # noqa: S311  # fills disks, hides nothing

    async def look(self) -> None:
        """Find out what can be done with the disk. A checkpoint. Raises ScsiError."""
        disk = self.disk
        if disk.device_type == _CD:
            if disk.block_count > _VOLUME_DESCRIPTOR:
                cdb = struct.pack(">BBIBHB", READ_10, 0, _VOLUME_DESCRIPTOR, 0, 1, 0)
                descriptor = (await disk.execute(cdb, read=disk.block_size)).data
                if descriptor[:7] == b"\x01CD001\x01":
                    self.label = descriptor[40:72].decode("ascii", "replace").rstrip()
            return
        header = await insist(lambda: disk.command("MODE SENSE", _MODE_SENSE, read=192))
        self.writable = not header[2] & _WRITE_PROTECTED
        capacity = await insist(
            lambda: disk.command("READ CAPACITY(16)", _READ_CAPACITY_16, read=32)
        )
        self.unmaps = self.writable and capacity[14] & _GIVES_BACK == _GIVES_BACK

    @property
    def digest(self) -> str:
        """What the disk holds as far as it is used, in 32 hexadecimal digits."""
        return fingerprint(b"".join(self._prints)).hex()

    # -- phases; all are checkpoints and raise ScsiError or CorruptionError -----------------------

    async def survey(self) -> None:
        """Read everything and believe it."""
        self._prints = [b""] * (self.used // GRAIN)
        await self._phase("survey", LARGE, self._learn)

    async def write(self, seconds: float) -> None:
        """Write everything, and again until ``seconds`` have passed; then flush."""
        await self._phase("write", LARGE, self._write, seconds=seconds)
        await insist(self.disk.flush)

    async def read(self, seconds: float) -> None:
        """Read everything and compare, and again until ``seconds`` have passed."""
        await self._phase("read", LARGE, self._compare, seconds=seconds)

    async def mix(self, seconds: float) -> None:
        """Read and write 4 KiB here and there for ``seconds``; then flush."""
        await self._phase("mixed", GRAIN, self._mixed, seconds=seconds, everything=False)
        await insist(self.disk.flush)

    async def unmap(self) -> None:
        """Give the beginning back, which has to read as zeros from now on."""
        size = min(self.used // 4, UNMAPPED) // GRAIN * GRAIN
        if size:
            await insist(lambda: self.disk.unmap([(0, size // self.disk.block_size)]))
            self._prints[: size // GRAIN] = [fingerprint(bytes(GRAIN))] * (size // GRAIN)
        self.unmapped = size

    async def check(self) -> None:
        """Read everything once more and compare."""
        await self._phase("check", LARGE, self._compare)

    # -- requests ---------------------------------------------------------------------------------

    async def _read(self, offset: int, length: int) -> bytes:
        size = self.disk.block_size
        return await insist(lambda: self.disk.read(offset // size, length // size))

    async def _learn(self, offset: int, length: int) -> None:
        self._remember(offset, await self._read(offset, length))

    async def _write(self, offset: int, length: int) -> None:
        data = self._random.randbytes(length)
        await insist(lambda: self.disk.write(offset // self.disk.block_size, data))
        self._remember(offset, data)

    async def _compare(self, offset: int, length: int) -> None:
        data = memoryview(await self._read(offset, length))
        for start in range(0, length, GRAIN):
            found = fingerprint(data[start : start + GRAIN])
            wanted = self._prints[(offset + start) // GRAIN]
            if found != wanted:
                place = offset + start
                raise CorruptionError(
                    f"corrupt: 4 KiB at byte {place} (block {place // self.disk.block_size}) read "
                    f"as {found.hex()[:12]}, written was {wanted.hex()[:12]} (BLAKE2b)"
                )

    async def _mixed(self, offset: int, length: int) -> None:
        action = self._write if self._random.random() < _WRITE_SHARE else self._compare
        await action(offset, length)

    def _remember(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(data), GRAIN):
            self._prints[(offset + start) // GRAIN] = fingerprint(view[start : start + GRAIN])

    async def _phase(
        self,
        name: str,
        step: int,
        action: Callable[[int, int], Awaitable[None]],
        *,
        seconds: float = 0.0,
        everything: bool = True,
    ) -> None:
        """Do ``action(offset, length)`` in random order, never twice at once in one place.

        Args:
            name: For the meter.
            step: Bytes per request.
            action: Raises ScsiError or CorruptionError, which then end the phase.
            seconds: How long to go on.
            everything: Go on until every place has had its turn, however long it takes.
        """
        offsets = list(range(0, self.used, step))
        self._random.shuffle(offsets)
        waiting = deque(offsets)
        wanted = len(offsets) if everything else 0
        meter = Meter(name, step)
        begun = 0
        start = time.perf_counter()

        async def worker() -> None:
            nonlocal begun
            # Nothing waits if there are more workers than places.
            while waiting and (begun < wanted or time.perf_counter() - start < seconds):
                begun += 1
                offset = waiting.popleft()
                length = min(step, self.used - offset)
                await action(offset, length)
                waiting.append(offset)
                meter.requests += 1
                meter.bytes += length

        async def report() -> None:
            reported = 0
            while True:
                await trio.sleep(_PROGRESS)
                if meter.requests != reported:  # or else a disk that hangs goes unnoticed
                    reported = meter.requests
                    meter.seconds = time.perf_counter() - start
                    self._progress(dataclasses.replace(meter))

        problem: ScsiError | CorruptionError | None = None
        try:
            async with trio.open_nursery() as reporting:
                reporting.start_soon(report)
                async with trio.open_nursery() as workers:
                    for _ in range(self._depth):
                        workers.start_soon(worker)
                reporting.cancel_scope.cancel()
        except* (ScsiError, CorruptionError) as group:
            problem = leaves(group)[0]
        if problem is not None:
            raise problem
        meter.seconds = time.perf_counter() - start
        meter.over = True
        self._progress(meter)


async def insist(request: Callable[[], Awaitable[T]]) -> T:
    """Repeat a request that has got nothing but news of the unit instead of an answer.

    Every driver does: a disk that comes, goes or changes its size is a unit attention for the
    next command, whatever that is (SPC-4 5.13).

    Args:
        request: Can be made more than once. Is a checkpoint.

    Raises:
        ScsiError: It has failed, or there is no end of news.
    """
    tries = _TRIES
    while True:
        tries -= 1
        try:
            return await request()
        except ScsiError as error:
            if error.result.sense_key != _UNIT_ATTENTION or not tries:
                raise
