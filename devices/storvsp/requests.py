"""SCSI requests of one life of the controller: from an SRB in a packet to its answer.

Two ways lead through this module, to the same bytes; a test proves that. The common case goes the
short way, :meth:`Requests.serve_batch_untrusted`: a 64-byte EXECUTE_SRB with exactly one GPA range
that is as long as the transfer, for a unit that exists. That is every READ and WRITE of every
driver we know, and it is parsed, executed and answered there with few Python calls (CPython 3.11,
``make bench``: a third of the host's time per request saved). Anything else, and everything that
turns out to be wrong, goes the long way, :meth:`Requests.execute`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Callable

import trio

from storvsp.scsi import Command, DataDirection, LogicalUnit, Outcome, absent_unit
from storvsp.scsi.cdb import command_name
from storvsp.scsi.pace import keep_pace, may_act
from storvsp.scsi.running import Endings
from storvsp.scsi.sense import UNIT_ATTENTION
from storvsp.scsi.unit import TASK_ABORTED
from storvsp.units import Units
from storvsp.wire import (
    COMPLETE_IO,
    EXECUTE_SRB,
    HEADER_SIZE,
    PACKET_SIZE,
    REQUEST,
    SHORT_MAX_SENSE,
    SRB_ABORTED,
    SRB_AUTOSENSE_VALID,
    SRB_ERROR,
    SRB_INVALID_LUN,
    SRB_INVALID_REQUEST,
    SRB_SUCCESS,
    Srb,
    build_srb_reply,
    check_srb_untrusted,
)
from vmbus.errors import STATUS_SUCCESS, GuestProtocolError
from vmbus.host.channel import Channel
from vmbus.host.observer import MemoryUse
from vmbus.host.undertakings import Undertaking
from vmbus.memory import window
from vmbus.ring import Packet
from vmbus.wire.gpa import PAGE_SIZE, pfn_list
from vmbus.wire.packets import COMPLETION, DESCRIPTOR_SIZE, GPA_DIRECT

STATUS_CHECK_CONDITION = 0x02

RANGE = struct.Struct("<4xIIIQ")
"""From byte 16 of the packet: reserved, range count, byte count, byte offset, first page."""
FIRST_PFN = 32
GOOD = struct.Struct("<QQQIHH5sBBxI20x16s")
"""A successful answer, descriptor included: what the request said at bytes 16 to 20 and 48 to 63 is
repeated. Fields that are the same in each are packed together: every argument takes its time."""
assert GOOD.size == DESCRIPTOR_SIZE + PACKET_SIZE
assert REQUEST.size == PACKET_SIZE
GOOD_HEAD = COMPLETION | DESCRIPTOR_SIZE // 8 << 16 | GOOD.size // 8 << 32
"""Type, offset and length, the latter two in units of 8 bytes; no flags."""

REQUEST_WEIGHT = 6 << 10
"""Bytes of host memory that a request holds while it waits: its task, frames and small objects."""
PIECE_WEIGHT = 208
"""Bytes for each piece of guest memory its data is in: a view, and its place in a list."""

_range = RANGE.unpack_from
_request = REQUEST.unpack_from
_good = GOOD.pack
_DIRECTIONS = (DataDirection.WRITE, DataDirection.READ, DataDirection.NONE)

TURN = 2 << 20
"""What a channel may do before others have their turn, in bytes that are copied: half a
millisecond, where 4 GB/s are. Everything else is weighed in the same unit, by the time it takes."""
COST = 16 << 10
"""Of a request for more than one page, beside its data. READs and WRITEs of one page are bounded by
their number in a batch alone: weighing each would cost as much as a fiftieth of it."""
PIECE_COST = 4 << 10
"""Of each piece of guest memory that its data is in."""
TASK_COST = 256 << 10
"""Of a task of its own for a request that has to wait."""
LONG_COST = 256 << 10
"""Of any other command, and of a request that goes the long way: 20 to 60 us."""

_MOVES = frozenset((0x08, 0x0A, 0x28, 0x2A, 0x88, 0x8A, 0xA8, 0xAA))
"""READ and WRITE (6), (10), (12) and (16)."""

Otherwise = Callable[[Channel, Packet, trio.Nursery], bool]
"""Acts on a packet that is not the common case. Cannot block."""
Complain = Callable[[Channel, Packet, str], None]
"""Told of a rule that a packet broke. Cannot block."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Execution:
    """A command that waits for its disk, from before its task begins."""

    packet: Packet
    srb: Srb
    command: Command
    unit: LogicalUnit
    undertaking: Undertaking
    aborts: int
    """:attr:`LogicalUnit.aborts` when the command came."""


