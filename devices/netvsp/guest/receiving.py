"""The receive buffer: what the device puts there, and giving it back.

A packet from the host names pieces of the buffer, each with one RNDIS message. All checks are made
where the interrupt arrives; completions go out from a task of their own, as from a NAPI poll.

Sources: linux/drivers/net/hyperv/netvsc.c (``netvsc_receive``, ``send_recv_completions``) and
rndis_filter.c (``rndis_filter_receive_data``: coalesced segments), freebsd/sys/dev/hyperv/netvsc/
if_hn.c (``hn_nvs_handle_rxbuf``), openbsd/sys/dev/pv/if_hvn.c (``hvn_rndis_input``), dpdk/drivers/
net/netvsc/hn_rxtx.c (``hn_nvs_handle_rxbuf``, ``hn_rx_buf_init``), mu_msvm/MsvmPkg/NetvscDxe
(``NetvscReceiveCallback``, ``NetvscReceive``) and EmclDxe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum, auto

import trio

from netvsp.guest.frames import GuestFrame
from netvsp.guest.habits import NetworkHabits
from netvsp.guest.messages import Packet, check_frame, check_header, check_packet
from netvsp.guest.replies import strictly
from netvsp.guest.shared import Counters, SharedBuffer
from netvsp.wire import nvsp, ppi, rndis
from vmbus.guest import GuestChannel, Incoming
from vmbus.guest.machine import Panic
from vmbus.wire.packets import (
    COMPLETION,
    FLAG_COMPLETION_REQUESTED,
    RANGES_OFFSET,
    parse_transfer_pages_untrusted,
)

_MAX_RANGES = 562
"""NVSP_RSC_MAX: of one packet, and parts of one coalesced segment."""
BACKLOG = 4096
"""Frames that nobody has taken; then the oldest is dropped, as in a guest's network stack."""
_LONGEST = 14 + 4 + 65535
"""Bytes of a coalesced frame."""
_COMPLETED = nvsp.build_rndis_packet_complete(nvsp.SUCCESS)
Token = tuple[int, int]
"""Number of a channel, and the transaction id of a packet that came on it."""


class Expecting(Enum):
    """Whether frames may come."""

    NEVER_YET = auto()
    FRAMES = auto()
    NO_MORE = auto()
    """They are dropped: some may have been on their way when the filter was cleared."""


