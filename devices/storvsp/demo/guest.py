"""The guest of ``vmbus demo``: attaches itself to a server, finds its disks, checks every byte.

::

    python -m storvsp.demo --socket PATH [--guest linux-6.1] [--channels 4] [--depth 32] [--hotplug]

It is a program of its own, so that the bus is between two processes which share memory and
nothing else. What happens goes to standard output, one JSON object per line, ``event`` first:

==========  ====================================================================================
event       further members (sizes in bytes, times in seconds)
==========  ====================================================================================
start       ``guest``, ``vps``, ``ram``, ``pid``
attached    ``server``, ``features`` of the connection to it
contact     ``version`` of the bus and names of its 6.0 ``features``
offer       ``relid``, ``class``, ``instance``, ``subchannel``, ``connection``, ``monitor`` (bit
            number or null), ``ignored`` (why this driver leaves it alone, or null)
vstor       ``version``, ``max_transfer``, ``max_subchannels``
channel     ``relid``, ``subchannel``, ``vp``, ``ring`` (each of the two), ``gpadl_pages``
disk        ``address``, ``kind`` ("disk", "cd" or the number of the device type), ``vendor``,
            ``product``, ``block_size``, ``size``, ``used`` (how much of it is tried), ``writable``,
            ``unmaps`` (gives space back, then reads as zeros), ``label`` of the ISO 9660 volume or
            null
progress    ``address``, ``phase``, ``block`` (per request), ``requests``, ``bytes``, ``seconds``:
            a phase so far
phase       the same for a phase that is over: "survey", "write", "read", "mixed" or "check"
contents    ``address``, ``when`` ("before" or "after"), ``digest`` of the bytes that are used
verified    ``address``, ``unmapped``: every byte was as it had to be
ready       ``action``, what the operator shall do with a disk now: "add" or "remove"
notice      ``operation`` of the controller's notification, ``heeded`` by this driver
gone        ``address`` of the removed disk
problem     ``where`` (an address, or a part of the system), ``text``
left        ``interrupts``, ``signals``: how often each side has called the other
==========  ====================================================================================

A digest is BLAKE2b-128 over the BLAKE2b-128 of each 4 KiB. Exit codes: 0 all is well, 1 there was
a problem, 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import trio

from storvsp.demo.trial import LARGE, CorruptionError, DiskTrial, Meter
from storvsp.guest import HABITS, GuestDisk, ScsiError, StorvscAdapter, attach, scan
from storvsp.wire import OPERATION_NAMES
from vmbus.attach.client.machine import MachineDelegate, attach_machine
from vmbus.errors import AttachError, ConfigError, VMBusError, leaves
from vmbus.guest import PERSONALITIES, Guest, GuestPanic, boot
from vmbus.guest.personality import Rescind
from vmbus.partition.soft_machine import SoftMachine
from vmbus.plugins.specs import parse_size
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.guids import CLASS_SCSI, class_name
from vmbus.wire.messages import OfferChannel

BASE_RAM = 32 << 20
"""Bytes of RAM beside rings and data."""
NOTICE_SECONDS = 10.0
"""The host is to have told of a change of its disks by then."""
LEAVING_SECONDS = 2.0
"""A server that takes things away without a word has left by then, or has made a mistake."""
_KINDS = {0: "disk", 5: "cd"}


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    socket: str
    guest: str
    channels: int
    depth: int
    seconds: float
    size: int
    hotplug: bool


class Demo:
    """One life of the guest."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.personality = PERSONALITIES[options.guest]
        self.habits = HABITS[options.guest]
        self.failed = False

    def emit(self, event: str, **members: object) -> None:
        """Write one line. Blocks if nobody reads."""
        sys.stdout.write(json.dumps({"event": event, **members}) + "\n")
        sys.stdout.flush()

    def problem(self, where: str, error: BaseException | str) -> None:
        """Report a problem."""
        self.failed = True
        self.emit("problem", where=where, text=str(error))

    async def run(self) -> bool:
        """Live; returns whether all went well."""
        options = self.options
        rings = 2 * options.channels * self.habits.ring_pages * PAGE_SIZE
        ram = -(-(BASE_RAM + rings + 2 * options.depth * LARGE) >> 20) << 20
        machine = SoftMachine(((0, ram),), vp_count=options.channels)
        name = self.personality.name
        self.emit("start", guest=name, vps=machine.vp_count, ram=ram, pid=os.getpid())
        try:
            await self._attached(machine)
        except* (VMBusError, trio.BrokenResourceError, OSError) as group:
            self.problem("guest", leaves(group)[0])
        finally:
            machine.close()
        return not self.failed

    async def _attached(self, machine: SoftMachine) -> None:
        async with (
            attach_machine(machine, self.options.socket, name="demo") as (attachment, delegate),
            trio.open_nursery() as nursery,
        ):
            features = [feature.name for feature in attachment.features]
            self.emit("attached", server=attachment.server_name, features=features)
            nursery.start_soon(_watch, delegate)
            try:
                async with boot(machine, self.personality) as guest:
                    await self._booted(guest)
                    guest.check_memory()
            except GuestPanic as panic:
                # A server that stops takes the doorbells away first, and then leaves.
                with trio.move_on_after(LEAVING_SECONDS):
                    await delegate.over.wait()
                if delegate.over.is_set():
                    raise _gone(delegate) from panic
                raise
            nursery.cancel_scope.cancel()

    async def _booted(self, guest: Guest) -> None:
        connection = guest.connection
        connection.on_offer = self._offered
        version = await connection.contact()
        features = [feature.name for feature in connection.features]
        self.emit("contact", version=str(version), features=features)
        offers = await connection.request_offers()
        for offer, reason in connection.ignored.values():
            self._offered(offer, ignored=reason)
        controllers = [offer for offer in offers if offer.class_id == CLASS_SCSI]
        if not controllers:
            raise VMBusError("the bus offers no SCSI controller that this driver serves")
        adapter = await attach(
            guest, controllers[0], sub_channels=self.options.channels - 1, contiguous=False
        )
        self.emit(
            "vstor",
            version=f"{adapter.version >> 8}.{adapter.version & 0xFF}",
            max_transfer=adapter.max_transfer,
            max_subchannels=adapter.properties.max_channel_count,
        )
        for channel in adapter.channels:
            pages = self.habits.ring_pages
            self.emit(
                "channel",
                relid=channel.relid,
                subchannel=channel.offer.subchannel_index,
                vp=channel.target_vp,
                ring=pages * PAGE_SIZE,
                gpadl_pages=2 * pages,
            )
        await self._use(adapter)
        interrupts = sum(channel.interrupts for channel in adapter.channels)
        signals = sum(channel.signals for channel in adapter.channels)
        await adapter.close()
        if self.personality.rescind is Rescind.RELEASE:
            # Sub-channels go with their primary; their relids are to be released before UNLOAD.
            for channel in adapter.channels[1:]:
                await connection.wait_gone(channel.relid)
        await connection.unload()
        self.emit("left", interrupts=interrupts, signals=signals)

    def _offered(self, offer: OfferChannel, ignored: str | None = None) -> None:
        self.emit(
            "offer",
            relid=offer.relid,
            **{"class": class_name(offer.class_id)},
            instance=str(offer.instance_id),
            subchannel=offer.subchannel_index,
            connection=offer.connection_id,
            monitor=offer.monitor_id if offer.monitor_allocated else None,
            ignored=ignored,
        )

    # -- disks ------------------------------------------------------------------------------------

    async def _use(self, adapter: StorvscAdapter) -> None:
        """Try all disks, then one that comes and goes."""
        trials = [await self._found(disk) for disk in await scan(adapter)]
        if not trials:
            raise VMBusError("there are no disks behind the controller")
        writable = sum(trial.writable for trial in trials) + self.options.hotplug
        seconds = self.options.seconds / max(writable, 1)
        for trial in trials:
            await self._try(trial, seconds)
        if self.options.hotplug:
            await self._hotplug(adapter, {_address(trial.disk) for trial in trials}, seconds)

    async def _found(self, disk: GuestDisk) -> DiskTrial:
        address = _address(disk)

        def progress(meter: Meter) -> None:
            members = dataclasses.asdict(meter)
            self.emit("phase" if members.pop("over") else "progress", address=address, **members)

        options = self.options
        trial = DiskTrial(disk, depth=options.depth, limit=options.size, progress=progress)
        if disk.size:
            await trial.look()
        inquiry = disk.inquiry
        self.emit(
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
            self.emit("contents", address=address, when="before", digest=trial.digest)
            if trial.writable:
                await trial.write(seconds / 3)
                await trial.read(seconds / 3)
                await trial.mix(seconds / 3)
                if trial.unmaps:
                    await trial.unmap()
            await trial.check()
        except (ScsiError, CorruptionError) as error:
            self.problem(address, error)
            return
        self.emit("contents", address=address, when="after", digest=trial.digest)
        self.emit("verified", address=address, unmapped=trial.unmapped)

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
                self.problem(address, "removed, but the scan still finds it")
            elif not (await disk.execute(bytes(6))).absent:
                self.problem(address, "removed, but its commands are not refused as INVALID_LUN")
            else:
                self.emit("gone", address=address)

    async def _change(self, adapter: StorvscAdapter, action: str) -> list[GuestDisk]:
        """Ask the operator for a change, wait for the notification of it, scan again."""
        count = len(adapter.notifications)
        self.emit("ready", action=action)
        with trio.move_on_after(NOTICE_SECONDS) as waiting:
            await adapter.wait_notifications(count + 1)
        if waiting.cancelled_caught:
            raise VMBusError(f"no notification within {NOTICE_SECONDS:g} s of: {action}")
        operation = adapter.notifications[count]
        heeded = self.habits.rescans_on_enumerate
        self.emit("notice", operation=OPERATION_NAMES[operation], heeded=heeded)
        return await scan(adapter)


async def _watch(delegate: MachineDelegate) -> None:
    """Raise when the server is gone: nothing that is in flight would ever come back."""
    await delegate.over.wait()
    raise _gone(delegate)


def _gone(delegate: MachineDelegate) -> AttachError:
    return AttachError(f"the server is gone: {delegate.reason}")


def _address(disk: GuestDisk) -> str:
    return f"{disk.path}:{disk.target}:{disk.lun}"


def _text(raw: bytes) -> str:
    return raw.decode("ascii", "replace").strip()


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(arguments: Sequence[str] | None) -> Options:
    """Parse the command line; exits with 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m storvsp.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--socket", required=True, help="where vmbus serve listens")
    parser.add_argument("--guest", choices=PERSONALITIES, default="linux-6.1")
    parser.add_argument("--channels", type=int, default=4, help="channels, and VPs")
    parser.add_argument("--depth", type=int, default=32, help="requests in flight")
    parser.add_argument("--seconds", type=float, default=6.0, help="for all disks together")
    parser.add_argument("--size", type=_size, default=32 << 20, help="used of each disk, as in 8M")
    parser.add_argument("--hotplug", action="store_true", help="ask for a disk to come and go")
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return 0 if trio.run(Demo(parse(arguments)).run) else 1
