"""One life of the controller: from OPEN of its primary channel to the close.

The handshake is a short, strict sequence; a request out of order is answered with
STATUS_INVALID_DEVICE_STATE and the connection lives on. After it, each channel is served by one
long-lived task that drains its ring in batches. A command that needs no waiting is answered on
the spot; only one that does gets a task of its own.

Every request that asks for a completion gets exactly one, on the channel it came from, with its
transaction id; no guest driver has a usable timeout, so a lost answer is a hung guest
(linux/drivers/scsi/storvsc_drv.c: storvsc_eh_timed_out only resets the timer).
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio

from storvsp.fastpath import serve_batch_untrusted
from storvsp.scsi import Command, DataDirection, LogicalUnit, Outcome, absent_unit
from storvsp.wire import (
    BEGIN_INITIALIZATION,
    CREATE_SUB_CHANNELS,
    END_INITIALIZATION,
    ENUMERATE_BUS,
    EXECUTE_SRB,
    MAX_SENSE,
    OPERATION_NAMES,
    PACKET_SIZE,
    QUERY_PROPERTIES,
    QUERY_PROTOCOL_VERSION,
    REQUEST,
    RESET_ADAPTER,
    RESET_BUS,
    RESET_LUN,
    SHORT_MAX_SENSE,
    SRB_AUTOSENSE_VALID,
    SRB_ERROR,
    SRB_INVALID_LUN,
    SRB_INVALID_REQUEST,
    SRB_SUCCESS,
    SUPPORTED_VERSIONS,
    VERSION_4_2,
    VERSION_5_1,
    Packet as VstorPacket,
    Srb,
    build_completion,
    build_packet,
    build_properties,
    build_srb_reply,
    parse_packet_untrusted,
    parse_protocol_version_untrusted,
    parse_srb_untrusted,
    parse_sub_channels_untrusted,
)
from vmbus.channel import Channel
from vmbus.errors import (
    STATUS_INSUFFICIENT_RESOURCES,
    STATUS_INVALID_DEVICE_REQUEST,
    STATUS_INVALID_DEVICE_STATE,
    STATUS_INVALID_PARAMETER,
    STATUS_REVISION_MISMATCH,
    STATUS_SUCCESS,
    BudgetError,
    GuestProtocolError,
    LocalProtocolError,
)
from vmbus.ring import Packet
from vmbus.wire.packets import GPA_DIRECT, IN_BAND, parse_gpa_ranges_untrusted

if TYPE_CHECKING:
    from storvsp.controller import ScsiController

_log = logging.getLogger("storvsp")

STATUS_CHECK_CONDITION = 0x02


class Stage(enum.Enum):
    """How far the handshake has come; each value names what is expected next."""

    BEGIN = "BEGIN_INITIALIZATION"
    VERSION = "QUERY_PROTOCOL_VERSION"
    PROPERTIES = "QUERY_PROPERTIES"
    END = "END_INITIALIZATION"
    READY = "SCSI requests"


# What a request of the handshake needs, and where success leads. BEGIN is allowed at any time:
# it starts over, which is what drivers do after an error of their own.
TRANSITIONS: dict[int, tuple[frozenset[Stage], Stage]] = {
    BEGIN_INITIALIZATION: (frozenset(Stage), Stage.VERSION),
    QUERY_PROTOCOL_VERSION: (frozenset({Stage.VERSION, Stage.PROPERTIES}), Stage.PROPERTIES),
    QUERY_PROPERTIES: (frozenset({Stage.PROPERTIES, Stage.END}), Stage.END),
    END_INITIALIZATION: (frozenset({Stage.END}), Stage.READY),
}


class Session:
    """State of one life; all channels of the life share it.

    Args:
        controller: Whose units are served.
        primary: The primary channel.
    """

    def __init__(self, controller: ScsiController, primary: Channel) -> None:
        self.controller = controller
        self.primary = primary
        self.stage = Stage.BEGIN
        self.version = 0
        self.subchannels = 0
        self._max_sense = SHORT_MAX_SENSE
        self._nursery: trio.Nursery | None = None
        self.inline = 0
        """Commands answered on the spot."""
        self.waited = 0
        """Commands that had to wait for their disk."""

    async def run(self) -> None:
        """Serve until the primary ends. Returns when no transfer touches guest memory any more."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._accept)
            await self._serve(self.primary)
            nursery.cancel_scope.cancel()

    async def _accept(self) -> None:
        assert self._nursery is not None
        while True:
            try:
                channel = await self.primary.accept_subchannel()
            except trio.EndOfChannel:
                return
            self._nursery.start_soon(self._serve_subchannel, channel)

    async def _serve_subchannel(self, channel: Channel) -> None:
        try:
            await self._serve(channel)
        except* GuestProtocolError as errors:
            # Its ring is corrupt. The life goes on with the other channels.
            _log.warning("channel %d: %s", channel.relid, errors.exceptions[0])
        finally:
            await channel.aclose()

    async def _serve(self, channel: Channel) -> None:
        """Serve one channel until it ends, then wait for the commands it has under way."""
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    packets = await channel.receive_batch()
                    if self.stage is Stage.READY:
                        serve_batch_untrusted(self, channel, packets, nursery)
                    else:
                        for packet in packets:
                            self.handle(channel, packet, nursery)
                    if not channel.try_flush():
                        await channel.flush()
            except trio.EndOfChannel:
                # Tasks of this nursery still own guest pages; leaving the block waits for them.
                return

    # -- requests --------------------------------------------------------------------------------

    def handle(self, channel: Channel, packet: Packet, nursery: trio.Nursery) -> None:
        """Act on any packet: answer it, or start a task that will. Cannot block."""
        if packet.kind not in {IN_BAND, GPA_DIRECT}:
            # No driver sends these. One that wants an answer gets it: it counts as a request
            # that is under way until then.
            self._complain(channel, packet, f"packet of type {packet.kind}")
            self._answer(channel, packet, None, STATUS_INVALID_DEVICE_REQUEST)
            return
        data = packet.data
        start = packet.payload_offset
        try:
            request = parse_packet_untrusted(data, start, min(len(data), start + PACKET_SIZE))
        except GuestProtocolError as error:
            self._complain(channel, packet, str(error))
            self._answer(channel, packet, None, STATUS_INVALID_PARAMETER)
            return
        if request.operation == EXECUTE_SRB:
            self._execute_srb(channel, packet, nursery)
        else:
            self._control(channel, packet, request)

    def _control(self, channel: Channel, packet: Packet, request: VstorPacket) -> None:
        """Answer everything that is not a SCSI command."""
        operation = request.operation
        body = b""
        try:
            if channel is not self.primary:
                raise GuestProtocolError(
                    f"{OPERATION_NAMES.get(operation, operation)} on a sub-channel",
                    field="operation",
                    status=STATUS_INVALID_DEVICE_REQUEST,
                )
            if operation in TRANSITIONS:
                allowed, following = TRANSITIONS[operation]
                if self.stage not in allowed:
                    raise GuestProtocolError(
                        f"{OPERATION_NAMES[operation]} where {self.stage.value} is expected",
                        field="operation",
                        status=STATUS_INVALID_DEVICE_STATE,
                    )
                if operation == QUERY_PROTOCOL_VERSION:
                    body = self._negotiate_untrusted(request.body)
                elif operation == QUERY_PROPERTIES:
                    body = self._properties()
                self.stage = following
            elif operation == CREATE_SUB_CHANNELS:
                self._create_subchannels_untrusted(request.body)
            elif operation in {RESET_LUN, RESET_ADAPTER, RESET_BUS}:
                self._reset()
            else:
                raise GuestProtocolError(
                    f"vstor operation {operation} is not a request",
                    field="operation",
                    status=STATUS_INVALID_DEVICE_REQUEST,
                )
        except GuestProtocolError as error:
            self._complain(channel, packet, str(error))
            self._answer(channel, packet, request, error.status, body)
            return
        self._answer(channel, packet, request, STATUS_SUCCESS, body)

    def _negotiate_untrusted(self, body: bytes) -> bytes:
        version, _revision = parse_protocol_version_untrusted(body)
        if version not in SUPPORTED_VERSIONS or version > self.controller.max_version:
            # UEFI gives up on any other status than this one.
            raise GuestProtocolError(
                f"vstor version {version >> 8}.{version & 0xFF} is not supported",
                field="major_minor",
                status=STATUS_REVISION_MISMATCH,
            )
        self.version = version
        self._max_sense = MAX_SENSE if version >= VERSION_5_1 else SHORT_MAX_SENSE
        return body

    def _properties(self) -> bytes:
        count = self.controller.max_subchannels if self.version >= VERSION_5_1 else 0
        return build_properties(
            max_channel_count=count,
            multi_channel=count > 0,
            max_transfer_bytes=self.controller.max_transfer_bytes,
        )

    def _create_subchannels_untrusted(self, body: bytes) -> None:
        count = parse_sub_channels_untrusted(body)
        if self.stage is not Stage.READY or self.subchannels:
            raise GuestProtocolError(
                "CREATE_SUB_CHANNELS before END_INITIALIZATION, or for the second time",
                field="operation",
                status=STATUS_INVALID_DEVICE_STATE,
            )
        if count > self.controller.max_subchannels or self.version < VERSION_5_1:
            raise GuestProtocolError(
                f"{count} sub-channels, {self.controller.max_subchannels} are possible",
                field="sub_channel_count",
            )
        if count:
            try:
                self.primary.offer_subchannels(count)
            except LocalProtocolError as error:
                raise GuestProtocolError(str(error), status=STATUS_INVALID_DEVICE_STATE) from error
            except BudgetError as error:
                raise GuestProtocolError(
                    str(error), status=STATUS_INSUFFICIENT_RESOURCES
                ) from error
        self.subchannels = count

    def _reset(self) -> None:
        # Commands under way are aborted by their units and answered one by one, after this
        # answer; Linux waits for them (storvsc_host_reset_handler).
        for unit in self.controller.all_units():
            unit.reset()

    # -- SCSI commands ---------------------------------------------------------------------------

    def _execute_srb(self, channel: Channel, packet: Packet, nursery: trio.Nursery) -> None:
        data, start = packet.data, packet.payload_offset
        try:
            srb = parse_srb_untrusted(data, start, min(len(data), start + PACKET_SIZE))
        except GuestProtocolError:
            # Only the values are wrong; the answer has to repeat them all the same.
            padded = data[start : start + PACKET_SIZE].ljust(PACKET_SIZE, b"\0")
            srb = Srb._make(REQUEST.unpack(padded))
        if self.stage is Stage.READY:
            self._execute(channel, packet, srb, nursery)
            return
        self._complain(channel, packet, f"EXECUTE_SRB where {self.stage.value} is expected")
        self._reply(channel, packet, srb, srb_status=SRB_ERROR, status=STATUS_INVALID_DEVICE_STATE)

    def _execute(self, channel: Channel, packet: Packet, srb: Srb, nursery: trio.Nursery) -> None:
        try:
            command = self._command_untrusted(channel, packet, srb)
        except GuestProtocolError as error:
            self._complain(channel, packet, str(error))
            self._reply(channel, packet, srb, srb_status=SRB_INVALID_REQUEST)
            return
        unit = self.controller.units.get((srb.path, srb.target, srb.lun))
        if unit is None:
            outcome = absent_unit(command, self.controller.luns(srb.path, srb.target))
            if outcome is None:
                # No flag bits and no SCSI status: macOS compares the whole byte, FreeBSD looks
                # at it only if the SCSI status is 0, Linux drops the LUN.
                self._reply(channel, packet, srb, srb_status=SRB_INVALID_LUN)
            else:
                self.finish(channel, packet, srb, outcome)
            return
        outcome = unit.try_execute(command)
        if outcome is not None:
            self.inline += 1
            self.finish(channel, packet, srb, outcome)
        else:
            self.wait(channel, packet, srb, command, nursery)

    def wait(
        self,
        channel: Channel,
        packet: Packet,
        srb: Srb,
        command: Command,
        nursery: trio.Nursery,
    ) -> None:
        """Let a command that has to wait for its disk do so in a task of its own."""
        if not packet.wants_completion:
            # The channel bounds the requests that have to be answered; nothing would bound these.
            self._complain(channel, packet, "EXECUTE_SRB that wants no answer has to wait")
            return
        self.waited += 1
        # The unit that is there now: another one may take its place before the task begins.
        unit = self.controller.units[srb.path, srb.target, srb.lun]
        nursery.start_soon(self._execute_slowly, channel, packet, srb, command, unit)

    def _command_untrusted(self, channel: Channel, packet: Packet, srb: Srb) -> Command:
        """Turn an SRB and its GPA range into a command. Raises GuestProtocolError."""
        length = srb.transfer_length
        if not 0 < srb.cdb_length <= 16:
            raise GuestProtocolError(
                f"SRB: cdb_length {srb.cdb_length} is not between 1 and 16", field="cdb_length"
            )
        if srb.data_in > DataDirection.NONE:
            raise GuestProtocolError(f"SRB: data_in {srb.data_in} is no direction", field="data_in")
        direction = _DIRECTIONS[srb.data_in]
        data: list[memoryview] = []
        if length:
            if packet.kind != GPA_DIRECT:
                raise GuestProtocolError(
                    f"SRB: {length} bytes of data, but no pages", field="transfer_length"
                )
            # Every driver sends exactly one range; several are no trouble.
            ranges = parse_gpa_ranges_untrusted(
                packet.data, packet.payload_offset, max_ranges=MAX_RANGES
            )
            available = 0
            for found in ranges:
                data += channel.memory.gather(
                    found.byte_offset,
                    found.byte_count,
                    found.pfns,
                    write=direction is DataDirection.READ,
                )
                available += found.byte_count
            if available < length:
                raise GuestProtocolError(
                    f"SRB: transfer_length {length}, but the pages hold {available}",
                    field="transfer_length",
                )
            if available > length:
                data = _cut(data, length)
        return Command(
            srb.cdb[: srb.cdb_length], data, length, direction, self.controller.initiator
        )

    async def _execute_slowly(
        self, channel: Channel, packet: Packet, srb: Srb, command: Command, unit: LogicalUnit
    ) -> None:
        self.finish(channel, packet, srb, await unit.execute(command))
        # Tasks that end in the same turn of the loop share one flush only by luck; the ring's
        # signalling rule keeps the price of a flush low.
        await channel.flush()

    # -- answers ---------------------------------------------------------------------------------

    def finish(self, channel: Channel, packet: Packet, srb: Srb, outcome: Outcome) -> None:
        """Answer a command that has ended, well or badly. Cannot block."""
        status, sense, transferred = outcome
        if not status:
            self._reply(channel, packet, srb, srb_status=SRB_SUCCESS, transferred=transferred)
            return
        srb_status = SRB_SUCCESS
        if status == STATUS_CHECK_CONDITION:
            sense = sense[: min(self._max_sense, srb.sense_length)]
            srb_status = SRB_ERROR | SRB_AUTOSENSE_VALID if sense else SRB_ERROR
        # Other SCSI statuses (RESERVATION CONFLICT, BUSY) travel with SRB_SUCCESS: with ERROR and
        # no sense data Linux would make DID_ERROR of them and never look at the SCSI status.
        self._reply(
            channel,
            packet,
            srb,
            srb_status=srb_status,
            scsi_status=status,
            sense=sense,
            transferred=transferred,
        )

    def _reply(
        self,
        channel: Channel,
        packet: Packet,
        srb: Srb,
        *,
        srb_status: int,
        scsi_status: int = 0,
        sense: bytes = b"",
        transferred: int = 0,
        status: int = STATUS_SUCCESS,
    ) -> None:
        if not packet.flags & 1:
            return
        channel.complete(
            packet.transaction_id,
            build_srb_reply(
                srb,
                srb_status=srb_status,
                scsi_status=scsi_status,
                transfer_length=transferred,
                sense=sense,
                status=status,
            ),
        )

    def _answer(
        self,
        channel: Channel,
        packet: Packet,
        request: VstorPacket | None,
        status: int,
        body: bytes | None = None,
    ) -> None:
        """Answer a control request: COMPLETE_IO, 64 bytes, whatever size the request had."""
        if not packet.wants_completion:
            return
        if not body and request is not None:
            body = request.body
        channel.complete(packet.transaction_id, build_completion(body or b"", status=status))

    def notify(self) -> None:
        """Tell the guest that the set of units, or one's size, has changed. Cannot block.

        Transaction id 0 and no completion wanted. Guests before Windows 7 do not know the
        operation (OpenVMM does the same), and before END_INITIALIZATION nobody expects it.
        """
        if self.stage is Stage.READY and self.version >= VERSION_4_2 and not self.primary.ended:
            self.primary.send(build_packet(ENUMERATE_BUS, flags=0))
            # Not here: a corrupt ring is the end of this life, and no matter of the caller's.
            if self._nursery is not None:
                self._nursery.start_soon(self.primary.flush)

    def _complain(self, channel: Channel, packet: Packet, text: str) -> None:
        self.controller.faults += 1
        if self.controller.faults <= LOGGED_FAULTS:
            _log.warning(
                "channel %d, transaction %#x: %s", channel.relid, packet.transaction_id, text
            )


MAX_RANGES = 64
LOGGED_FAULTS = 20
_DIRECTIONS = (DataDirection.WRITE, DataDirection.READ, DataDirection.NONE)


def _cut(views: Iterable[memoryview], length: int) -> list[memoryview]:
    """Return the first ``length`` bytes of a scatter list."""
    kept = []
    for view in views:
        if not length:
            break
        piece = view[:length]
        kept.append(piece)
        length -= len(piece)
    return kept
