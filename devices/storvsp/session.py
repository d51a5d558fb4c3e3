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

import dataclasses
import enum
import logging

import trio

from storvsp.requests import Requests, answer_size
from storvsp.units import Units
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
    RESET_ADAPTER,
    RESET_BUS,
    RESET_LUN,
    SHORT_MAX_SENSE,
    SHORT_PACKET_SIZE,
    SUPPORTED_VERSIONS,
    VERSION_4_2,
    VERSION_5_1,
    VERSION_6_2,
    Packet as VstorPacket,
    build_completion,
    build_packet,
    build_properties,
    parse_protocol_version_untrusted,
    parse_sub_channels_untrusted,
    unpack_packet,
    unpack_srb,
    whole_packet_untrusted,
)
from vmbus.errors import (
    STATUS_INVALID_DEVICE_REQUEST,
    STATUS_INVALID_DEVICE_STATE,
    STATUS_INVALID_PARAMETER,
    STATUS_REVISION_MISMATCH,
    STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
    ConfigError,
    GuestProtocolError,
)
from vmbus.host.channel import Channel
from vmbus.host.serving import Life
from vmbus.host.undertakings import not_back
from vmbus.log_budget import LogBudget
from vmbus.ring import Packet
from vmbus.wire.packets import GPA_DIRECT, IN_BAND

logger = logging.getLogger("storvsp")

MAX_SUBCHANNELS = 63
DEFAULT_MAX_TRANSFER = 2 << 20
"""Bytes. A whole 2 MiB request is one packet of 4.2 KB; the cost per request is shared by more
data than with the 256 KiB of other hosts. Linux takes up to 128 MiB."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a controller agrees to.

    Raises:
        ConfigError: A value is out of its range.
    """

    max_subchannels: int = 15
    """Channels the guest may open beside the primary one."""
    max_transfer_bytes: int = DEFAULT_MAX_TRANSFER
    """Largest transfer of one request in bytes. The guest is told; a longer one is refused with SRB
    status INVALID_REQUEST, unless it is of :data:`ALWAYS_TAKEN` bytes or less."""
    max_version: int = VERSION_6_2
    """Highest vstor version."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_subchannels <= MAX_SUBCHANNELS:
            raise ConfigError(
                f"max_subchannels is 0 to {MAX_SUBCHANNELS}, not {self.max_subchannels}"
            )
        largest = self.max_transfer_bytes
        if largest % 4096 or not 64 << 10 <= largest <= 128 << 20:
            raise ConfigError("max_transfer_bytes is a multiple of 4096 from 64 KiB to 128 MiB")


ALWAYS_TAKEN = 512 << 10
"""Bytes of one transfer that are taken whatever the guest has been told: FreeBSD's driver sends
128 KiB and that of illumos 512 KiB without looking."""
RESET_PATIENCE = 4.0
"""Seconds for what a reset has aborted to end. Linux waits 5 s for the answer; without one it gives
the requests up, and may use their pages for something else. With one, whatever it says, Linux waits
for each request's own answer (linux/drivers/scsi/storvsc_drv.c: storvsc_host_reset_handler)."""
UNREADY_BATCH = 16
"""Packets of one turn until the handshake is over."""


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


RESETS = frozenset({RESET_LUN, RESET_ADAPTER, RESET_BUS})
"""Operations that abort every command of every unit."""


