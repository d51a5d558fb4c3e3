"""What storage drivers demand of an answer, as one set of checks.

Each check is a real driver's: where it would panic, lose data, hang or invent a disk, the guest
crashes. Sources: linux/drivers/scsi/storvsc_drv.c (``storvsc_on_io_completion``),
freebsd/sys/dev/hyperv/storvsc (``storvsc_io_done``), openbsd/sys/dev/pv/hvs.c
(``hvs_scsi_cmd_done``), mu_msvm/MsvmPkg/StorvscDxe, MacHyperVSupport.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from storvsp.guest.habits import Room, StorageHabits
from storvsp.wire import (
    COMPLETE_IO,
    MAX_SENSE,
    PACKET_SIZE,
    SRB_ABORT_FAILED,
    SRB_ABORTED,
    SRB_AUTOSENSE_VALID,
    SRB_ERROR,
    SRB_INVALID_LUN,
    SRB_PENDING,
    SRB_STATUS_MASK,
    SRB_SUCCESS,
    Packet,
    SrbReply,
    parse_packet_untrusted,
    parse_srb_reply_untrusted,
)
from vmbus.errors import VMBusError
from vmbus.guest import Incoming
from vmbus.guest.machine import Panic
from vmbus.wire.packets import DESCRIPTOR_SIZE

CHECK_CONDITION = 0x02
GOOD = 0x00
UNIT_ATTENTION = 0x06
CAPACITY_CHANGED = b"\x2a\x09"
"""ASC and ASCQ (SBC-3 4.7): the disk has another size."""
_ABORTED_WITH_SENSE = SRB_ABORTED | SRB_AUTOSENSE_VALID
"""How hosts have told of a new size; linux/drivers/scsi/storvsc_drv.c looked for nothing else."""
_FIXED_SENSE = (0x70, 0x71)
"""Response codes of fixed-format sense data, current and deferred (SPC-4 4.5.3)."""


class Result(NamedTuple):
    """What has become of a SCSI command."""

    srb_status: int
    scsi_status: int
    sense: bytes
    """Valid bytes only."""
    transferred: int
    """Bytes."""
    data: bytes
    """What was read: ``transferred`` bytes."""

    @property
    def good(self) -> bool:
        """Whether the command has succeeded."""
        return self.srb_status == SRB_SUCCESS and self.scsi_status == GOOD

    @property
    def absent(self) -> bool:
        """Whether there is no such logical unit."""
        return self.srb_status == SRB_INVALID_LUN

    @property
    def resized(self) -> bool:
        """Whether it says that the disk has another size."""
        return self.sense_key == UNIT_ATTENTION and self.sense[12:14] == CAPACITY_CHANGED

    @property
    def sense_key(self) -> int:
        """Sense key, or 0 without sense data."""
        return self.sense[2] & 0xF if len(self.sense) > 2 else 0

    @property
    def asc(self) -> int:
        """Additional sense code << 8 | qualifier, or 0 without them."""
        return self.sense[12] << 8 | self.sense[13] if len(self.sense) > 13 else 0


class ScsiError(VMBusError):
    """A SCSI command has failed.

    Args:
        what: Name of the command.
        result: What the device has answered.
    """

    def __init__(self, what: str, result: Result) -> None:
        super().__init__(
            f"{what}: srb {result.srb_status:#04x}, scsi {result.scsi_status:#04x}, "
            f"sense {result.sense_key:x}/{result.asc >> 8:02x}/{result.asc & 0xFF:02x}"
        )
        self.result = result


class Kind(Enum):
    """What a packet from the host is to the driver."""

    HANDSHAKE = auto()
    """An answer to anything but a SCSI command."""
    COMMAND = auto()
    """An answer to a SCSI command."""
    NOTICE = auto()
    """Nobody has asked for it."""


def check_length(
    packet: Incoming, kind: Kind, habits: StorageHabits, panic: Panic, *, sent: int
) -> bytes:
    """See that a driver takes a packet of this length; return its first 64 bytes of payload.

    Args:
        packet: From the host.
        kind: What it is.
        habits: What the driver takes.
        panic: Called if it does not take it.
        sent: Bytes of the packets that the driver itself sends at this time.
    """
    size = len(packet.data) - DESCRIPTOR_SIZE
    what = "notification" if kind is Kind.NOTICE else "answer"
    room = habits.room
    most: int | None = None
    if room is Room.FIXED:
        most = habits.buffer
    elif room is Room.REQUEST or (room is Room.HANDSHAKE and kind is Kind.HANDSHAKE):
        most = sent
    if most is not None and size > most:
        panic(f"vstor: {what} of {size} bytes, there is room for {most}: {habits.too_long}")
    least = habits.min_notice if kind is Kind.NOTICE else habits.min_answer
    if size < least:
        panic(f"vstor: {what} of {size} bytes instead of {least}: {habits.too_short}")
    return packet.payload[:PACKET_SIZE]


def check_answer(packet: Incoming, habits: StorageHabits, panic: Panic, *, sent: int) -> Packet:
    """Check an answer to anything but EXECUTE_SRB; its status is the caller's matter.

    Args:
        packet: The completion.
        habits: What lengths the driver takes.
        panic: Called when the host breaks a rule.
        sent: Bytes of the request.
    """
    payload = check_length(packet, Kind.HANDSHAKE, habits, panic, sent=sent)
    answer = parse_packet_untrusted(payload)
    if answer.operation != COMPLETE_IO:
        panic(f"vstor: answer with operation {answer.operation} instead of COMPLETE_IO")
    return answer


def check_srb_reply(
    packet: Incoming,
    habits: StorageHabits,
    panic: Panic,
    *,
    sent: int,
    requested: int,
    sense_room: int,
) -> SrbReply:
    """Check an answer to EXECUTE_SRB.

    Args:
        packet: The completion.
        habits: What lengths the driver takes.
        panic: Called when the host breaks a rule.
        sent: Bytes of the request.
        requested: Bytes of data asked for.
        sense_room: Bytes of sense data asked for.
    """
    payload = check_length(packet, Kind.COMMAND, habits, panic, sent=sent)
    reply = parse_srb_reply_untrusted(payload)
    srb_status = reply.srb_status
    scsi_status = reply.scsi_status
    if reply.operation != COMPLETE_IO:
        panic(f"vstor: answer with operation {reply.operation} instead of COMPLETE_IO")
    if reply.status:
        panic(f"vstor: status {reply.status:#x} in the answer to a SCSI command; it is always 0")
    if reply.transfer_length > requested:
        panic(f"SRB: {reply.transfer_length} bytes transferred, {requested} were asked for")
    if reply.sense_length > MAX_SENSE:
        # mu_msvm/MsvmPkg/StorvscDxe, StorChannelCompletionRoutine: whatever the status is.
        panic(f"SRB: {reply.sense_length} bytes of sense data, the packet has {MAX_SENSE}")
    if srb_status == SRB_SUCCESS:
        # Busy, conflicts and aborts come like this: an error without sense data would have Linux
        # make DID_ERROR of it and never look at the SCSI status (storvsc_handle_error).
        if scsi_status == CHECK_CONDITION:
            panic(f"SRB: srb_status success with scsi_status {scsi_status:#x}")
        return reply
    code = srb_status & SRB_STATUS_MASK
    if code in (SRB_PENDING, SRB_ABORT_FAILED):
        panic(f"SRB: srb_status {srb_status:#x}: FreeBSD panics on pending and abort-failed")
    if code == SRB_SUCCESS:
        panic(f"SRB: srb_status {srb_status:#x}: success has no flag bits")
    if code == SRB_INVALID_LUN and (srb_status != code or scsi_status or reply.transfer_length):
        panic(
            f"SRB: srb_status {srb_status:#x}, scsi_status {scsi_status:#x}, "
            f"{reply.transfer_length} bytes: an absent unit is srb 0x20 alone"
        )
    if reply.sense_length > sense_room:
        panic(f"SRB: {reply.sense_length} bytes of sense data, room is for {sense_room}")
    if srb_status & SRB_AUTOSENSE_VALID and (
        not reply.sense_length or reply.sense[0] & 0x7F not in _FIXED_SENSE
    ):
        panic(f"SRB: sense data announced, but there is {reply.sense[: reply.sense_length].hex()}")
    if scsi_status == CHECK_CONDITION:
        _check_condition(reply, habits, panic)
    return reply


def _check_condition(reply: SrbReply, habits: StorageHabits, panic: Panic) -> None:
    """Check the SRB status of a command that has ended with sense data."""
    srb_status = reply.srb_status
    resized = reply.sense[2] & 0xF == UNIT_ATTENTION and reply.sense[12:14] == CAPACITY_CHANGED
    if resized and srb_status in (SRB_ERROR | SRB_AUTOSENSE_VALID, _ABORTED_WITH_SENSE):
        if habits.resize_srb and srb_status not in habits.resize_srb:
            panic(
                f"SRB: capacity data has changed, told with srb_status {srb_status:#x}: the driver "
                f"looks for it beside {habits.resize_srb[0]:#x} only, and keeps the old size"
            )
    elif srb_status != SRB_ERROR | SRB_AUTOSENSE_VALID:
        panic(f"SRB: check condition with srb_status {srb_status:#x} instead of 0x84")
