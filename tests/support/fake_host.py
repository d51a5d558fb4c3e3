"""A machine and a host, both minimal, to test the Python guest against a script.

The host behaves well unless a test tells it not to: by replacing the handler of a control message
in ``host.handlers``, by sending messages out of turn with ``host.send``, or by overriding what the
storage device answers. It knows nothing of the project's real host.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import trio
import trio.testing

from tests.support.patience import LOOK
from vmbus.guest.machine import Interrupt, Region
from vmbus.wire.guids import CLASS_SCSI
from vmbus.wire.messages import (
    Direction,
    Message,
    OfferChannel,
    build_message,
    parse_message_untrusted,
)
from vmbus.wire.synic import Msr
from vmbus.wire.versions import Feature, Version

RAM_BASE = 0x100000
PAGE = 4096
U32 = struct.Struct("<I")
INSTANCE = UUID("11111111-2222-3333-4444-555555555555")


def message(number: int, *words: int) -> bytes:
    """A control message made of u32 fields."""
    return struct.pack(f"<II{len(words)}I", number, 0, *words)


def offer(relid: int = 1, **fields) -> OfferChannel:
    values = {
        "class_id": CLASS_SCSI,
        "instance_id": UUID(int=INSTANCE.int + relid),
        "relid": relid,
        "connection_id": 0x10000 + relid,
    }
    return OfferChannel(**{**values, **fields})


class Machine:
    """RAM, MSRs, hypercalls and interrupts, for the guest's Machine protocol."""

    flags_are_shared = False

    def __init__(self, *, pages: int = 8192, vps: int = 1) -> None:
        self.memory = bytearray(pages * PAGE)
        self.whole = memoryview(self.memory)
        half = pages // 2 * PAGE
        self.regions = [
            Region(RAM_BASE, half),
            Region(RAM_BASE + half, pages * PAGE - half),
        ]
        self.vp_count = vps
        self.leaves = {
            1: (0, 0, 1 << 31, 0),
            0x40000000: (0x40000005, *struct.unpack("<3I", b"Microsoft Hv")),
            0x40000001: (int.from_bytes(b"Hv#1", "little"), 0, 0, 0),
            0x40000003: (0x6E, 0x30, 0, 0),
        }
        self.msrs: dict[tuple[int, int], int] = {}
        for vp in range(vps):
            self.msrs[vp, Msr.VP_INDEX] = vp
            self.msrs[vp, Msr.SCONTROL] = 1
        self.msr_log: list[tuple[int, int, int]] = []
        self.refuse_page = False
        self.no_code = False
        self.host = Host(self)
        self.queues: dict[int, deque[bytes]] = {vp: deque() for vp in range(vps)}
        self.pending: set[Interrupt] = set()
        self.event = trio.Event()
        self.post_status: deque[int] = deque()
        self.signal_status = 0
        self.hypercalls: list[tuple[int, int, int]] = []

    # -- the Machine protocol
    def view(self, gpa: int, length: int) -> memoryview:
        start = gpa - RAM_BASE
        if start < 0 or start + length > len(self.memory):
            raise ValueError(hex(gpa))
        return self.whole[start : start + length]

    def cpuid(self, leaf: int) -> tuple[int, int, int, int]:
        return self.leaves.get(leaf, (0, 0, 0, 0))

    def read_msr(self, vp: int, index: int) -> int:
        return self.msrs.get((vp, index), 0)

    def write_msr(self, vp: int, index: int, value: int) -> None:
        self.msr_log.append((vp, index, value))
        if index == Msr.HYPERCALL and value & 1:
            if self.refuse_page:
                return
            if not self.no_code:
                self.view(value & ~0xFFF, 4)[:] = b"\x0f\x01\xd9\xc3"
        self.msrs[vp, index] = value
        if index == Msr.EOM:
            self.pump(vp)

    async def hypercall(self, vp: int, control: int, rdx: int, r8: int) -> int:
        self.hypercalls.append((control, rdx, r8))
        code = control & 0xFFFF
        if code == 0x5C:
            data = bytes(self.view(rdx, 256))
            connection, _, kind, size = struct.unpack_from("<4I", data)
            assert kind == 1
            if self.post_status:
                status = self.post_status.popleft()
                if status:
                    return status
            self.host.posted(connection, data[16 : 16 + size])
            return 0
        assert code == 0x5D
        raw = rdx if control >> 16 & 1 else int.from_bytes(self.view(rdx, 8), "little")
        if self.signal_status:
            return self.signal_status
        self.host.signalled(raw & 0xFFFFFFFF)
        return 0

    async def wait_interrupt(self) -> set[Interrupt]:
        while not self.pending:
            await self.event.wait()
        await trio.lowlevel.checkpoint()
        found, self.pending = self.pending, set()
        self.event = trio.Event()
        return found

    # -- the hypervisor's side
    def interrupt(self, vp: int = 0, sint: int = 2) -> None:
        self.pending.add(Interrupt(vp, self.msrs.get((vp, Msr.SINT0 + sint), 0) & 0xFF))
        self.event.set()

    def deliver(self, payload: bytes, vp: int = 0) -> None:
        self.queues[vp].append(payload)
        self.pump(vp)

    def pump(self, vp: int, kind: int = 1) -> None:
        queue = self.queues[vp]
        simp = self.msrs.get((vp, Msr.SIMP), 0)
        if not queue or not simp & 1:
            return
        slot = self.view((simp & ~0xFFF) + 2 * 256, 256)
        if int.from_bytes(slot[:4], "little"):
            slot[5] |= 1
            return
        payload = queue.popleft()
        slot[4:16] = struct.pack("<BBHQ", len(payload) & 0xFF, bool(queue), 0, 0)
        slot[16 : 16 + min(len(payload), 240)] = payload[:240]
        slot[:4] = U32.pack(kind)
        self.interrupt(vp)

    def set_flag(self, flag: int, vp: int = 0) -> None:
        siefp = self.msrs.get((vp, Msr.SIEFP), 0)
        assert siefp & 1
        page = self.view((siefp & ~0xFFF) + 2 * 256, 256)
        page[flag // 8] |= 1 << flag % 8
        self.interrupt(vp)


class Ring:
    """One ring as the host sees it; slow and simple."""

    def __init__(self, pages: list[memoryview]) -> None:
        self.control = pages[0]
        self.words = pages[0].cast("I")
        self.pages = pages[1:]
        self.size = len(self.pages) * PAGE

    def get(self, offset: int, length: int) -> bytes:
        out = bytearray()
        while length:
            offset %= self.size
            page, start = divmod(offset, PAGE)
            part = bytes(self.pages[page][start : start + length])
            out += part
            offset += len(part)
            length -= len(part)
        return bytes(out)

    def put(self, offset: int, data: bytes) -> None:
        while data:
            offset %= self.size
            page, start = divmod(offset, PAGE)
            part = data[: PAGE - start]
            self.pages[page][start : start + len(part)] = part
            offset += len(part)
            data = data[len(part) :]

    def read_packet(self) -> bytes | None:
        write, read = self.words[0], self.words[1]
        if write == read:
            return None
        length = struct.unpack("<H", self.get(read + 4, 2))[0] * 8
        packet = self.get(read, length)
        assert self.get(read + length, 8) == struct.pack("<Q", read << 32)
        self.words[1] = (read + length + 8) % self.size
        return packet

    @property
    def room(self) -> int:
        return self.size - (self.words[0] - self.words[1]) % self.size

    def write_packet(self, packet: bytes) -> None:
        write = self.words[0]
        assert self.room > len(packet) + 8
        self.put(write, packet + struct.pack("<Q", write << 32))
        self.words[0] = (write + len(packet) + 8) % self.size


class Channel:
    """An open channel of the host."""

    def __init__(self, host: Host, offer: OfferChannel, pfns: list[int], split: int, vp: int):
        views = [host.machine.view(pfn * PAGE, PAGE) for pfn in pfns]
        self.host = host
        self.offer = offer
        self.vp = vp
        self.incoming = Ring(views[:split])
        self.outgoing = Ring(views[split:])
        self.serving = True
        self.mute = False
        self.received: list[bytes] = []

    def drain(self) -> None:
        while self.serving:
            self.outgoing.words[3] = 600
            if self.outgoing.room <= 600:
                return  # until the guest says that there is room
            self.outgoing.words[3] = 0
            packet = self.incoming.read_packet()
            if packet is None:
                return
            self.received.append(packet)
            self.host.on_packet(self, packet)

    def send(self, kind: int, payload: bytes, tid: int = 0, flags: int = 0) -> None:
        payload += bytes(-len(payload) % 8)
        descriptor = struct.pack("<HHHHQ", kind, 2, 2 + len(payload) // 8, flags, tid)
        self.write(descriptor + payload)

    def write(self, packet: bytes) -> None:
        was_empty = self.outgoing.words[0] == self.outgoing.words[1]
        self.outgoing.write_packet(packet)
        if was_empty and not self.outgoing.words[2]:
            self.announce()

    def announce(self) -> None:
        if self.mute:
            return
        flag = self.offer.relid
        version = self.host.version
        if version is not None and version < Version.V2_4:
            page = self.host.machine.view(self.host.interrupt_page, PAGE)
            page[flag // 8] |= 1 << flag % 8
            flag = 0
        self.host.machine.set_flag(flag, self.vp)


class Host:
    """The control plane of a well-behaved host."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.supported = set(Version)
        self.features = Feature(0)
        self.offers: list[OfferChannel] = []
        self.version: Version | None = None
        self.in_force = Feature(0)
        self.interrupt_page = 0
        self.monitor_page = 0
        self.gpadls: dict[int, tuple[int, list[int]]] = {}
        self.partial: dict[int, tuple[int, int, bytes]] = {}
        self.surplus_bodies = 0
        self.channels: dict[int, Channel] = {}
        self.log: list[Any] = []
        self.raw: list[tuple[int, bytes]] = []
        self.handlers: dict[str, Callable[[Any], object]] = {}
        self.ports = {1, 4}
        self.on_packet: Callable[[Channel, bytes], None] = echo
        self.signals: list[int] = []

    def send(self, raw: bytes | Message, vp: int = 0) -> None:
        if isinstance(raw, Message):
            raw = build_message(raw, version=self.version or Version.V2_4, features=self.in_force)
        self.machine.deliver(raw, vp)

    def names(self) -> list[str]:
        return [item.NAME for item in self.log]

    def offer_sub_channels(
        self, primary: OfferChannel, count: int, *, first: int = 1, class_id: UUID | None = None
    ) -> None:
        """Offer sub-channels of a device; number 1 has relid 10."""
        for index in range(first, first + count):
            new = offer(
                9 + index,
                class_id=class_id or primary.class_id,
                instance_id=primary.instance_id,
                subchannel_index=index,
            )
            self.offers.append(new)
            self.send(new)

    def rescind(self, relid: int) -> None:
        """Take an offer away."""
        self.send(message(2, relid))

    def posted(self, connection: int, raw: bytes) -> None:
        assert connection in self.ports
        self.raw.append((connection, raw))
        item = parse_message_untrusted(
            raw,
            direction=Direction.GUEST_TO_HOST,
            version=self.version or Version.V2_4,
            features=self.in_force,
        )
        self.log.append(item)
        handler = self.handlers.get(item.NAME, getattr(self, f"on_{item.NAME.lower()}", None))
        assert handler is not None, item
        handler(item)

    def on_initiate_contact(self, item) -> None:
        self.gpadls.clear()
        self.channels.clear()
        connection = self.raw[-1][0]
        accepted = item.version in self.supported
        self.version = Version(item.version) if accepted else None
        features = self.features & item.feature_flags if item.version >= 0x60000 else Feature(0)
        self.in_force = features
        self.interrupt_page = item.interrupt_page
        self.monitor_page = item.monitor_page_2
        words = [int(accepted), connection]
        if item.version >= 0x60000 and accepted:
            words.append(features)
        self.send(message(15, *words))

    def on_requestoffers(self, item) -> None:
        for each in self.offers:
            self.send(each)
        self.send(message(4))

    def on_gpadl_header(self, item) -> None:
        self.partial[item.gpadl] = (item.relid, item.range_buflen, b"")
        # 26 page numbers fit; a message of 240 bytes has 4 bytes of junk behind them.
        self.add_ranges(item.gpadl, item.data[: 8 + 26 * 8])

    def on_gpadl_body(self, item) -> None:
        self.add_ranges(item.gpadl, item.data)

    def add_ranges(self, gpadl: int, data: bytes) -> None:
        if gpadl in self.gpadls:
            self.surplus_bodies += 1  # OpenBSD and NetBSD go on when it is complete
            return
        relid, size, have = self.partial.pop(gpadl)
        have = (have + data)[:size]
        if len(have) < size:
            self.partial[gpadl] = relid, size, have
            return
        count = (size - 8) // 8
        self.gpadls[gpadl] = relid, list(struct.unpack_from(f"<{count}Q", have, 8))
        self.send(message(10, relid, gpadl, 0))

    def on_openchannel(self, item) -> None:
        self.open(item)
        self.send(message(6, item.relid, item.open_id, 0))

    def open(self, item) -> Channel:
        target = next(each for each in self.offers if each.relid == item.relid)
        _, pfns = self.gpadls[item.ring_gpadl]
        channel = Channel(self, target, pfns, item.downstream_page_offset, item.target_vp)
        self.channels[item.relid] = channel
        return channel

    def on_closechannel(self, item) -> None:
        self.channels.pop(item.relid, None)

    def on_gpadl_teardown(self, item) -> None:
        del self.gpadls[item.gpadl]
        self.send(message(12, item.gpadl))

    def on_modifychannel(self, item) -> None:
        self.channels[item.relid].vp = item.target_vp
        if self.version is not None and self.version >= Version.V5_3:
            self.send(message(24, item.relid, 0))

    def on_relid_released(self, item) -> None:
        self.offers = [each for each in self.offers if each.relid != item.relid]

    def on_unload(self, item) -> None:
        self.version = None
        self.channels.clear()
        self.send(message(17))

    def signalled(self, connection: int) -> None:
        self.signals.append(connection)
        if connection == 2:
            self.drain_all()
            return
        for channel in list(self.channels.values()):
            if channel.offer.connection_id == connection:
                channel.drain()
                return
        raise AssertionError(f"signal on {connection:#x}")

    def drain_all(self) -> None:
        for channel in list(self.channels.values()):
            channel.drain()


def echo(channel: Channel, packet: bytes) -> None:
    """Complete each request with its own payload."""
    kind, offset8, _, flags, tid = struct.unpack_from("<HHHHQ", packet)
    if kind != 11 and flags & 1:
        channel.send(11, packet[offset8 * 8 :], tid)


@contextlib.contextmanager
def holding(channel: Channel) -> Iterator[None]:
    """Keep the host from reading a channel for a while."""
    channel.serving = False
    yield
    channel.serving = True
    channel.drain()


async def cancelled(call, *arguments, **options) -> None:
    """Start a call and cancel it once it waits for something."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(call, *arguments, **options))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def poll_monitor(machine: Machine) -> None:
    """Be the host that looks at monitor page 2 every now and then."""
    while True:
        await trio.sleep(LOOK)
        page = machine.view(machine.host.monitor_page, 4096).cast("I")
        if page[2]:
            page[2] = 0
            machine.host.drain_all()
