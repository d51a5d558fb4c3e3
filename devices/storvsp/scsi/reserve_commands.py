"""The reservation commands: PERSISTENT RESERVE IN and OUT, RESERVE and RELEASE.

The rules are in :mod:`storvsp.scsi.reservations`; here are the bytes (SPC-4 6.15 and 6.16).
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Hashable
from typing import Final

from storvsp.scsi import cdb as op
from storvsp.scsi.disk_core import DiskCore
from storvsp.scsi.sense import invalid_cdb_field, invalid_parameter, parameter_list_length_error
from storvsp.scsi.table import Access, Spec, usage
from storvsp.scsi.unit import GOOD, Command, Outcome, fill, take

_PARAMETERS = struct.Struct(">QQ4xB3x")
_HEADER = struct.Struct(">II")
_RESERVATION = struct.Struct(">Q4xxB2x")
_STATUS = struct.Struct(">Q4xBB4xHI")
_TRANSPORT = struct.Struct(">B7x16s")
_CAPABILITIES: Final = struct.pack(
    ">HBBBB2x",
    8,
    0x10,  # CRH; no SPEC_I_PT, no ALL_TG_PT, no persistence through power loss
    0x80,  # TMV: the type mask is valid
    0xEA,  # WR_EX_AR, EX_AC_RO, WR_EX_RO, EX_AC, WR_EX
    0x01,  # EX_AC_AR
)


def transport_id(initiator: Hashable) -> bytes:
    """Name an initiator in READ FULL STATUS.

    VMBus has no TransportID format. This is the 24-byte layout of the protocols whose initiator
    port has a 16-byte name (SPC-4 table 505), with the protocol identifier "no specific protocol":
    a GUID stands for itself, everything else for a digest of its ``repr``.
    """
    if isinstance(initiator, uuid.UUID):
        name = initiator.bytes
    else:
        name = hashlib.blake2b(repr(initiator).encode(), digest_size=16).digest()
    return _TRANSPORT.pack(0x0F, name)


def _allocation(command: Command) -> int:
    return int.from_bytes(command.cdb[7:9], "big")


def read_keys(unit: DiskCore, command: Command) -> Outcome:
    """READ KEYS."""
    state = unit.reservations
    keys = b"".join(key.to_bytes(8, "big") for key in state.keys.values())
    return fill(command, _HEADER.pack(state.generation, len(keys)) + keys, _allocation(command))


def read_reservation(unit: DiskCore, command: Command) -> Outcome:
    """READ RESERVATION."""
    state = unit.reservations
    body = _RESERVATION.pack(state.holder_key(), state.type) if state.type else b""
    return fill(command, _HEADER.pack(state.generation, len(body)) + body, _allocation(command))


def report_capabilities(_unit: DiskCore, command: Command) -> Outcome:
    """REPORT CAPABILITIES."""
    return fill(command, _CAPABILITIES, _allocation(command))


def read_full_status(unit: DiskCore, command: Command) -> Outcome:
    """READ FULL STATUS."""
    state = unit.reservations
    body = b""
    for initiator, key in state.keys.items():
        held = state.holds(initiator)
        name = transport_id(initiator)
        body += _STATUS.pack(key, int(held), state.type if held else 0, 1, len(name)) + name
    return fill(command, _HEADER.pack(state.generation, len(body)) + body, _allocation(command))


def persistent_reserve_out(unit: DiskCore, command: Command) -> Outcome:
    """PERSISTENT RESERVE OUT, the service actions that wait for nobody."""
    _change(unit, command)
    return Outcome(GOOD.status, b"", _PARAMETERS.size)


async def preempt_and_abort(unit: DiskCore, command: Command) -> Outcome:
    """PREEMPT AND ABORT, SPC-4 5.12.11.5: GOOD when nothing of the preempted moves any more.

    Whoever takes over a disk writes to it as soon as this has succeeded: a write of the old holder
    that was still in a worker then would land on top (SPC-4: "all commands from the preempted
    I_T nexus shall be terminated").
    """
    aborted = _change(unit, command)
    for initiator in aborted:
        await unit.ended(initiator)
    return Outcome(GOOD.status, b"", _PARAMETERS.size)


def _change(unit: DiskCore, command: Command) -> list[Hashable]:
    """Do what PERSISTENT RESERVE OUT says; returns the initiators whose commands are aborted."""
    cdb = command.cdb
    action = cdb[1] & 0x1F
    size = int.from_bytes(cdb[5:9], "big")
    if size < _PARAMETERS.size or size > command.length:
        raise parameter_list_length_error()
    key, new_key, flags = _PARAMETERS.unpack(take(command, _PARAMETERS.size))
    if action in {op.PR_REGISTER, op.PR_REGISTER_AND_IGNORE}:
        for bit in (3, 2, 0):  # SPEC_I_PT, ALL_TG_PT, APTPL
            if flags & 1 << bit:
                raise invalid_parameter(20, bit)
    if size != _PARAMETERS.size:
        raise parameter_list_length_error()
    effect = unit.reservations.change(command.initiator, action, cdb[2], key, new_key)
    for initiator, code in effect.attentions:
        unit.attentions.add(initiator, code)
    unit.refresh()
    for initiator in effect.aborted:
        unit.abort(initiator)
    return effect.aborted


def reserve(unit: DiskCore, command: Command) -> Outcome:
    """RESERVE(6) and (10), SPC-2 7.21: the whole unit, for oneself."""
    _check_whole_unit_untrusted(command.cdb)
    unit.reservations.reserve(command.initiator)
    unit.refresh()
    return GOOD


def release(unit: DiskCore, command: Command) -> Outcome:
    """RELEASE(6) and (10), SPC-2 7.16."""
    _check_whole_unit_untrusted(command.cdb)
    unit.reservations.release(command.initiator)
    unit.refresh()
    return GOOD


def _check_whole_unit_untrusted(cdb: bytes) -> None:
    """Refuse third-party and extent reservations, which SPC-2 already called obsolete."""
    if cdb[1] & 0x10:
        raise invalid_cdb_field(1, 4)
    if cdb[1] & 0x01:
        raise invalid_cdb_field(1, 0)


_PR_IN = usage("5e 1f 00 00 00 00 00 ffff 04")

COMMANDS: Final = (
    Spec(op.RESERVE_6, usage("16 11 00 00 00 04"), Access.FREE, reserve),
    Spec(op.RELEASE_6, usage("17 11 00 00 00 04"), Access.FREE, release),
    Spec(op.RESERVE_10, usage("56 11 00 00 00 00 00 0000 04"), Access.FREE, reserve),
    Spec(op.RELEASE_10, usage("57 11 00 00 00 00 00 0000 04"), Access.FREE, release),
    *(
        Spec(op.PERSISTENT_RESERVE_IN, _PR_IN, Access.STATUS, handler, service_action=action)
        for action, handler in (
            (op.PR_READ_KEYS, read_keys),
            (op.PR_READ_RESERVATION, read_reservation),
            (op.PR_REPORT_CAPABILITIES, report_capabilities),
            (op.PR_READ_FULL_STATUS, read_full_status),
        )
    ),
    *(
        Spec(
            op.PERSISTENT_RESERVE_OUT,
            usage("5f 1f ff 0000 ffffffff 04"),
            Access.FREE,
            persistent_reserve_out,
            service_action=action,
        )
        for action in range(op.PR_REGISTER_AND_IGNORE + 1)
        if action != op.PR_PREEMPT_AND_ABORT
    ),
    Spec(
        op.PERSISTENT_RESERVE_OUT,
        usage("5f 1f ff 0000 ffffffff 04"),
        Access.FREE,
        slow=preempt_and_abort,
        service_action=op.PR_PREEMPT_AND_ABORT,
        gated=False,
    ),
)
"""Rows of the dispatch table."""
