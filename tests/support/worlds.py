"""Whole systems for tests: a bus, its devices and a guest, in one process or in two.

Two kinds of guests: :mod:`vmbus.guest` with its personalities, which judges the host as real
drivers would, and :class:`RawGuest`, which posts what it is told to and writes down what comes.
:mod:`tests.support.server_process` has the other process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import trio
import trio.testing

from storvsp import ScsiController
from storvsp.disks.ram import RamDisk
from storvsp.guest import GuestDisk, StorvscAdapter, attach, scan
from tests.support.patience import LOOK, PATIENCE
from tests.support.synic import Guest as SynicGuest
from vmbus.attach.protocol.limits import Feature as AttachFeature
from vmbus.engine import EngineConfig
from vmbus.guest import PERSONALITIES, Guest, Personality, boot
from vmbus.guest.personality import Rescind
from vmbus.host import Bus, BusConfig, open_bus
from vmbus.host.channel import Channel
from vmbus.host.device import Device, Offer
from vmbus.partition.loopback import LoopbackTransport
from vmbus.partition.soft_machine import SoftMachine
from vmbus.wire import messages as m
from vmbus.wire.gpa import PAGE_SIZE, build_range
from vmbus.wire.guids import CLASS_SCSI
from vmbus.wire.versions import NO_FEATURES, Feature, Version

ALL = sorted(PERSONALITIES)
DISK_SIZE = 4 << 20
UNIT_ATTENTION = 6
TIERS: dict[str, AttachFeature] = {
    "T0": AttachFeature.LOG,
    "T1": AttachFeature.LOG | AttachFeature.CALL_FD,
    "T2": AttachFeature.LOG | AttachFeature.DIRECT,
}
"""How event flags reach the guest: by message, by eventfd, by writing its memory."""


# --- A partition with a tap ---------------------------------------------------------------------


class TapTransport(LoopbackTransport):
    """Writes down, in order, what reaches the guest."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.trail: list[tuple[str, Any]] = []
        """``("message", payload)`` once it is in its slot, ``("flag", number)`` when it is set."""

    async def deliver(self, vp: int, sint: int, message_type: int, payload: bytes) -> bool:
        arrived = await super().deliver(vp, sint, message_type, payload)
        if arrived:
            self.trail.append(("message", payload))
        return arrived

    def signal_flag(self, vp: int, sint: int, flag: int) -> None:
        self.trail.append(("flag", flag))
        super().signal_flag(vp, sint, flag)

    @property
    def messages(self) -> list[int]:
        """The numbers of all messages so far."""
        return [int.from_bytes(data[:4], "little") for kind, data in self.trail if kind != "flag"]


class FailingTransport(TapTransport):
    """A partition that is gone, or whose VMM refuses; ``fails`` says what raises what."""

    def __init__(self, *args: Any, **fails: Exception) -> None:
        super().__init__(*args)
        self.fails = fails

    def check(self, what: str) -> None:
        error = self.fails.get(what)
        if error is not None:
            raise error

    async def add_message_port(self, connection_id: int) -> None:
        self.check("message_port")
        await super().add_message_port(connection_id)

    async def add_event_port(self, connection_id: int, flag: int) -> Any:
        self.check("event_port")
        return await super().add_event_port(connection_id, flag)

    async def remove_event_port(self, connection_id: int, flag: int) -> None:
        await super().remove_event_port(connection_id, flag)
        self.check("remove_port")

    def open_call(self, vp: int, sint: int, flag: int) -> Any:
        self.check("open_call")
        return super().open_call(vp, sint, flag)


@dataclasses.dataclass
class World:
    """A machine and a bus; guests come and go."""

    machine: SoftMachine
    transport: TapTransport
    bus: Bus

    @contextlib.asynccontextmanager
    async def boot(self, personality: Personality, *, seed: int = 0) -> AsyncIterator[Guest]:
        async with boot(self.machine, personality, seed=seed) as guest:
            yield guest

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()


@contextlib.asynccontextmanager
async def world(
    *devices: Device,
    vps: int = 4,
    megabytes: int = 64,
    config: BusConfig | None = None,
    **options: Any,
) -> AsyncIterator[World]:
    """A bus over a loopback transport. The machine outlives the bus, as a VM's memory does."""
    machine = SoftMachine(((0, megabytes << 20),), vp_count=vps)
    try:
        with trio.fail_after(PATIENCE):
            with TapTransport(machine.synic) as transport:
                async with open_bus(transport, devices, config=config, **options) as bus:
                    yield World(machine, transport, bus)
    finally:
        machine.close()


def limited(version: Version, **engine: Any) -> BusConfig:
    """A bus that speaks nothing newer than ``version``."""
    return BusConfig(engine=EngineConfig(max_version=version, **engine))


# --- Storage ------------------------------------------------------------------------------------


def controller(
    personality: Personality | None = None,
    *,
    disks: int = 1,
    number: int = 1,
    size: int = DISK_SIZE,
    **options: Any,
) -> ScsiController:
    """A controller with RAM disks, of the kind that the personality can use."""
    if personality is not None:
        options.setdefault("monitor", personality.needs_monitor)
    made = ScsiController(instance_id=uuid.UUID(int=0xC0DE0000 + number), **options)
    for _ in range(disks):
        made.add_disk(RamDisk(size))
    return made