class Requests:
    """Executes SRBs and answers them.

    Args:
        units: For whom.
        complain: Told of what is wrong with a request.
        max_transfer: Most bytes of a request's data; the guest has been told.

    Attributes:
        max_sense: Bytes of sense data that the version agreed on has room for.
        inline: Commands answered on the spot.
        waited: Commands that had to wait for their disk.
    """

    def __init__(self, units: Units, complain: Complain, *, max_transfer: int) -> None:
        self._units = units
        self._complain = complain
        self._max_transfer = max_transfer
        self.max_sense = SHORT_MAX_SENSE
        self.inline = 0
        self.waited = 0
        self._under_way = Endings()
        self._undertakings: dict[int, Undertaking] = {}

    def serve_batch_untrusted(
        self,
        channel: Channel,
        packets: list[Packet],
        nursery: trio.Nursery,
        otherwise: Otherwise,
        *,
        parts: int = 1,
    ) -> int:
        """Answer a batch of packets of a session that is ready. Cannot block.

        It ends early, and not before one packet, when it has done the work of one turn,
        :data:`TURN`: a packet may be a TEST UNIT READY, and may be a read of 2 MiB into 512 pages.

        Args:
            channel: Where the packets came from and the answers go.
            packets: Private copies.
            nursery: Where commands go that have to wait for their disk.
            otherwise: Gets each packet that is not the common case. It returns False when the
                session is not ready any more: what is behind that packet is not for here.
            parts: Into how many parts the work of a turn is divided, because other channels of the
                guest have as much to do.

        Returns:
            How many packets it has acted on.
        """
        units = self._units.by_address
        initiator = self._units.initiator
        gather = channel.memory.gather
        complete = channel.complete_packet
        max_transfer = self._max_transfer
        moves = _MOVES
        tells = channel.tells_memory
        done = 0
        budget = TURN // parts
        # Counted per unit, which seldom changes within a batch.
        current: LogicalUnit | None = None
        commands = read = written = 0
        for done, packet in enumerate(packets, 1):  # noqa: B007 - wanted behind the loop
            data = packet.data
            start = packet.payload_offset
            if packet.kind == GPA_DIRECT and start > FIRST_PFN and len(data) - start == PACKET_SIZE:
                count, byte_count, byte_offset, pfn = _range(data, 16)
                request = _request(data, start)
                # operation, flags, status, length, srb_status, scsi_status, port, path, target,
                # lun, cdb_length, sense_length, data_in, transfer_length, cdb, ...: see
                # storvsp.wire.Srb
                cdb_length = request[10]
                data_in = request[12]
                unit = units.get(request[7:10])
                if (
                    request[0] == EXECUTE_SRB
                    and count == 1
                    and byte_count == request[13]
                    and byte_count
                    and byte_offset < PAGE_SIZE
                    and data_in < 2
                    and 0 < cdb_length <= 16
                    and unit is not None
                ):
                    last = byte_offset + byte_count
                    try:
                        if last <= PAGE_SIZE:
                            views = gather(byte_offset, byte_count, (pfn,), write=data_in == 1)
                        else:
                            pages = (last + 4095) >> 12
                            if byte_count > max_transfer or FIRST_PFN + 8 * pages > start:
                                raise GuestProtocolError("too many pages")
                            pfns = pfn_list(pages).unpack_from(data, FIRST_PFN)
                            views = gather(byte_offset, byte_count, pfns, write=data_in == 1)
                            budget -= COST + byte_count + len(views) * PIECE_COST
                    except GuestProtocolError:
                        budget -= LONG_COST
                        if not otherwise(channel, packet, nursery) or budget <= 0:
                            break
                        continue
                    if tells and not data_in:
                        channel.tell_memory(packet.transaction_id, views, MemoryUse.READ)
                    cdb = request[14]
                    command = Command(
                        cdb[:cdb_length],
                        views,
                        byte_count,
                        _DIRECTIONS[data_in],
                        initiator,
                    )
                    if cdb[0] not in moves:
                        budget -= LONG_COST
                    if unit is not current:
                        if current is not None:
                            self._count(current, commands, read, written)
                        current = unit
                        commands = read = written = 0
                    outcome = unit.try_execute(command)
                    if outcome is None:
                        budget -= TASK_COST
                        self._wait(
                            channel, packet, Srb._make(request), command, unit=unit, nursery=nursery
                        )
                        if budget > 0:
                            continue
                        break
                    commands += 1
                    moved = outcome[2]
                    if data_in:
                        read += moved
                        if tells:
                            _tell_read(channel, packet, command, moved)
                    else:
                        written += moved
                    if outcome[0]:
                        budget -= LONG_COST
                        self._finish(channel, packet, Srb._make(request), outcome)
                    elif packet.flags & 1:
                        complete(
                            _good(
                                GOOD_HEAD,
                                packet.transaction_id,
                                COMPLETE_IO,  # and no flags
                                0,
                                request[3],
                                SRB_SUCCESS,  # and SCSI status GOOD
                                data[start + 16 : start + 21],
                                0,
                                data_in,
                                moved,
                                data[start + 48 :],
                            )
                        )
                    if budget > 0:
                        continue
                    break
            budget -= LONG_COST
            if not otherwise(channel, packet, nursery) or budget <= 0:
                break
        if current is not None:
            self._count(current, commands, read, written)
        return done

    def _count(self, unit: LogicalUnit, commands: int, read: int, written: int) -> None:
        """Count commands that were answered on the spot."""
        self.inline += commands
        unit.commands += commands
        unit.bytes_read += read
        unit.bytes_written += written

    # -- the long way ----------------------------------------------------------------------------

    def execute(self, channel: Channel, packet: Packet, srb: Srb, nursery: trio.Nursery) -> None:
        """Execute any SRB: answer it, or start a task that will. Cannot block."""
        try:
            command = self._command_untrusted(channel, packet, srb)
        except GuestProtocolError as error:
            self._complain(channel, packet, str(error))
            self._reply(channel, packet, srb, srb_status=SRB_INVALID_REQUEST)
            return
        unit = self._units.by_address.get((srb.path, srb.target, srb.lun))
        if unit is None:
            outcome = absent_unit(command, self._units.luns(srb.path, srb.target))
            if outcome is None:
                # No flag bits and no SCSI status: macOS compares the whole byte, FreeBSD looks
                # at it only if the SCSI status is 0, Linux drops the LUN.
                self._reply(channel, packet, srb, srb_status=SRB_INVALID_LUN)
            else:
                self._finish(channel, packet, srb, outcome)
            return
        outcome = unit.try_execute(command)
        if outcome is not None:
            self.inline += 1
            _count(unit, command, outcome)
            _tell_read(channel, packet, command, outcome.transferred)
            self._finish(channel, packet, srb, outcome)
        else:
            self._wait(channel, packet, srb, command, unit=unit, nursery=nursery)

    def refuse(self, channel: Channel, packet: Packet, srb: Srb, status: int) -> None:
        """Answer an SRB that cannot be executed now with an NTSTATUS. Cannot block."""
        self._reply(channel, packet, srb, srb_status=SRB_ERROR, status=status)

    def _command_untrusted(self, channel: Channel, packet: Packet, srb: Srb) -> Command:
        """Turn an SRB and its GPA range into a command. Raises GuestProtocolError."""
        check_srb_untrusted(srb)
        length = srb.transfer_length
        if length > self._max_transfer:
            # Before anything is made of its pages, of which there may be 65 000.
            raise GuestProtocolError(
                f"{length} bytes of data, {self._max_transfer} are possible",
                field="data_transfer_length",
            )
        direction = _DIRECTIONS[srb.data_in]
        data: list[memoryview] = []
        if length:
            # Every driver sends exactly one range; several are no trouble.
            data = channel.external_data_untrusted(
                packet, length, write=direction is DataDirection.READ
            )
            if channel.tells_memory and direction is not DataDirection.READ:
                channel.tell_memory(packet.transaction_id, data, MemoryUse.READ)
        return Command(srb.cdb[: srb.cdb_length], data, length, direction, self._units.initiator)

    def _wait(
        self,
        channel: Channel,
        packet: Packet,
        srb: Srb,
        command: Command,
        *,
        unit: LogicalUnit,
        nursery: trio.Nursery,
    ) -> None:
        """Let a command that has to wait for its disk do so in a task of its own."""
        if not packet.wants_completion:
            # The channel bounds the requests that have to be answered; nothing would bound these.
            self._complain(channel, packet, "EXECUTE_SRB that wants no answer has to wait")
            return
        self.waited += 1
        # The unit that is there now: another one may take its place before the task begins.
        undertaking = channel.undertakings.begin(
            REQUEST_WEIGHT + len(packet.data) + PIECE_WEIGHT * len(command.data),
            lambda: f"{unit.name or 'a unit'}: {command_name(command.cdb)}",
        )
        execution = _Execution(packet, srb, command, unit, undertaking, unit.aborts)
        number = self._under_way.begin()
        self._undertakings[number] = undertaking
        nursery.start_soon(self._execute_slowly, channel, execution, number)

    async def _execute_slowly(self, channel: Channel, execution: _Execution, number: int) -> None:
        unit = execution.unit
        keep_pace(execution.undertaking)
        outcome = TASK_ABORTED
        try:
            with contextlib.suppress(trio.EndOfChannel):
                await may_act()
                # Else it came in time, but what aborts it was quicker than its task.
                if unit.aborts == execution.aborts:
                    outcome = await self._execute(execution)
        finally:
            execution.undertaking.end()
            del self._undertakings[number]
            self._under_way.end(number)
        _count(unit, execution.command, outcome)
        _tell_read(channel, execution.packet, execution.command, outcome.transferred)
        self._finish(channel, execution.packet, execution.srb, outcome)
        # Tasks that end in the same turn of the loop share one flush only by luck; the ring's
        # signalling rule keeps the price of a flush low.
        await channel.flush()

    async def _execute(self, execution: _Execution) -> Outcome:
        if execution.unit.paced:
            return await execution.unit.execute(execution.command)
        await execution.undertaking.enter()
        try:
            return await execution.unit.execute(execution.command)
        finally:
            execution.undertaking.leave()

    @property
    def busy(self) -> bool:
        """Whether any command is under way."""
        return bool(self._under_way)

    @property
    def names(self) -> list[str]:
        """What is under way, for people; the oldest first."""
        return [each.name() for each in self._undertakings.values()]

    async def ended(self) -> None:
        """Wait until all commands that are under way now have ended. A checkpoint if any is."""
        await self._under_way.ended()

    # -- answers ---------------------------------------------------------------------------------

    def _finish(self, channel: Channel, packet: Packet, srb: Srb, outcome: Outcome) -> None:
        """Answer a command that has ended, well or badly. Cannot block."""
        status, sense, transferred = outcome
        if not status:
            self._reply(channel, packet, srb, srb_status=SRB_SUCCESS, transferred=transferred)
            return
        srb_status = SRB_SUCCESS
        if status == STATUS_CHECK_CONDITION:
            sense = sense[: min(self.max_sense, srb.sense_length)]
            srb_status = SRB_ABORTED if _tells_new_capacity(sense) else SRB_ERROR
            if sense:
                srb_status |= SRB_AUTOSENSE_VALID
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
        if not packet.wants_completion:
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
                size=answer_size(packet),
            ),
        )