class Receiver:
    """The receiving half of an adapter.

    Args:
        habits: What the driver does in its own way.
        panic: Called when the host breaks a rule.
        counters: Of the adapter.
        channels: Its open channels by number; the adapter adds to it.
        on_control: Takes an RNDIS message that is no frame, and the number of its channel; it is
            called in the interrupt.
    """

    def __init__(
        self,
        habits: NetworkHabits,
        panic: Panic,
        counters: Counters,
        channels: Mapping[int, GuestChannel],
        on_control: Callable[[bytes, int], None],
    ) -> None:
        self.buffer: SharedBuffer | None = None
        self.section = nvsp.ReceiveSection(0, 0, 0, 0, 0, 0)
        self.expecting = Expecting.NEVER_YET
        self.allowed: frozenset[int] = frozenset({0})
        """Numbers of the channels on which frames may come."""
        self.max_frame = 1514
        """Bytes, a tag within the frame included."""
        self.takes_tags = False
        """The driver has said that tags may come beside the frame."""
        self.coalesces = False
        """The driver has asked for coalesced segments."""
        self.frames: deque[GuestFrame] = deque()
        """Received, and not yet taken with :meth:`receive`."""
        self.holding = False
        self.held: list[Token] = []
        """Packets that :meth:`release` is to complete, in the order in which they came."""
        self._habits = habits
        self._panic = panic
        self._counters = counters
        self._channels = channels
        self._on_control = on_control
        self._untaken: dict[int, Token] = {}
        """By the identity of a frame in the queue: what is completed when it is taken."""
        self._owners: dict[int, Token] = {}
        """By number of a sub-allocation: the packet that uses it."""
        self._outstanding: dict[Token, list[int]] = {}
        """Sub-allocations of each packet that is not completed."""
        self._parts: dict[int, list[Packet]] = {}
        """By channel: parts of a coalesced segment that is not whole yet."""
        self._ready: deque[Token] = deque()
        self._wanted = trio.Event()
        self._arrived = trio.lowlevel.ParkingLot()
        self._idle = trio.lowlevel.ParkingLot()
        self._error: Exception | None = None

    @property
    def outstanding(self) -> int:
        """Packets that are not completed."""
        return len(self._outstanding)

    # ------------------------------------------------------------------------------- incoming

    def packet(self, channel: int, packet: Incoming) -> None:
        """Take a transfer-page packet, in the interrupt. Cannot block.

        Args:
            channel: Number of the channel it came on.
            packet: It.
        """
        ranges = self._check_packet(packet)
        token = (channel, packet.transaction_id)
        self._claim(token, ranges)
        self._counters.packets += 1
        assert self.buffer is not None
        first: GuestFrame | None = None
        for position, (size, offset) in enumerate(ranges, 1):
            message = self.buffer.read(offset, size)
            frame = self._message(message, channel, last=position == len(ranges))
            first = first or frame
        if self._habits.completes_when_taken and first is not None:
            self._untaken[id(first)] = token
        else:
            self._finish(token)

    def _check_packet(self, packet: Incoming) -> list[tuple[int, int]]:
        """Check all but the messages; return the ranges as ``(byte_count, byte_offset)``."""
        habits, panic = self._habits, self._panic
        if self.buffer is None:
            panic("a transfer-page packet without a receive buffer")
        message = strictly(panic, nvsp.parse_type_untrusted, packet.payload)
        if message != nvsp.SEND_RNDIS_PACKET:
            name = nvsp.MESSAGE_NAMES.get(message, str(message))
            panic(f"NVSP {name} in a transfer-page packet: netvsc_receive drops it")
        strictly(panic, nvsp.parse_rndis_packet_untrusted, packet.payload)
        set_id, ranges = strictly(
            panic,
            parse_transfer_pages_untrusted,
            packet.data,
            packet.payload_offset,
            max_ranges=_MAX_RANGES,
        )
        if habits.checks_set_id and set_id != habits.receive_id:
            panic(f"transfer-page packet: set id {set_id:#x} is not {habits.receive_id:#x}")
        if habits.exact_header and (
            not ranges or packet.payload_offset != RANGES_OFFSET + 8 * len(ranges)
        ):
            panic(
                f"transfer-page packet: {len(ranges)} ranges in a header of "
                f"{packet.payload_offset} bytes: FAIL_FAST_UNEXPECTED_HOST_BEHAVIOR"
            )
        if not packet.flags & FLAG_COMPLETION_REQUESTED:
            panic("transfer-page packet: no completion wanted, but every driver sends one")
        if habits.ids_are_indexes and packet.transaction_id >= self.section.sub_alloc_count:
            panic(
                f"transfer-page packet: transaction id {packet.transaction_id:#x} with "
                f"{self.section.sub_alloc_count} sub-allocations: hn_nvs_handle_rxbuf drops it or "
                "writes behind the end of a table"
            )
        return ranges

    def _claim(self, token: Token, ranges: list[tuple[int, int]]) -> None:
        """See that the ranges are the device's to use, and note that they are in use."""
        panic, section = self._panic, self.section
        if token in self._outstanding:
            panic(f"transaction id {token[1]:#x} on channel {token[0]} is not completed yet")
        used: list[int] = []
        end = 0
        for size, offset in sorted(ranges, key=lambda each: each[1]):
            if not size or offset + size > section.sub_alloc_size * section.sub_alloc_count:
                panic(f"receive buffer: {size} bytes at {offset} are in no sub-allocation")
            if self._habits.one_sub_allocation and size > section.sub_alloc_size:
                panic(
                    f"receive buffer: {size} bytes, a sub-allocation has {section.sub_alloc_size}: "
                    "netvsc_receive drops it"
                )
            if offset < end:
                panic(f"receive buffer: two ranges have bytes from {offset} on")
            end = offset + size
            for number in range(
                offset // section.sub_alloc_size, (end - 1) // section.sub_alloc_size + 1
            ):
                owner = self._owners.get(number)
                if owner is not None and owner != token:
                    panic(
                        f"receive buffer: sub-allocation {number} is used again before packet "
                        f"{owner[1]:#x} of channel {owner[0]} is completed"
                    )
                self._owners[number] = token
                used.append(number)
        self._outstanding[token] = used

    def _message(self, whole: bytes, channel: int, *, last: bool) -> GuestFrame | None:
        """Take one RNDIS message; return a frame if one is complete with it."""
        kind, length = check_header(whole, self._panic)
        if kind == rndis.PACKET:
            return self._packet(check_packet(whole[:length], self._panic), channel, last=last)
        if channel in self._parts:
            self._panic("a coalesced segment is interrupted by a control message")
        self._on_control(whole[:length], channel)
        return None

    def _packet(self, packet: Packet, channel: int, *, last: bool) -> GuestFrame | None:
        panic = self._panic
        if self.expecting is Expecting.NEVER_YET:
            panic("a frame before the packet filter was set")
        if channel not in self.allowed:
            panic(f"a frame on channel {channel}, which receive-side scaling does not name")
        word = packet.items.get(ppi.PACKET_ID)
        flags = 0 if word is None else word >> 8 & 0xFF
        parts = self._parts.get(channel)
        if not flags & ppi.FRAGMENT_SUB_ALLOCATION:
            if parts is not None:
                panic("a frame between the parts of a coalesced segment, which is dropped")
            return self._deliver([packet], channel)
        if not self.coalesces:
            panic("a part of a coalesced segment: the driver has not asked for them")
        if flags & ppi.FRAGMENT_FIRST:
            if parts is not None:
                panic("a coalesced segment begins before the last one ends, which is dropped")
            parts = self._parts[channel] = []
        elif parts is None:
            panic("a coalesced segment without its first part: rndis_filter_receive_data drops it")
        parts.append(packet)
        if flags & ppi.FRAGMENT_LAST:
            del self._parts[channel]
            return self._deliver(parts, channel)
        if last:
            panic("a coalesced segment ends with its packet, without its last part")
        return None

    def _deliver(self, parts: list[Packet], channel: int) -> GuestFrame | None:
        if self.expecting is Expecting.NO_MORE:
            self._counters.late += 1
            return None
        data = b"".join(part.data for part in parts)
        items = parts[0].items
        check_frame(data, self.max_frame if len(parts) == 1 else _LONGEST, self._panic)
        tag = items.get(ppi.VLAN)
        if tag is not None and not (self.takes_tags and self._habits.reads_items):
            self._panic("a tag beside the frame: the driver has not asked for it and loses it")
        frame = GuestFrame(
            data=data,
            channel=channel,
            vlan=None if tag is None else ppi.unpack_vlan(tag),
            checksum=items.get(ppi.CHECKSUM),
            hash_value=items.get(ppi.HASH_VALUE),
            fragments=len(parts),
        )
        self._counters.received += 1
        self._counters.received_bytes += len(data)
        if len(self.frames) >= BACKLOG:
            self._take()
            self._counters.dropped += 1
        self.frames.append(frame)
        self._arrived.unpark()
        return frame

    async def receive(self) -> GuestFrame:
        """Wait for the next frame and take it. A checkpoint.

        Raises:
            trio.ClosedResourceError: The adapter was closed.
            trio.BrokenResourceError: The host has taken it away.
        """
        await trio.lowlevel.checkpoint()
        while not self.frames:
            if self._error is not None:
                raise self._error
            await self._arrived.park()
        return self._take()

    def _take(self) -> GuestFrame:
        frame = self.frames.popleft()
        token = self._untaken.pop(id(frame), None)
        if token is not None:
            self._finish(token)
        return frame

    # ----------------------------------------------------------------------------- completing

    def _finish(self, token: Token) -> None:
        """The driver is done with a packet."""
        if self.holding:
            self.held.append(token)
            return
        self._ready.append(token)
        self._wanted.set()

    def hold(self) -> None:
        """Complete no packets from now on. Cannot block."""
        self.holding = True

    def release(self, *positions: int) -> None:
        """Complete packets that are held. Cannot block.

        Args:
            positions: Which of :attr:`held`, in the order in which they are to be completed; none:
                all of them, and hold no more.
        """
        chosen = [self.held[position] for position in positions] if positions else self.held
        self.held = [token for token in self.held if token not in chosen]
        if not positions:
            self.holding = False
        self._ready.extend(chosen)
        self._wanted.set()

    async def run(self) -> None:
        """Send completions until the adapter ends."""
        while self._error is None:
            await self._wanted.wait()
            self._wanted = trio.Event()
            while self._ready and self._error is None:
                await self._complete(self._ready.popleft())

    async def _complete(self, token: Token) -> None:
        number, transaction_id = token
        # First: as soon as it stands in the ring the host may use the memory again.
        for each in self._outstanding.pop(token):
            if self._owners.get(each) == token:
                del self._owners[each]
        payload = _COMPLETED.ljust(self._habits.completion_size, b"\0")
        try:
            await self._channels[number].send(
                payload, transaction_id=transaction_id, kind=COMPLETION
            )
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            return
        self._counters.completed += 1
        if not self._outstanding:
            self._idle.unpark_all()

    async def wait_completed(self) -> None:
        """Wait until all packets are completed. A checkpoint if one is not."""
        while self._outstanding and self._error is None:
            await self._idle.park()

    def end(self, error: Exception) -> None:
        """Let those who wait for a frame raise ``error``, once there are no more. Cannot block."""
        self._error = error
        self._wanted.set()
        self._arrived.unpark_all()
        self._idle.unpark_all()