def read_10(block: int, count: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, block, 0, count, 0)


def write_10(block: int, count: int) -> bytes:
    return struct.pack(">BBIBHB", 0x2A, 0, block, 0, count, 0)


async def exercise(
    adapter: StorvscAdapter, disk: GuestDisk, *, tasks: int = 8, rounds: int = 6
) -> None:
    """Write and read back over all channels at once; each task has blocks of its own."""
    blocks = 16
    size = blocks * 512

    async def work(number: int) -> None:
        for turn in range(rounds):
            data = bytes([number * 7 + turn & 0xFF]) * (size - 8) + struct.pack("<II", number, turn)
            channel = adapter.channels[(number + turn) % len(adapter.channels)]
            at = (number * rounds + turn) * blocks
            if channel.outstanding >= adapter.habits.queue_depth:
                channel = None  # type: ignore[assignment]
            where: dict[str, Any] = {"path": disk.path, "target": disk.target, "lun": disk.lun}
            where["channel"] = channel
            for _ in range(5):
                result = await adapter.execute(
                    write_10(at, blocks), write=data, offset=turn, **where
                )
                if result.sense_key != UNIT_ATTENTION:
                    break
            assert result.good, result
            for _ in range(5):
                result = await adapter.execute(read_10(at, blocks), read=size, **where)
                if result.sense_key != UNIT_ATTENTION:
                    break
            assert result.good, result
            assert result.data == data

    async with trio.open_nursery() as nursery:
        for number in range(tasks):
            nursery.start_soon(work, number)


async def first_disk(
    guest: Guest, *, sub_channels: int | None = None
) -> tuple[StorvscAdapter, GuestDisk]:
    """Connect, attach the first controller, scan it."""
    offers = await guest.connection.connect()
    adapter = await attach(guest, offers[0], sub_channels=sub_channels, contiguous=False)
    return adapter, (await scan(adapter))[0]


async def whole_life(guest: Guest, *, sub_channels: int | None = 3) -> StorvscAdapter:
    """From contact to unload, with I/O on all channels in between."""
    adapter, disk = await first_disk(guest, sub_channels=sub_channels)
    assert disk.size == DISK_SIZE
    await exercise(adapter, disk)
    await adapter.close()
    if guest.personality.rescind is Rescind.RELEASE:
        # Sub-channels are rescinded when the primary channel closes.
        for channel in adapter.channels[1:]:
            await guest.connection.wait_gone(channel.relid)
    await guest.connection.unload()
    guest.check_memory()
    return adapter


# --- A device for anything ----------------------------------------------------------------------


class EchoDevice:
    """Completes each request with its payload; a test can make it misbehave.

    Attributes:
        lives: Channels of all lives so far.
        on_packet: Called with each packet, and may do anything.
    """

    def __init__(
        self, number: int = 1, *, sub_channels: int = 0, monitor: int | None = None, **offer: Any
    ) -> None:
        self.offer = Offer(
            class_id=CLASS_SCSI,
            instance_id=uuid.UUID(int=0xEC400000 + number),
            max_subchannels=sub_channels,
            monitor_latency=monitor,
            **offer,
        )
        self.lives: list[Channel] = []
        self.channels: list[Channel] = []
        self.running = 0
        self.closed = 0
        self.on_packet: Callable[[Channel, Any], None] | None = None
        self.on_run: Callable[[Channel], Any] | None = None
        self.offer_subchannels = sub_channels

    async def run(self, primary: Channel) -> None:
        assert not self.running
        self.lives.append(primary)
        self.running += 1
        try:
            if self.on_run is not None:
                await self.on_run(primary)
            async with trio.open_nursery() as nursery:
                if self.offer_subchannels:
                    primary.offer_subchannels(self.offer_subchannels)
                nursery.start_soon(self._accept, primary, nursery)
                await self.serve(primary)
                nursery.cancel_scope.cancel()
        finally:
            self.running -= 1

    async def _accept(self, primary: Channel, nursery: trio.Nursery) -> None:
        while True:
            try:
                nursery.start_soon(self._sub, await primary.accept_subchannel())
            except trio.EndOfChannel:
                return

    async def _sub(self, channel: Channel) -> None:
        try:
            await self.serve(channel)
        finally:
            await channel.aclose()

    async def serve(self, channel: Channel) -> None:
        self.channels.append(channel)
        try:
            while True:
                for packet in await channel.receive_batch():
                    if self.on_packet is not None:
                        self.on_packet(channel, packet)
                    elif packet.wants_completion:
                        channel.complete(packet.transaction_id, packet.payload)
                await channel.flush()
        except trio.EndOfChannel:
            self.channels.remove(channel)

    def snapshot(self) -> dict[str, Any]:
        return {"lives": len(self.lives)}

    async def aclose(self) -> None:
        self.closed += 1


# --- A guest without habits ---------------------------------------------------------------------

