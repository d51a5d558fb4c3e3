"""The storage driver: handshake, sub-channels, SCSI commands, notifications.

Sources: linux/drivers/scsi/storvsc_drv.c (``storvsc_channel_init``), freebsd/sys/dev/hyperv/
storvsc/hv_storvsc_drv_freebsd.c, openbsd/sys/dev/pv/hvs.c, mu_msvm/MsvmPkg/StorvscDxe.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import trio

from storvsp.guest.habits import HABITS, StorageHabits
from storvsp.guest.replies import Kind, Result, check_answer, check_length, check_srb_reply
from storvsp.wire import (
    BEGIN_INITIALIZATION,
    CREATE_SUB_CHANNELS,
    DATA_IN,
    DATA_NONE,
    DATA_OUT,
    END_INITIALIZATION,
    ENUMERATE_BUS,
    EVENT_NOTIFICATION,
    FCHBA_DATA,
    MAX_SENSE,
    OPERATION_NAMES,
    PACKET_SIZE,
    PROPERTY_MULTI_CHANNEL,
    QUERY_PROPERTIES,
    QUERY_PROTOCOL_VERSION,
    REMOVE_DEVICE,
    RESET_BUS,
    SHORT_MAX_SENSE,
    SHORT_PACKET_SIZE,
    SRB_AUTOSENSE_VALID,
    SRB_FLAG_DATA_IN,
    SRB_FLAG_DATA_OUT,
    VERSION_4_2,
    FibreChannelData,
    Packet,
    Properties,
    build_packet,
    build_protocol_version,
    build_srb,
    build_sub_channels,
    parse_fibre_channel_untrusted,
    parse_properties_untrusted,
    parse_protocol_version_untrusted,
)
from vmbus.errors import STATUS_REVISION_MISMATCH, VMBusError
from vmbus.guest import Buffer, BufferPool, Driver, Guest, GuestChannel, Incoming
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.guids import CLASS_FIBRE_CHANNEL
from vmbus.wire.messages import OfferChannel
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED, GPA_DIRECT, IN_BAND

_SRB_FLAGS = {DATA_OUT: SRB_FLAG_DATA_OUT, DATA_IN: SRB_FLAG_DATA_IN, DATA_NONE: 0}
_NOTIFICATIONS = frozenset({ENUMERATE_BUS, REMOVE_DEVICE, EVENT_NOTIFICATION})
_MAX_SANE_TRANSFER = 128 << 20
"""Linux keeps the number of pages in 16 bits."""
_MIN_SANE_TRANSFER = 64 << 10
_agreed_sizes: WeakKeyDictionary[Guest, int] = WeakKeyDictionary()
"""Bytes of vstor packets that a guest's last controller has agreed on."""


class AttachError(VMBusError):
    """The driver and the controller have no protocol version in common, or it refuses a step."""


