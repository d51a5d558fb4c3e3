"""What storage drivers demand of an answer, as one set of checks.

Each check is a real driver's: where it would panic, lose data, hang or invent a disk, the guest
crashes. Sources: linux/drivers/scsi/storvsc_drv.c (``storvsc_on_io_completion``),
freebsd/sys/dev/hyperv/storvsc (``storvsc_io_done``), openbsd/sys/dev/pv/hvs.c
(``hvs_scsi_cmd_done``), mu_msvm/MsvmPkg/StorvscDxe, MacHyperVSupport.
"""

from __future__ import annotations

from typing import NamedTuple

from storvsp.guest.habits import StorageHabits
from storvsp.wire import (
    COMPLETE_IO,
    PACKET_SIZE,
    SHORT_PACKET_SIZE,
    SRB_ABORT_FAILED,
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

CHECK_CONDITION = 0x02
GOOD = 0x00
_MAX_REPLY = 512
"""Haiku's buffer, the smallest of those that are not exact."""
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


def checked_payload(packet: Incoming, habits: StorageHabits, panic: Panic) -> bytes:
    """Return the vstor packet of an answer, after a check of its size."""
    payload = packet.payload
    if habits.exact_reply:
        if len(payload) != PACKET_SIZE:
            panic(f"vstor: answer of {len(payload)} bytes instead of 64")
    elif not SHORT_PACKET_SIZE <= len(payload) <= _MAX_REPLY:
        panic(f"vstor: answer of {len(payload)} bytes")
    return payload[:PACKET_SIZE]


def check_answer(packet: Incoming, habits: StorageHabits, panic: Panic) -> Packet:
    """Check an answer to anything but EXECUTE_SRB; its status is the caller's matter."""
    answer = parse_packet_untrusted(checked_payload(packet, habits, panic))
    if answer.operation != COMPLETE_IO:
        panic(f"vstor: answer with operation {answer.operation} instead of COMPLETE_IO")
    return answer


def check_srb_reply(
    packet: Incoming, habits: StorageHabits, panic: Panic, *, requested: int, sense_room: int
) -> SrbReply:
    """Check an answer to EXECUTE_SRB.

    Args:
        packet: The completion.
        habits: What sizes to demand.
        panic: Called when the host breaks a rule.
        requested: Bytes of data asked for.
        sense_room: Bytes of sense data asked for.
    """
    reply = parse_srb_reply_untrusted(checked_payload(packet, habits, panic))
    srb_status = reply.srb_status
    scsi_status = reply.scsi_status
    if reply.operation != COMPLETE_IO:
        panic(f"vstor: answer with operation {reply.operation} instead of COMPLETE_IO")
    if reply.status:
        panic(f"vstor: status {reply.status:#x} in the answer to a SCSI command; it is always 0")
    if reply.transfer_length > requested:
        panic(f"SRB: {reply.transfer_length} bytes transferred, {requested} were asked for")
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
    if scsi_status == CHECK_CONDITION and srb_status != SRB_ERROR | SRB_AUTOSENSE_VALID:
        panic(f"SRB: check condition with srb_status {srb_status:#x} instead of 0x84")
    return reply