INTERRUPT_PAGE, MONITOR_1, MONITOR_2 = 0x10000, 0x11000, 0x12000
RAW_RING_PFN = 0x40
"""First page that a raw guest's rings may use."""


class RawGuest:
    """Posts what a test wants and keeps every message it gets, with its exact size."""

    def __init__(self, there: World) -> None:
        self.world = there
        self.synic = SynicGuest(there.machine.synic)
        self.synic.enable()
        self.connection_id = 4
        self.version: Version | None = None
        self.features: Feature = NO_FEATURES

    def post_bytes(self, payload: bytes, connection_id: int | None = None) -> int:
        """Post any bytes; return the hypercall's status."""
        connection = self.connection_id if connection_id is None else connection_id
        return self.synic.post(connection, payload)

    def build(self, message: m.Message) -> bytes:
        return m.build_message(message, version=self.version, features=self.features)

    async def wait_for(self, wanted: int) -> list[int]:
        """Take messages until one with this number has come; return the numbers of all."""
        seen: list[int] = []
        while wanted not in seen:
            await trio.sleep(LOOK)
            seen += numbers(await self.receive())
        return seen

    async def post(self, *messages: m.Message) -> list[bytes]:
        """Post messages, each of which has to be taken; return what has come by then."""
        for message in messages:
            assert self.post_bytes(self.build(message)) == 0
        return await self.receive()

    async def receive(self) -> list[bytes]:
        """Take messages until no more come."""
        found: list[bytes] = []
        while True:
            await trio.testing.wait_all_tasks_blocked()
            message = self.synic.receive()
            if message is None:
                return found
            assert message.message_type == 1
            found.append(message.payload)

    async def contact(self, version: int = Version.V5_3, **changes: Any) -> list[bytes]:
        """INITIATE_CONTACT as Linux does it."""
        self.connection_id = changes.pop("connection_id", 4 if version >= Version.V5_0 else 1)
        message = m.InitiateContact(
            version=version,
            target_vp=0,
            target_info=2 if self.connection_id == 4 else INTERRUPT_PAGE,
            monitor_page_1=MONITOR_1,
            monitor_page_2=MONITOR_2,
            client_id=None,
        )
        raw = m.build_message(dataclasses.replace(message, **changes), version=None)
        assert self.post_bytes(raw) == 0
        replies = await self.receive()
        if replies and replies[-1][8]:
            self.version = Version(version)
        return replies

    async def connect(self, version: int = Version.V5_3) -> list[m.OfferChannel]:
        """Contact and offers."""
        replies = await self.contact(version)
        assert [number(raw) for raw in replies] == [m.VersionResponse.TYPE]
        replies = await self.post(m.RequestOffers())
        assert number(replies[-1]) == m.AllOffersDelivered.TYPE
        return [self.parse(raw) for raw in replies[:-1]]

    def parse(self, raw: bytes) -> Any:
        return m.parse_message_untrusted(
            raw, direction=m.Direction.HOST_TO_GUEST, version=self.version, features=self.features
        )

    def gpadl(self, relid: int, handle: int, pfns: Sequence[int]) -> list[m.Message]:
        """GPADL_HEADER and bodies for whole pages."""
        data = build_range(len(pfns) * PAGE_SIZE, 0, pfns)
        messages: list[m.Message] = [
            m.GpadlHeader(
                relid=relid, gpadl=handle, range_buflen=len(data), range_count=1, data=data[:216]
            )
        ]
        for index, start in enumerate(range(216, len(data), 224)):
            body = data[start : start + 224]
            messages.append(m.GpadlBody(message_number=index, gpadl=handle, data=body))
        return messages

    def open_message(self, relid: int, handle: int, pages: int, **changes: Any) -> m.OpenChannel:
        message = m.OpenChannel(
            relid=relid,
            open_id=relid,
            ring_gpadl=handle,
            target_vp=0,
            downstream_page_offset=pages,
            user_data=bytes(120),
            connection_id=None,
            event_flag=None,
            open_flags=None,
        )
        return dataclasses.replace(message, **changes)

    async def open(self, relid: int = 1, *, handle: int = 7, pages: int = 4) -> list[bytes]:
        """Open a channel over zeroed rings of ``pages`` pages each; return what else came."""
        pfns = range(RAW_RING_PFN, RAW_RING_PFN + 2 * pages)
        self.world.machine.memory.write(pfns[0] * PAGE_SIZE, bytes(len(pfns) * PAGE_SIZE))
        (created,) = await self.post(*self.gpadl(relid, handle, pfns))
        assert self.parse(created).status == 0
        opened, *others = await self.post(self.open_message(relid, handle, pages))
        assert self.parse(opened).status == 0
        return others


def number(raw: bytes) -> int:
    """The number of a control message."""
    return int.from_bytes(raw[:4], "little")


def numbers(messages: Iterable[bytes]) -> list[int]:
    """The numbers of control messages."""
    return [number(raw) for raw in messages]


async def ready(there: World, version: int = Version.V5_3) -> RawGuest:
    guest = RawGuest(there)
    await guest.connect(version)
    return guest
