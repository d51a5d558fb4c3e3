"""An open channel, as a driver sees it: requests with transaction ids, and their completions.

Incoming packets are handled where the interrupt arrives, in one go until the ring is empty, as
Linux's tasklet does; a completion wakes the task that waits for it. A completion that belongs to
no request crashes the guest: FreeBSD and older Linux would follow its transaction id as a pointer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from vmbus.errors import LocalProtocolError
from vmbus.guest.machine import Panic
from vmbus.guest.personality import FullRing, Masking, Personality, TransactionIds
from vmbus.guest.ring import Incoming, InRing, OutRing
from vmbus.wire.messages import OfferChannel
from vmbus.wire.packets import (
    COMPLETION,
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    FLAG_COMPLETION_REQUESTED,
    IN_BAND,
    TRAILER_SIZE,
    build_packet,
)

_RETRY_SECONDS = 0.003
"""A blocked sender looks again this often; linux/block requeues after 3 ms."""
_POINTER_BASE = 0xFFFF_F800_0420_0000
_POINTER_STEP = 0x180


class Ids:
    """Transaction ids in a personality's style; see :class:`TransactionIds`."""

    def __init__(self, style: TransactionIds) -> None:
        self._counts = style is TransactionIds.COUNTER
        self._base, self._step = {
            TransactionIds.COUNTER: (1, 1),
            TransactionIds.TAG: (1, 1),
            TransactionIds.POINTER: (_POINTER_BASE, _POINTER_STEP),
            TransactionIds.HIGH_INDEX: (1 << 32, 1 << 32),
            TransactionIds.INDEX: (0, 1),
        }[style]
        self._next = 0
        self._free: list[int] = []

    def take(self) -> int:
        """Return an id that is not in use."""
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._base + (self._next - 1) * self._step

    def release(self, transaction_id: int) -> None:
        """Give an id back; counting styles never use it again."""
        if not self._counts:
            self._free.append(transaction_id)


class _Request:
    """One request in flight."""

    __slots__ = ("abandoned", "error", "from_pool", "release", "reply", "task")

    def __init__(self, release: Callable[[], None] | None, *, from_pool: bool) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.reply: Incoming | None = None
        self.error: Exception | None = None
        self.release = release
        self.from_pool = from_pool
        self.abandoned = False
        """The caller has been cancelled while the host was at it."""

    def wake(self) -> None:
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None

    def abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        # At once: a completion may come before the task runs, and must not wake it again.
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED


