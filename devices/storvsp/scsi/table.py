"""The dispatch table: one :class:`Spec` for each command a logical unit implements.

The table is the only list of commands. REPORT SUPPORTED OPERATION CODES is generated from it, and
so are the reservation rules: a command that is not in the table does not exist.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from storvsp.scsi.cdb import decode_transfer_untrusted
from storvsp.scsi.gate import EVERYWHERE, sections
from storvsp.scsi.sense import invalid_cdb_field
from storvsp.scsi.unit import Command, Outcome

Quick = Callable[[Any, Command], Outcome | None]
Slow = Callable[[Any, Command], Awaitable[Outcome]]


class Access(enum.Enum):
    """How a command fares when somebody else holds a reservation (SPC-4 table 66, SBC-3 table 13).

    The first letter of the value says what a RESERVE(6)/(10) reservation does to it, the second a
    write-exclusive and the third an exclusive-access persistent reservation: ``-`` allowed, ``x``
    conflict.
    """

    FREE = "---"
    """INQUIRY, REPORT LUNS, REQUEST SENSE, READ CAPACITY ...; also commands that judge for
    themselves, because reservations are their business."""
    STATUS = "x--"
    """TEST UNIT READY, PERSISTENT RESERVE IN."""
    READ = "x-x"
    """Commands that read the medium or the unit's parameters."""
    WRITE = "xxx"
    """Commands that change something."""
    START_STOP = "start"
    """START STOP UNIT: starting is FREE, everything else WRITE."""
    PREVENT = "prevent"
    """PREVENT ALLOW MEDIUM REMOVAL: allowing is FREE, preventing WRITE."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """One command.

    Attributes:
        opcode: Operation code.
        usage: CDB usage data (SPC-4 6.34.3): the operation code, then a set bit for every bit of
            the CDB that is looked at. Its length is the length of the CDB.
        access: How reservations apply.
        quick: Does the command without waiting. May return None if ``slow`` is present.
        slow: Does the command, waiting for the disk.
        service_action: The service action, if the operation code has any.
        polite: False for the few commands that do not report unit attentions.
        exclusive: ``slow`` needs the medium for itself, or the range that the CDB names.
        ranged: The range of :func:`storvsp.scsi.cdb.decode_transfer_untrusted` is all that the
            command reads and writes of the medium.
        least: Bytes of CDB that will do, 0 for all. What is missing has to mean nothing.
        gated: ``slow`` moves data, so it waits for its turn and can be aborted. False for the one
            that waits for others to end.
    """

    opcode: int
    usage: bytes
    access: Access
    quick: Quick | None = None
    slow: Slow | None = None
    service_action: int | None = None
    polite: bool = True
    exclusive: bool = False
    ranged: bool = False
    gated: bool = True
    least: int = 0


Entry = Spec | Mapping[int, Spec]
"""One command, or service action -> command."""


class Table(dict[int, Entry]):
    """Operation code -> what has it. Not to be changed once it is in use."""

    @functools.cached_property
    def described(self) -> bytes:
        """All commands, as REPORT SUPPORTED OPERATION CODES lists them; made once."""
        return _describe(self, timeouts=False)

    @functools.cached_property
    def described_with_timeouts(self) -> bytes:
        """The same, each with its command timeouts descriptor."""
        return _describe(self, timeouts=True)


def make_table(specs: Iterable[Spec]) -> Table:
    """Index commands by operation code and service action."""
    table: dict[int, Spec | dict[int, Spec]] = {}
    for spec in specs:
        if spec.service_action is None:
            table[spec.opcode] = spec
        else:
            actions = table.setdefault(spec.opcode, {})
            assert isinstance(actions, dict)
            actions[spec.service_action] = spec
    return Table(table)


def where(spec: Spec, command: Command) -> int:
    """Return the sections of the medium that a command is about; see :mod:`storvsp.scsi.gate`.

    Args:
        spec: The command's entry.
        command: With a CDB of full length.
    """
    if not spec.ranged:
        return EVERYWHERE
    transfer = decode_transfer_untrusted(command.cdb)
    return sections(transfer.lba, transfer.blocks)


def usage(template: str) -> bytes:
    """Write CDB usage data as hexadecimal digits; blanks only group them."""
    return bytes.fromhex(template)


_ONE = struct.Struct(">BBH")
_DESCRIPTOR = struct.Struct(">BxHxBH")
_TIMEOUTS = struct.pack(">HxBII", 10, 0, 0, 0)
"""A command timeouts descriptor that says nothing (SPC-4 6.34.4)."""


def report_supported_opcodes_untrusted(table: Table, cdb: bytes) -> bytes:
    """Build the answer to REPORT SUPPORTED OPERATION CODES (SPC-4 6.34).

    Args:
        table: The unit's commands.
        cdb: The 12-byte CDB.

    Raises:
        CheckCondition: The reporting options do not fit the operation code asked about.
    """
    options = cdb[2] & 0x07
    timeouts = bool(cdb[2] & 0x80)
    if options == 0:
        return table.described_with_timeouts if timeouts else table.described
    if options > 3:
        raise invalid_cdb_field(2, 2)
    entry = table.get(cdb[3])
    action = int.from_bytes(cdb[4:6], "big")
    spec: Spec | None
    if isinstance(entry, Spec):
        if options == 2:  # the command has no service actions
            raise invalid_cdb_field(2, 2)
        spec = entry if options == 1 or action == 0 else None
    elif entry is None:
        spec = None
    else:
        if options == 1:  # the command has service actions
            raise invalid_cdb_field(2, 2)
        spec = entry.get(action)
    if spec is None:
        return _ONE.pack(0, 0x01, 0)
    head = _ONE.pack(0, 0x83 if timeouts else 0x03, len(spec.usage))
    return head + spec.usage + (_TIMEOUTS if timeouts else b"")


def _describe(table: Mapping[int, Entry], *, timeouts: bool) -> bytes:
    body = bytearray()
    for opcode in sorted(table):
        entry = table[opcode]
        specs = [entry] if isinstance(entry, Spec) else [entry[key] for key in sorted(entry)]
        for spec in specs:
            action = spec.service_action
            flags = (0x02 if timeouts else 0) | (0 if action is None else 0x01)
            body += _DESCRIPTOR.pack(opcode, action or 0, flags, len(spec.usage))
            if timeouts:
                body += _TIMEOUTS
    return len(body).to_bytes(4, "big") + body


def find_untrusted(table: Table, cdb: bytes) -> Spec | None:
    """Look up the command of a CDB; None if the unit does not implement the operation code.

    Raises:
        CheckCondition: The operation code is known but its service action is not.
    """
    entry = table.get(cdb[0])
    if entry is None or isinstance(entry, Spec):
        return entry
    if len(cdb) < 2:
        raise invalid_cdb_field(1)
    spec = entry.get(cdb[1] & 0x1F)
    if spec is None:
        raise invalid_cdb_field(1, 4)
    return spec


def check_shape_untrusted(spec: Spec, cdb: bytes) -> None:
    """Check what is the same for every CDB: its length and the CONTROL byte.

    Raises:
        CheckCondition: The CDB is shorter than the command, or asks for auto contingent
            allegiance (NACA), which this target does not have (SAM-5 5.2).
    """
    length = len(spec.usage)
    if len(cdb) < (spec.least or length):
        raise invalid_cdb_field(len(cdb))
    if len(cdb) >= length and cdb[length - 1] & 0x04:
        raise invalid_cdb_field(length - 1, 2)
