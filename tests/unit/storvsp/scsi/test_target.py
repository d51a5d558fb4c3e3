"""REPORT LUNS, and the answers for absent units."""

from collections.abc import Sequence
from typing import Any

import pytest

from storvsp.scsi import Outcome, absent_unit
from storvsp.scsi.target import encode_lun
from tests.support.scsi import hexes, make_command, make_unit, run


async def test_report_luns_lists_all_units():
    """Checklist row 21: also with allocation length 0, as UEFI firmware sends it."""
    _, unit = make_unit(luns=[300, 0, 2, 2])
    listed = hexes("00000018 00000000 0000000000000000 0002000000000000 412c000000000000")
    for cdb in (
        "a0 00 00 000000 00001000 00 00",
        "a0 00 02 000000 00001000 00 00",
        "a0 00 00 000000 00000000 00 00",
    ):
        assert (await run(unit, cdb, room=4096)).data == listed
    assert (await run(unit, "a0 00 00 000000 00000010 00 00", room=4096)).data == listed[:16]
    assert (await run(unit, "a0 00 00 000000 00000007 00 00", room=4096)).data == listed[:7]
    for select in (0x01, 0x10, 0x11, 0x12):
        short = bytes((0xA0, 0, select, 0, 0, 0, 0, 0, 0, 255, 0, 0))
        assert (await run(unit, short, room=4096)).data == bytes(8)
    assert (await run(unit, "a0 00 03 000000 00001000 00 00", room=16)).pointer == (2, None, True)
    assert (await run(unit, "a0 00 00 000000 00000000 00 00")).transferred == 0


def test_luns_are_encoded_by_size():
    assert encode_lun(255) == hexes("00ff000000000000")
    assert encode_lun(0x3FFF) == hexes("7fff000000000000")
    for bad in (-1, 0x4000):
        with pytest.raises(ValueError, match="LUN"):
            encode_lun(bad)


def answer_absent(
    cdb: str | bytes, luns: Sequence[int] = (), **keywords: Any
) -> tuple[Outcome, bytes]:
    command, buffer = make_command(cdb, **keywords)
    outcome = absent_unit(command, luns)
    assert outcome is not None
    return outcome, bytes(buffer)


def test_an_absent_unit_answers_inquiry_with_7f():
    """Checklist row 21."""
    outcome, buffer = answer_absent("12 00 00 0024 00", room=255)
    assert outcome == (0, b"", 36)
    assert buffer[:36] == hexes("7f 00 05 02 1f") + bytes(31)
    outcome, buffer = answer_absent("12 01 83 00ff 00", room=255)
    assert outcome == (0, b"", 4)
    assert buffer[:4] == hexes("7f830000")
    assert answer_absent("12 00 00 0000 00", room=255)[0] == (0, b"", 0)
    assert answer_absent("12 00 00 00ff 00", room=5)[0] == (0, b"", 5)
    assert answer_absent("12 00 00")[0].status == 2
    assert answer_absent("12 00 00 00ff 00", out=bytes(255))[0].status == 2


def test_report_luns_is_good_for_an_absent_unit():
    """Checklist row 21: every target answers, an empty one with an empty list."""
    outcome, buffer = answer_absent("a0" + "00" * 11, room=64)
    assert (outcome, buffer[:8]) == ((0, b"", 8), bytes(8))
    outcome, buffer = answer_absent("a0" + "00" * 11, luns=[1], room=64)
    assert (outcome, buffer[:16]) == ((0, b"", 16), hexes("0000000800000000 0001000000000000"))
    assert answer_absent("a0 00 00")[0].status == 2


def test_everything_else_at_an_absent_unit_is_left_to_the_controller():
    """Checklist row 21: the controller answers INVALID_LUN."""
    for opcode in set(range(256)) - {0x12, 0xA0}:
        command, _ = make_command(bytes([opcode]) + bytes(15), room=64)
        assert absent_unit(command, [0]) is None
    command, _ = make_command("")
    assert absent_unit(command, [0]) is None