def _tell_read(channel: Channel, packet: Packet, command: Command, size: int) -> None:
    """Tell who listens what has been read, of so many bytes."""
    if (
        channel.tells_memory
        and size
        and command.direction is DataDirection.READ
        and not channel.ended
    ):
        channel.tell_memory(packet.transaction_id, window(command.data, 0, size), MemoryUse.WRITTEN)


def _count(unit: LogicalUnit, command: Command, outcome: Outcome) -> None:
    unit.commands += 1
    if command.direction is DataDirection.READ:
        unit.bytes_read += outcome.transferred
    else:
        unit.bytes_written += outcome.transferred


def _tells_new_capacity(sense: bytes) -> bool:
    """Whether the sense data is UNIT ATTENTION 2A/09, which goes with SRB status ABORTED.

    Linux before 6.1 and the stable kernels of late 2022 looked for it beside that status only, and
    kept the old size otherwise; later ones take both (linux/drivers/scsi/storvsc_drv.c:
    storvsc_handle_error). To the others the SCSI status counts, and that there is sense data
    (openbsd/sys/dev/pv/hvs.c: hvs_scsi_cmd_done; FreeBSD's storvsc_io_done).
    """
    return sense[12:14] == b"\x2a\x09" and sense[2] & 0x0F == UNIT_ATTENTION


def answer_size(packet: Packet) -> int:
    """Return how many bytes of vstor an answer has: those of its request, and a status at least."""
    return max(HEADER_SIZE, min(len(packet.data) - packet.payload_offset, PACKET_SIZE))