class StorvscAdapter(Driver):
    """A storage controller as its driver sees it; made by :func:`attach`.

    Args:
        guest: Whose driver this is.
        offer: The controller's primary channel.
        habits: What the driver does in its own way.
        contiguous: False scatters the pages of rings and data over the RAM.
        queue_depth: Requests in flight per channel; None: as the habits say.
    """

    def __init__(
        self,
        guest: Guest,
        offer: OfferChannel,
        habits: StorageHabits,
        *,
        contiguous: bool,
        queue_depth: int | None,
    ) -> None:
        super().__init__(
            guest,
            offer,
            ring_pages=habits.ring_pages,
            queue_depth=queue_depth or habits.queue_depth,
            contiguous=contiguous,
            on_packet=self._notification,
        )
        self.habits = habits
        self.version = 0
        """Protocol version, major << 8 | minor."""
        self.properties = Properties(0, 0, 0)
        self.fibre_channel: FibreChannelData | None = None
        """Port names, if this is a Fibre Channel adapter."""
        self.max_transfer = 0
        """Bytes per request that the driver will ask for."""
        self.on_rescan: Callable[[], None] | None = None
        """Called in the interrupt when the host wants the bus to be scanned again."""
        self.notifications: list[int] = []
        """Operations of all notifications, in order."""
        self.on_resize: Callable[[int, int, int], None] | None = None
        """Called with path, target and LUN when the driver notices that a disk has a new size."""
        self._panic = guest.panic
        self._pool = BufferPool(guest.ram, contiguous=contiguous)
        self._size = habits.init_size
        if habits.size_outlives:
            self._size = _agreed_sizes.get(guest, habits.init_size)
        self._ready = False
        """The handshake is over."""
        self._sense_room = MAX_SENSE
        self._tag = 0
        self._notified = trio.lowlevel.ParkingLot()

    # ----------------------------------------------------------------------------- handshake

    async def start(self, sub_channels: int | None) -> None:
        """Open the channel, shake hands, open the sub-channels. A checkpoint."""
        await self.open()
        self._demand(await self._command(BEGIN_INITIALIZATION), "BEGIN_INITIALIZATION")
        await self._agree()
        await self._query_properties()
        if self.offer.class_id == CLASS_FIBRE_CHANNEL:
            answer = self._demand(await self._command(FCHBA_DATA), "FCHBA_DATA")
            self.fibre_channel = parse_fibre_channel_untrusted(answer.body)
        self._demand(await self._command(END_INITIALIZATION), "END_INITIALIZATION")
        count = self._wanted_sub_channels(sub_channels)
        if count:
            await self._create_sub_channels(count)
        self._ready = True

    async def _command(self, operation: int, body: bytes = b"") -> Packet:
        payload = build_packet(operation, body, size=self._size)
        packet = await self.channels[0].request(payload, transaction_id=self.habits.init_id)
        return check_answer(packet, self.habits, self._panic, sent=self._size)

    @staticmethod
    def _demand(answer: Packet, what: str) -> Packet:
        if answer.status:
            raise AttachError(f"{what}: status {answer.status:#x}")
        return answer

    async def _agree(self) -> None:
        exact = self.habits.exact_refusal
        for version in self.habits.versions:
            answer = await self._command(QUERY_PROTOCOL_VERSION, build_protocol_version(version))
            if answer.status:
                if exact and answer.status != STATUS_REVISION_MISMATCH:
                    self._panic(f"QUERY_PROTOCOL_VERSION: refused with {answer.status:#x}")
                continue
            echo, _revision = parse_protocol_version_untrusted(answer.body)
            if exact and echo != version:
                self._panic(f"QUERY_PROTOCOL_VERSION: {version:#x} asked, {echo:#x} echoed")
            self.version = version
            short = version <= VERSION_4_2
            self._sense_room = SHORT_MAX_SENSE if short else MAX_SENSE
            by_version = short and self.habits.sized_by_version
            self._size = SHORT_PACKET_SIZE if by_version else PACKET_SIZE
            _agreed_sizes[self.guest] = self._size
            return
        raise AttachError("the controller refuses all vstor versions of this driver")

    async def _query_properties(self) -> None:
        answer = self._demand(await self._command(QUERY_PROPERTIES), "QUERY_PROPERTIES")
        properties = self.properties = parse_properties_untrusted(answer.body)
        if self.habits.address_from_properties and any(answer.body[:4]):
            self._panic(f"properties: first word {answer.body[:4].hex()}, read as bus and target")
        largest = properties.max_transfer_bytes
        if not _MIN_SANE_TRANSFER <= largest <= _MAX_SANE_TRANSFER or largest % PAGE_SIZE:
            self._panic(f"properties: max_transfer_bytes {largest}")
        self.max_transfer = min(largest, self.habits.max_transfer)

    def _wanted_sub_channels(self, limit: int | None) -> int:
        divisor = self.habits.vps_per_sub_channel
        if divisor is None or not self.properties.flags & PROPERTY_MULTI_CHANNEL:
            return 0
        wanted = (self.guest.machine.vp_count - 1) // divisor if limit is None else limit
        return min(wanted, self.properties.max_channel_count)

    async def _create_sub_channels(self, count: int) -> None:
        answer = await self._command(CREATE_SUB_CHANNELS, build_sub_channels(count))
        self._demand(answer, "CREATE_SUB_CHANNELS")
        await self.open_sub_channels(count)

    # ------------------------------------------------------------------------------ commands

    async def execute(
        self,
        cdb: bytes,
        *,
        write: bytes | None = None,
        read: int = 0,
        path: int = 0,
        target: int = 0,
        lun: int = 0,
        offset: int = 0,
        channel: GuestChannel | None = None,
    ) -> Result:
        """Run any SCSI command. A checkpoint.

        Args:
            cdb: 1 to 16 bytes.
            write: Data for the device.
            read: Bytes wanted from it; not together with ``write``.
            path: Called a channel by Linux.
            target: SCSI target.
            lun: Logical unit.
            offset: Where in the first page the data begins, 0 to 4095.
            channel: Instead of the next one in turn.

        Returns:
            What has become of it; failures are results, too.

        Raises:
            MemoryError: The guest has no pages left for the data.
            trio.BrokenResourceError: The host has taken the controller away.
            trio.ClosedResourceError: The controller was closed.
            GuestPanic: The host broke a rule.
        """
        length = read
        direction = DATA_IN if read else DATA_NONE
        if write:
            length = len(write)
            direction = DATA_OUT
        if channel is None:
            channel = await self.next_channel()
        self._tag = (self._tag + 1) & 0xFF
        srb = build_srb(
            cdb,
            data_in=direction,
            transfer_length=length,
            path=path,
            target=target,
            lun=lun,
            sense_length=self._sense_room,
            queue_tag=self._tag,
            srb_flags=_SRB_FLAGS[direction],
            size=self._size,
        )
        buffer: Buffer | None = None
        if length:
            buffer = self._pool.take(offset + length)
            if write:
                buffer.write(offset, write)
            packet = await channel.request(
                srb,
                kind=GPA_DIRECT,
                header=buffer.header(offset, length),
                release=partial(self._given_up, buffer),
            )
        else:
            packet = await channel.request(srb, kind=IN_BAND, release=self.finished)
        self.finished()
        reply = check_srb_reply(
            packet,
            self.habits,
            self._panic,
            sent=self._size,
            requested=length,
            sense_room=self._sense_room,
        )
        data = b""
        if buffer is not None:
            if read:
                data = buffer.read(offset, reply.transfer_length)
            buffer.release()
        sense = b""
        if reply.srb_status & SRB_AUTOSENSE_VALID:
            sense = reply.sense[: reply.sense_length]
        result = Result(reply.srb_status, reply.scsi_status, sense, reply.transfer_length, data)
        noticed = result.resized and result.srb_status in self.habits.resize_srb
        if noticed and self.on_resize is not None:
            self.on_resize(path, target, lun)
        return result

    def _given_up(self, buffer: Buffer) -> None:
        """The host is done with a request whose caller was cancelled."""
        buffer.release()
        self.finished()

    async def reset_bus(self) -> None:
        """Send RESET_BUS and wait for its answer and for all that was in flight. A checkpoint.

        Raises:
            AttachError: The controller refuses.
            GuestPanic: It answers wrongly.
        """
        payload = build_packet(RESET_BUS, size=self._size)
        packet = await self.channels[0].request(payload, transaction_id=self.habits.reset_id)
        self._demand(check_answer(packet, self.habits, self._panic, sent=len(payload)), "RESET_BUS")
        await self.wait_idle()

    # ------------------------------------------------------------------------- notifications

    def _notification(self, packet: Incoming) -> None:
        """Handle a packet that is no completion, in the interrupt."""
        payload = check_length(packet, Kind.NOTICE, self.habits, self._panic, sent=self._size)
        operation = int.from_bytes(payload[:4], "little")
        name = OPERATION_NAMES.get(operation, str(operation))
        if operation not in _NOTIFICATIONS or packet.kind != IN_BAND:
            self._panic(f"vstor: {name} in a packet of type {packet.kind} that nobody asked for")
        if packet.transaction_id or packet.flags & FLAG_COMPLETION_REQUESTED:
            self._panic(f"vstor: {name} with a transaction id or a completion wanted")
        if self.habits.init_id == 0 and not self._ready:
            self._panic(f"vstor: {name} in the handshake, where id 0 is that of the answers")
        self.notifications.append(operation)
        habits = self.habits
        if self.on_rescan is not None and (
            (operation == ENUMERATE_BUS and habits.rescans_on_enumerate)
            or (operation == REMOVE_DEVICE and habits.rescans_on_remove)
        ):
            self.on_rescan()
        self._notified.unpark_all()

    async def wait_notifications(self, count: int) -> list[int]:
        """Wait until there have been ``count`` notifications in all; return their operations."""
        await trio.lowlevel.checkpoint()
        while len(self.notifications) < count:
            await self._notified.park()
        return self.notifications


async def attach(
    guest: Guest,
    offer: OfferChannel,
    *,
    habits: StorageHabits | None = None,
    sub_channels: int | None = None,
    contiguous: bool = True,
    queue_depth: int | None = None,
) -> StorvscAdapter:
    """Attach the storage driver to an offered controller. A checkpoint.

    Args:
        guest: A connected guest.
        offer: Class SCSI, IDE or Fibre Channel.
        habits: How the driver behaves; None: as that of the guest's personality.
        sub_channels: How many to ask for; None: as many as the habits say.
        contiguous: False scatters the pages of rings and data over the RAM.
        queue_depth: Requests in flight per channel; None: as the habits say.

    Raises:
        KeyError: No ``habits`` are given, and :data:`storvsp.guest.habits.HABITS` has none for the
            personality.
        AttachError: No version in common, or a step of the handshake was refused.
        HostRefusedError: The channel cannot be opened.
        GuestPanic: The host broke a rule.
    """
    if habits is None:
        habits = HABITS[guest.personality.key]
    adapter = StorvscAdapter(guest, offer, habits, contiguous=contiguous, queue_depth=queue_depth)
    await adapter.start(sub_channels)
    return adapter