class Session:
    """State of one life; all channels of the life share it.

    Args:
        primary: The primary channel.
        units: What is behind the controller.
        limits: What the controller agrees to.

    Attributes:
        stage: How far the handshake has come.
        version: vstor version agreed on, major << 8 | minor.
        subchannels: Sub-channels offered.
        requests: Executes the SRBs.
        refused: Requests that broke a rule.
    """

    def __init__(self, primary: Channel, units: Units, limits: Limits) -> None:
        self.primary = primary
        self.stage = Stage.BEGIN
        self.version = 0
        self.subchannels = 0
        self.requests = Requests(
            units, self._complain, max_transfer=max(limits.max_transfer_bytes, ALWAYS_TAKEN)
        )
        self.refused = 0
        self._units = units
        self._limits = limits
        self._life = Life(primary, self.serve_batch)
        self._late_resets = LogBudget()

    async def run(self) -> None:
        """Serve until the primary ends. Returns when no transfer touches guest memory any more."""
        await self._life.run()

    def serve_batch(self, channel: Channel, packets: list[Packet], nursery: trio.Nursery) -> int:
        """Act on packets that came in together, as many as one turn is for. Cannot block.

        Returns:
            How many; the rest is to come again.
        """
        if self.stage is Stage.READY:
            return self.requests.serve_batch_untrusted(
                channel, packets, nursery, self.handle, parts=self._life.parts
            )
        for packet in packets[:UNREADY_BATCH]:
            self.handle(channel, packet, nursery)
        return UNREADY_BATCH

    # -- requests --------------------------------------------------------------------------------

    def handle(self, channel: Channel, packet: Packet, nursery: trio.Nursery) -> bool:
        """Act on any packet: answer it, or start a task that will. Cannot block.

        Returns:
            Whether SCSI requests may come next.
        """
        self._handle(channel, packet, nursery)
        return self.stage is Stage.READY

    def _handle(self, channel: Channel, packet: Packet, nursery: trio.Nursery) -> None:
        if packet.kind not in {IN_BAND, GPA_DIRECT}:
            # No driver sends these. One that wants an answer gets it: it counts as a request
            # that is under way until then.
            self._complain(channel, packet, f"packet of type {packet.kind}")
            self._answer(channel, packet, None, STATUS_INVALID_DEVICE_REQUEST)
            return
        data = packet.data
        start = packet.payload_offset
        try:
            end = min(len(data), start + PACKET_SIZE)
            whole = whole_packet_untrusted(data, start, end)
            request = unpack_packet(whole)
            if request.operation == EXECUTE_SRB and end - start < SHORT_PACKET_SIZE:
                raise GuestProtocolError(f"EXECUTE_SRB of {end - start} bytes", field="length8")
        except GuestProtocolError as error:
            self._complain(channel, packet, str(error))
            self._answer(channel, packet, None, STATUS_INVALID_PARAMETER)
            return
        if request.operation in RESETS and channel is self.primary:
            self._reset(packet, request, nursery)
        elif request.operation != EXECUTE_SRB:
            self._control(channel, packet, request)
        elif self.stage is Stage.READY:
            self.requests.execute(channel, packet, unpack_srb(whole), nursery)
        else:
            self._complain(channel, packet, f"EXECUTE_SRB where {self.stage.value} is expected")
            self.requests.refuse(channel, packet, unpack_srb(whole), STATUS_INVALID_DEVICE_STATE)

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
                    status = self._negotiate_untrusted(request.body)
                    if status:
                        # No fault: this is how a guest finds out what the host has.
                        self._answer(channel, packet, request, status)
                        return
                elif operation == QUERY_PROPERTIES:
                    body = self._properties()
                self.stage = following
            elif operation == CREATE_SUB_CHANNELS:
                self._create_subchannels_untrusted(request.body)
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

    def _negotiate_untrusted(self, body: bytes) -> int:
        """Agree on a version, or not; returns the NTSTATUS. Raises GuestProtocolError."""
        version, _revision = parse_protocol_version_untrusted(body)
        if version not in SUPPORTED_VERSIONS or version > self._limits.max_version:
            # UEFI gives up on any other status than this one.
            return STATUS_REVISION_MISMATCH
        self.version = version
        self.requests.max_sense = MAX_SENSE if version >= VERSION_5_1 else SHORT_MAX_SENSE
        return STATUS_SUCCESS

    def _properties(self) -> bytes:
        count = self._limits.max_subchannels if self.version >= VERSION_5_1 else 0
        return build_properties(
            max_channel_count=count,
            multi_channel=count > 0,
            max_transfer_bytes=self._limits.max_transfer_bytes,
        )

    def _create_subchannels_untrusted(self, body: bytes) -> None:
        count = parse_sub_channels_untrusted(body)
        # Linux and FreeBSD ask after END_INITIALIZATION; OpenVMM takes it before, too.
        if self.stage not in {Stage.END, Stage.READY} or self.subchannels:
            raise GuestProtocolError(
                "CREATE_SUB_CHANNELS before QUERY_PROPERTIES, or for the second time",
                field="operation",
                status=STATUS_INVALID_DEVICE_STATE,
            )
        if count > self._limits.max_subchannels or self.version < VERSION_5_1:
            raise GuestProtocolError(
                f"{count} sub-channels, {self._limits.max_subchannels} are possible",
                field="sub_channel_count",
            )
        if count:
            self.primary.offer_subchannels(count)
        self.subchannels = count

    def _reset(self, packet: Packet, request: VstorPacket, nursery: trio.Nursery) -> None:
        """Abort all commands; the reset is answered when the last of them has ended.

        Who has the answer may use the pages of all its requests for something else. One that does
        not end in :data:`RESET_PATIENCE` makes the answer a failure.
        """
        for unit in self._units:
            unit.reset()
        if self.requests.busy or any(unit.busy for unit in self._units):
            if packet.wants_completion:
                nursery.start_soon(self._answer_reset, packet, request)
        else:
            self._answer(self.primary, packet, request, STATUS_SUCCESS)

    async def _answer_reset(self, packet: Packet, request: VstorPacket) -> None:
        status = STATUS_UNSUCCESSFUL
        with trio.move_on_after(RESET_PATIENCE):
            await self.requests.ended()
            for unit in self._units:
                await unit.ended()
            status = STATUS_SUCCESS
        if status != STATUS_SUCCESS and self._late_resets.spend():
            what = not_back(self.requests.names, RESET_PATIENCE, "a disk of another guest's")
            logger.error(
                "%s: %s%s", OPERATION_NAMES[request.operation], what, self._late_resets.left_out()
            )
        self._answer(self.primary, packet, request, status)
        await self.primary.flush()

    # -- answers ---------------------------------------------------------------------------------

    def _answer(
        self,
        channel: Channel,
        packet: Packet,
        request: VstorPacket | None,
        status: int,
        body: bytes | None = None,
    ) -> None:
        """Answer a control request: COMPLETE_IO, in as many bytes as the request had."""
        if not packet.wants_completion:
            return
        if not body and request is not None:
            body = request.body
        channel.complete(
            packet.transaction_id,
            build_completion(body or b"", status=status, size=answer_size(packet)),
        )

    def notify(self) -> None:
        """Tell the guest that the set of units, or one's size, has changed. Cannot block.

        Transaction id 0 and no completion wanted. Guests before Windows 7 do not know the
        operation (OpenVMM does the same), and before END_INITIALIZATION nobody expects it.
        """
        if self.stage is Stage.READY and self.version >= VERSION_4_2 and not self.primary.ended:
            size = PACKET_SIZE if self.version >= VERSION_5_1 else SHORT_PACKET_SIZE
            self.primary.send(build_packet(ENUMERATE_BUS, flags=0, size=size))
            self._life.flush_soon()

    def _complain(self, channel: Channel, packet: Packet, text: str) -> None:
        self.refused += 1
        channel.complain(text, packet.transaction_id)
