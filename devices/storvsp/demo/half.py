"""The storage half of a demo's guest: finds its disks and checks every byte of them.

Its lines among those of :mod:`vmbus.demo`:

==========  ====================================================================================
event       further members (sizes in bytes, times in seconds)
==========  ====================================================================================
vstor       ``version``, ``max_transfer``, ``max_subchannels``
disk        ``address``, ``kind`` ("disk", "cd" or the number of the device type), ``vendor``,
            ``product``, ``block_size``, ``size``, ``used`` (how much of it is tried), ``writable``,
            ``unmaps`` (gives space back, then reads as zeros), ``label`` of the ISO 9660 volume or
            null
progress    ``address``, ``phase``, ``block`` (per request), ``requests``, ``bytes``, ``seconds``:
            a phase so far
phase       the same for a phase that is over: "survey", "write", "read", "mixed" or "check"
contents    ``address``, ``when`` ("before" or "after"), ``digest`` of the bytes that are used
verified    ``address``, ``unmapped``: every byte was as it had to be
gone        ``address`` of the removed disk
changed     ``address``, ``size`` and ``block_size`` that it has now; both are 0 for an empty drive
==========  ====================================================================================

A digest is BLAKE2b-128 over the BLAKE2b-128 of each 4 KiB. The ``where`` of a problem with a disk
is its address. With ``--hotplug`` the operator is asked to "add" a disk and to "remove" it again,
and the host has to tell of it within 10 s. With ``--idle`` nothing is tried: there are lines for
what is there, what comes, goes and changes, until SIGINT or SIGTERM ends the guest.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
from collections.abc import Sequence
from functools import partial

import trio

from storvsp.demo.trial import LARGE, CorruptionError, DiskTrial, Meter
from storvsp.guest import HABITS, GuestDisk, ScsiError, StorvscAdapter, attach, scan
from storvsp.wire import OPERATION_NAMES
from vmbus.demo import NOTICE_SECONDS, Half, Options, Program, Story, whole_number
from vmbus.errors import ConfigError, VMBusError
from vmbus.guest import Guest
from vmbus.plugins.specs import parse_size
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.guids import CLASS_SCSI
from vmbus.wire.messages import OfferChannel

LOOK_SECONDS = 2.0
"""Between looks of an idle guest at its drives, as in Linux."""

_KINDS = {0: "disk", 5: "cd"}


class StorageHalf(Half[StorvscAdapter]):
    """What the guest does with a SCSI controller; see :class:`vmbus.demo.Half`."""

    def __init__(self, options: Options, arguments: argparse.Namespace, story: Story) -> None:
        super().__init__(options, arguments, story)
        self.habits = HABITS[options.personality.key]
        self.depth: int = arguments.depth
        """Requests in flight."""
        self.size: int = arguments.size
        """Bytes used of each disk, at most."""
        self.hotplug: bool = arguments.hotplug
        """Whether to have a disk come and go."""
        self.idle: bool = arguments.idle
        """Whether to stay, and to look on only."""

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """See :meth:`vmbus.demo.Half.add_options`."""
        parser.add_argument(
            "--depth", type=whole_number(1, 1024), default=32, help="requests in flight, 1 to 1024"
        )
        parser.add_argument(
            "--size", type=_size, default=32 << 20, help="used of each disk, as in 8M"
        )
        more = parser.add_mutually_exclusive_group()
        more.add_argument(
            "--hotplug",
            action="store_true",
            help='ask for a disk to come and go, by lines "ready": each has to be done within '
            f"{NOTICE_SECONDS:g} s",
        )
        more.add_argument(
            "--idle",
            action="store_true",
            help="write nothing: find the disks, tell what changes, and stay until interrupted",
        )

    @property
    def ram(self) -> int:
        """See :attr:`vmbus.demo.Half.ram`."""
        rings = 2 * self.options.channels * self.habits.ring_pages * PAGE_SIZE
        return rings + 2 * self.depth * LARGE

    async def attach(self, guest: Guest, offers: Sequence[OfferChannel]) -> StorvscAdapter:
        """See :meth:`vmbus.demo.Half.attach`; the first controller is taken."""
        controllers = [offer for offer in offers if offer.class_id == CLASS_SCSI]
        if not controllers:
            raise VMBusError("the bus offers no SCSI controller that this driver serves")
        adapter = await attach(
            guest, controllers[0], sub_channels=self.options.channels - 1, contiguous=False
        )
        self.story.emit(
            "vstor",
            version=f"{adapter.version >> 8}.{adapter.version & 0xFF}",
            max_transfer=adapter.max_transfer,
            max_subchannels=adapter.properties.max_channel_count,
        )
        return adapter

    async def use(self, driver: StorvscAdapter) -> None:
        """Try all disks, then one that comes and goes; see :meth:`vmbus.demo.Half.use`."""
        if self.idle:
            await self._stay(driver)
            return
        trials = [await self._found(disk) for disk in await scan(driver)]
        if not trials:
            raise VMBusError("there are no disks behind the controller")
        writable = sum(trial.writable for trial in trials) + self.hotplug
        seconds = self.options.seconds / max(writable, 1)
        for trial in trials:
            await self._try(trial, seconds)
        if self.hotplug:
            await self._hotplug(driver, {_address(trial.disk) for trial in trials}, seconds)

    async def _stay(self, adapter: StorvscAdapter) -> None:
        """Look on until somebody interrupts, then leave in order. A checkpoint."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._look_on, adapter)
                async for number in signals:
                    self.story.interrupted = number
                    break
                nursery.cancel_scope.cancel()

    async def _look_on(self, adapter: StorvscAdapter) -> None:
        """Tell what there is, and what changes, for ever. A checkpoint."""
        known: dict[str, GuestDisk] = {}
        while True:
            count = len(adapter.notifications)
            with contextlib.suppress(ScsiError):  # something goes while it is looked at
                found = {_address(disk): disk for disk in await scan(adapter)}
                await self._compare(known, found)
                known = found
            # Of media that come and go there is no notification: drives are polled for them.
            with trio.move_on_after(LOOK_SECONDS):
                await adapter.wait_notifications(count + 1)
            for operation in adapter.notifications[count:]:
                self._notice(operation)

    async def _compare(self, known: dict[str, GuestDisk], found: dict[str, GuestDisk]) -> None:
        for address in known:
            if address not in found:
                self.story.emit("gone", address=address)
        for address, disk in found.items():
            old = known.get(address)
            if old is None or old.device_type != disk.device_type:
                await self._found(disk)
            elif (old.size, old.block_size) != (disk.size, disk.block_size):
                self.story.emit(
                    "changed", address=address, size=disk.size, block_size=disk.block_size
                )

    def _notice(self, operation: int) -> None:
        self.story.emit(
            "notice",
            operation=OPERATION_NAMES[operation],
            heeded=self.habits.rescans_on_enumerate,
        )

    async def _found(self, disk: GuestDisk) -> DiskTrial:
        address = _address(disk)

        def progress(meter: Meter) -> None:
            members = dataclasses.asdict(meter)
            event = "phase" if members.pop("over") else "progress"
            self.story.emit(event, address=address, **members)

        trial = DiskTrial(disk, depth=self.depth, limit=self.size, progress=progress)
        if disk.size:
            await trial.look()
        inquiry = disk.inquiry
        self.story.emit(
            "disk",
            address=address,
            kind=_KINDS.get(disk.device_type, str(disk.device_type)),
            vendor=_text(inquiry[8:16]),
            product=_text(inquiry[16:32]),
            block_size=disk.block_size,
            size=disk.size,
            used=trial.used,
            writable=trial.writable,
            unmaps=trial.unmaps,
            label=trial.label,
        )
        return trial

    async def _try(self, trial: DiskTrial, seconds: float) -> None:
        """Try a disk for so long, or as long as it takes; a problem is reported, not raised."""
        address = _address(trial.disk)
        try:
            await trial.survey()
            self.story.emit("contents", address=address, when="before", digest=trial.digest)
            if trial.writable:
                await trial.write(seconds / 3)
                await trial.read(seconds / 3)
                await trial.mix(seconds / 3)
                if trial.unmaps:
                    await trial.unmap()
            await trial.check()
        except (ScsiError, CorruptionError) as error:
            self.story.problem(address, error)
            return
        self.story.emit("contents", address=address, when="after", digest=trial.digest)
        self.story.emit("verified", address=address, unmapped=trial.unmapped)

    async def _hotplug(self, adapter: StorvscAdapter, known: set[str], seconds: float) -> None:
        """Have a disk added, find it, use it, have it removed, see it gone."""
        disks = await self._change(adapter, "add")
        added = [disk for disk in disks if _address(disk) not in known]
        if not added:
            raise VMBusError("a disk was added, but the scan finds no new one")
        for disk in added:
            await self._try(await self._found(disk), seconds)
        disks = await self._change(adapter, "remove")
        left = {_address(disk) for disk in disks}
        for disk in added:
            address = _address(disk)
            if address in left:
                self.story.problem(address, "removed, but the scan still finds it")
            elif not (await disk.execute(bytes(6))).absent:
                self.story.problem(
                    address, "removed, but its commands are not refused as INVALID_LUN"
                )
            else:
                self.story.emit("gone", address=address)

    async def _change(self, adapter: StorvscAdapter, action: str) -> list[GuestDisk]:
        """Ask the operator for a change, wait for the notification of it, scan again."""
        count = len(adapter.notifications)
        operations = await self.ask(action, partial(adapter.wait_notifications, count + 1))
        self._notice(operations[count])
        return await scan(adapter)


def _address(disk: GuestDisk) -> str:
    return f"{disk.path}:{disk.target}:{disk.lun}"


def _text(raw: bytes) -> str:
    return raw.decode("ascii", "replace").strip()


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not size or size % 4096:  # it would verify nothing, and say that all is well
        raise argparse.ArgumentTypeError(f"at least 4K, in whole 4K, not {text[:40]}")
    return size


PROGRAM = Program(
    "python -m storvsp.demo",
    "The guest of ``vmbus demo``: attaches itself to a server, finds its disks, checks every byte.",
    (StorageHalf,),
)
"""A guest with a SCSI controller and nothing else."""
