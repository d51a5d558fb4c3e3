"""The server's side of SET_MEM_TABLE, ADD_MEM and REM_MEM: which file backs which region."""

from __future__ import annotations

import bisect
import errno
from collections.abc import Callable, Sequence
from typing import NamedTuple

import trio

from vmbus.attach.protocol.descriptors import check_memory_untrusted, map_region_untrusted
from vmbus.attach.protocol.framing import Frame
from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.to_server import MemoryRegion, RemMem, SetMemTable
from vmbus.attach.server.link import Link, ServerLimits
from vmbus.errors import PeerProtocolError
from vmbus.memory import GuestMemory, Region
from vmbus.partition.events import MemoryRemoval

_DRAIN_POLL = 0.002
"""Seconds between two looks at memory that is still in use."""


class _Backing(NamedTuple):
    """What makes two regions the same one."""

    size: int
    file: tuple[int, int]
    offset: int
    read_only: bool


class MemoryTable:
    """Keeps a :class:`GuestMemory` in step with what the VMM says. Nothing here blocks.

    What is out of the map but still in use counts against the limits: its address space and its
    descriptor are as gone as those of what is mapped.

    Args:
        memory: Changed only through this object.
        limits: ``max_regions`` and ``max_memory_bytes``.
        trusted: Accept files without F_SEAL_SHRINK.
    """

    def __init__(self, memory: GuestMemory, limits: ServerLimits, *, trusted: bool) -> None:
        self.memory = memory
        self._limits = limits
        self._trusted = trusted
        self._backings: dict[int, _Backing] = {}
        self._starts: list[int] = []
        """Keys of ``_backings``, in order."""
        self._leaving: list[Region] = []
        """Removed, and in use when last looked at."""
        self.busy = False
        """Whether a SET_MEM_TABLE or REM_MEM is unanswered."""

    @property
    def descriptors(self) -> int:
        """How many descriptors the mappings hold."""
        self._leaving = [each for each in self._leaving if not each.close()]
        return len(self._backings) + len(self._leaving)

    def _check_budget(self, owner: str, regions: int, size: int, room: int) -> None:
        """Raise PeerProtocolError if the table may not become ``regions`` and ``size`` bytes.

        ``room``: how many descriptors more may be kept.
        """
        held = self.descriptors
        regions += len(self._leaving)
        size += sum(each.size for each in self._leaving)
        limits = self._limits
        require(
            regions <= limits.max_regions,
            f"{owner}: makes {regions} regions, this server maps at most {limits.max_regions} "
            "of one VMM",
            errno.ENOSPC,
        )
        require(
            size <= limits.max_memory_bytes,
            f"{owner}: makes {size} bytes, this server maps at most {limits.max_memory_bytes} "
            "of one VMM",
            errno.ENOMEM,
        )
        require(
            regions - held <= room,
            f"{owner}: this server keeps no more descriptors of this VMM",
            errno.EMFILE,
        )

    def replace_untrusted(self, table: SetMemTable, fds: Sequence[int], room: int) -> list[Region]:
        """Make guest memory exactly what ``table`` says, or leave it alone.

        Regions that stay as they are keep their mapping, so open rings survive.

        Args:
            table: The new regions.
            fds: Borrowed; each must be used by a region.
            room: How many descriptors more may be kept.

        Returns:
            The regions that went away, possibly not drained yet.

        Raises:
            PeerProtocolError: Nothing was changed; fatal if the kernel changed its mind halfway.
        """
        for region in table.regions:
            require(
                region.fd_index < len(fds),
                f"SET_MEM_TABLE: fd_index {region.fd_index} but {len(fds)} descriptors came",
            )
        unused = set(range(len(fds))) - {region.fd_index for region in table.regions}
        require(not unused, "SET_MEM_TABLE: a descriptor is used by no region")
        wanted: dict[int, _Backing] = {}
        for region in table.regions:
            wanted[region.gpa] = self._check(region, fds[region.fd_index])
        self._check_budget(
            "SET_MEM_TABLE",
            len(table.regions),
            sum(region.size for region in table.regions),
            room,
        )
        fresh = [r for r in table.regions if self._backings.get(r.gpa) != wanted[r.gpa]]
        trial = GuestMemory()
        try:
            for region in fresh:
                self._map(trial, region, fds[region.fd_index])
        finally:
            trial.close()
        removed = [
            (gpa, backing.size)
            for gpa, backing in self._backings.items()
            if wanted.get(gpa) != backing
        ]
        gone = [self.memory.remove_region(gpa, size) for gpa, size in removed]
        self._leaving += gone
        self._backings = wanted
        self._starts = sorted(wanted)
        try:
            for region in fresh:
                self._map(self.memory, region, fds[region.fd_index])
        except PeerProtocolError as error:
            raise PeerProtocolError(str(error), errno=error.errno, fatal=True) from error
        return gone

    def add_untrusted(self, region: MemoryRegion, fd: int, room: int) -> None:
        """Add one region.

        Raises:
            PeerProtocolError: EEXIST if it overlaps another; ENOSPC, ENOMEM, EMFILE beyond
                the limits.
        """
        require(region.fd_index == 0, "ADD_MEM: fd_index must be 0")
        at = bisect.bisect_left(self._starts, region.gpa)
        for gpa in self._starts[max(at - 1, 0) : at + 1]:
            require(
                region.gpa + region.size <= gpa or gpa + self._backings[gpa].size <= region.gpa,
                f"ADD_MEM: {region.gpa:#x}+{region.size:#x} overlaps the region at {gpa:#x}",
                errno.EEXIST,
            )
        backing = self._check(region, fd)
        self._check_budget("ADD_MEM", len(self._backings) + 1, self.memory.size + region.size, room)
        self._map(self.memory, region, fd)
        self._backings[region.gpa] = backing
        self._starts.insert(at, region.gpa)

    def remove_untrusted(self, request: RemMem) -> Region:
        """Take one region out of the map. Raises PeerProtocolError, ENOENT if there is none."""
        backing = self._backings.get(request.gpa)
        if backing is None or backing.size != request.size:
            raise PeerProtocolError(
                f"REM_MEM: no region is {request.gpa:#x}+{request.size:#x}", errno=errno.ENOENT
            )
        del self._backings[request.gpa]
        self._starts.remove(request.gpa)
        region = self.memory.remove_region(request.gpa, request.size)
        self._leaving.append(region)
        return region

    def check_idle(self) -> None:
        """Raise PeerProtocolError, EBUSY, while an earlier request is not answered yet."""
        require(not self.busy, "memory: the request before is not done yet", errno.EBUSY)

    def retire(
        self,
        removed: list[Region],
        emit: Callable[[MemoryRemoval], None],
        link: Link,
        frame: Frame,
    ) -> None:
        """Tell the bus about lost memory; answer ``frame`` once nobody uses it any more.

        Args:
            removed: Regions that are out of the map; others that are still in use do not matter.
            emit: Takes the events for the bus.
            link: Gets the reply.
            frame: The request.
        """
        kind, seq = frame.kind, frame.seq
        if not removed:
            link.reply(kind, seq)
            return
        self.busy = True
        told = [trio.Event() for _ in removed]
        for region, done in zip(removed, told, strict=True):
            emit(MemoryRemoval(region.gpa, region.size, done.set))

        async def drain() -> None:
            with trio.move_on_after(link.limits.drain_timeout) as scope:
                for done in told:
                    await done.wait()
                # Views are dropped all over the place and announce nothing, hence the polling.
                while not self.memory.drained(removed):  # noqa: ASYNC110
                    await trio.sleep(_DRAIN_POLL)
            self.busy = False
            if scope.cancelled_caught:
                text = "memory: out of the map but still in use; keep it until the connection ends"
                link.reply_error(kind, seq, errno.EBUSY, text)
            else:
                link.reply(kind, seq)

        link.spawn(drain)

    def close(self) -> None:
        """Unmap everything."""
        self._backings.clear()
        self._starts.clear()
        self._leaving.clear()
        self.memory.close()

    def _check(self, region: MemoryRegion, fd: int) -> _Backing:
        file = check_memory_untrusted(fd, region, trusted=self._trusted)
        return _Backing(region.size, file, region.fd_offset, region.read_only)

    def _map(self, memory: GuestMemory, region: MemoryRegion, fd: int) -> None:
        map_region_untrusted(memory, region, fd, trusted=self._trusted)