class GuestChannel:
    """An open channel; made by :meth:`vmbus.guest.connection.Connection.open_channel`.

    Args:
        offer: What it was opened from.
        personality: Whose habits to follow.
        panic: Called when the host breaks a rule.
        outgoing: Ring to the host.
        incoming: Ring from the host.
        signal: Rings the host's doorbell for this channel.
        target_vp: VP that is interrupted.
    """

    def __init__(
        self,
        *,
        offer: OfferChannel,
        personality: Personality,
        panic: Panic,
        outgoing: OutRing,
        incoming: InRing,
        signal: Callable[[], Awaitable[None]],
        target_vp: int,
    ) -> None:
        self.offer = offer
        self.relid = offer.relid
        self.target_vp = target_vp
        self.vps = {target_vp}
        """VPs whose interrupts may announce this channel: it may have moved."""
        self.on_packet: Callable[[Incoming], None] | None = None
        """Called for each packet that is no completion, in the interrupt: it must not block.

        Without it they wait for :meth:`receive_batch`.
        """
        self.on_removed: Callable[[], None] | None = None
        """Called once when the host has taken the channel away."""
        self.interrupts = 0
        """Times the host has announced packets."""
        self.signals = 0
        """Times the host was signalled."""
        self._personality = personality
        self._panic = panic
        self._out = outgoing
        self._in = incoming
        self._signal = signal
        self._ids = Ids(personality.transaction_ids)
        self._requests: dict[int, _Request] = {}
        self._inbox: list[Incoming] = []
        self._arrival = trio.lowlevel.ParkingLot()
        self._progress = trio.lowlevel.ParkingLot()
        self._blocked = 0
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<GuestChannel {self.relid}.{self.offer.subchannel_index}>"

    @property
    def outstanding(self) -> int:
        """Requests that the host has not completed."""
        return len(self._requests)

    @property
    def has_packets(self) -> bool:
        """Whether the incoming ring holds unread packets."""
        return self._error is None and not self._in.empty

    @property
    def all_read(self) -> bool:
        """Whether the host has read everything that was sent."""
        return self._out.empty

    # ------------------------------------------------------------------------------- sending

    async def request(
        self,
        payload: bytes,
        *,
        kind: int = IN_BAND,
        header: bytes = b"",
        transaction_id: int | None = None,
        release: Callable[[], None] | None = None,
    ) -> Incoming:
        """Send a packet that wants a completion and wait for it. A checkpoint.

        Args:
            payload: Behind the headers; padded to 8 bytes.
            kind: Packet type.
            header: Between descriptor and payload, a multiple of 8 bytes: the GPA ranges.
            transaction_id: Instead of one in the personality's style.
            release: Called once if this method raises, when the memory that the request names
                is the caller's again: at once if the host has not seen it, else (a request
                cannot be taken back) with its completion. Never if the channel ends first.

        Returns:
            The completion.

        Raises:
            LocalProtocolError: The transaction id is in flight already.
            trio.ClosedResourceError: You closed the channel.
            trio.BrokenResourceError: The host has taken it away.
            GuestPanic: The host broke a rule.
        """
        ids = self._ids
        identity = ids.take() if transaction_id is None else transaction_id
        if identity in self._requests:
            raise LocalProtocolError(f"transaction id {identity:#x} is in flight already")
        request = _Request(release, from_pool=transaction_id is None)
        offset8 = (DESCRIPTOR_SIZE + len(header)) >> 3
        padding = -len(payload) % 8
        length8 = offset8 + (len(payload) + padding >> 3)
        descriptor = DESCRIPTOR.pack(kind, offset8, length8, FLAG_COMPLETION_REQUESTED, identity)
        packet = b"".join((descriptor, header, payload, bytes(padding)))
        self._requests[identity] = request
        try:
            await self._append(packet)
        except BaseException:
            if self._requests.get(identity) is request:
                self._forget(identity)
            if release is not None:
                release()
            raise
        try:
            if self._out.commit():
                await self.signal()
            if request.reply is None and request.error is None:
                request.task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(request.abort)
        except BaseException:
            if request.reply is None:
                request.abandoned = True
            elif request.release is not None:
                request.release()
            raise
        if request.reply is None:
            assert request.error is not None
            raise request.error
        return request.reply

    async def send(self, payload: bytes, *, transaction_id: int = 0, kind: int = IN_BAND) -> None:
        """Send a packet that wants no completion, or is one itself. May be a checkpoint.

        Raises:
            trio.ClosedResourceError: You closed the channel.
            trio.BrokenResourceError: The host has taken it away.
        """
        await self.send_packet(build_packet(kind, payload, transaction_id=transaction_id))

    async def complete(self, packet: Incoming, payload: bytes = b"") -> None:
        """Send the completion of a packet from the host. May be a checkpoint."""
        await self.send(payload, transaction_id=packet.transaction_id, kind=COMPLETION)

    async def send_packet(self, packet: bytes) -> None:
        """Send ready-made bytes, well-formed or not. May be a checkpoint.

        Args:
            packet: Descriptor and all, a multiple of 8 bytes.
        """
        await self._append(packet)
        if self._out.commit():
            await self.signal()

    async def _append(self, packet: bytes) -> None:
        """Write into the outgoing ring, waiting for room in the personality's way."""
        if self._error is not None:
            raise self._error
        if self._out.append(packet):
            return
        habit = self._personality.full_ring
        need = len(packet) + TRAILER_SIZE
        self._blocked += 1
        try:
            while True:
                if habit is FullRing.PENDING_SIZE:
                    self._out.want_room(need)
                elif habit is FullRing.SIGNAL_AGAIN:
                    await self.signal()
                if self._error is not None:
                    raise self._error
                if self._out.append(packet):
                    return
                if habit is FullRing.PENDING_SIZE:
                    await self._progress.park()
                else:
                    with trio.move_on_after(_RETRY_SECONDS):
                        await self._progress.park()
        finally:
            self._blocked -= 1
            if habit is FullRing.PENDING_SIZE and not self._blocked:
                self._out.want_room(0)

    async def signal(self) -> None:
        """Ring the host's doorbell for this channel. May be a checkpoint."""
        self.signals += 1
        self._out.count_signal()
        await self._signal()

    # ----------------------------------------------------------------------------- receiving

    def interrupted(self) -> bool:
        """Handle everything that is in the incoming ring. Cannot block.

        Returns:
            Whether the host waits for the room this has made and has to be signalled.

        Raises:
            GuestPanic: The host broke a rule.
        """
        self.interrupts += 1
        must_signal = False
        if self._error is None:
            while True:
                self._in.mask()
                packets, wanted = self._in.read_batch()
                must_signal |= wanted
                for packet in packets:
                    if packet.kind == COMPLETION:
                        self._completed(packet)
                    elif self.on_packet is not None:
                        self.on_packet(packet)
                    else:
                        self._inbox.append(packet)
                if self._error is not None or not self._in.unmask():
                    break
        if self._inbox:
            self._arrival.unpark_all()
        if self._blocked:
            self._progress.unpark_all()
        return must_signal

    async def receive_batch(self) -> list[Incoming]:
        """Wait for packets that are no completions; return all that are there. A checkpoint.

        Raises:
            trio.ClosedResourceError: You closed the channel.
            trio.BrokenResourceError: The host has taken it away.
        """
        await trio.lowlevel.checkpoint()
        while not self._inbox:
            if self._error is not None:
                raise self._error
            await self._arrival.park()
        packets, self._inbox = self._inbox, []
        return packets

    def _completed(self, packet: Incoming) -> None:
        request = self._requests.get(packet.transaction_id)
        if request is None:
            self._panic(
                f"channel {self.relid}: completion with transaction id "
                f"{packet.transaction_id:#x}, which is not in flight"
            )
        request.reply = packet
        self._forget(packet.transaction_id)
        if request.abandoned and request.release is not None:
            request.release()
        request.wake()

    def _forget(self, identity: int) -> None:
        if self._requests.pop(identity).from_pool:
            self._ids.release(identity)

    # --------------------------------------------------------------------------------- ending

    def end(self, error: Exception) -> None:
        """Let every waiting and later call raise ``error``; the first call counts."""
        if self._error is not None:
            return
        self._error = error
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.error = error
            request.wake()
        self._progress.unpark_all()
        self._arrival.unpark_all()

    @property
    def polled(self) -> bool:
        """Whether the driver polls the incoming ring instead of being interrupted."""
        return self._personality.masking is Masking.ALWAYS
