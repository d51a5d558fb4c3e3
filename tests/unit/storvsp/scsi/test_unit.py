"""Commands and their buffers."""

from storvsp.scsi import CdromUnit, Command, DataDirection
from storvsp.scsi.sense import CheckCondition, Sense
from storvsp.scsi.unit import fill
from tests.support.scsi import make_command, make_unit, run
from tests.support.scsi_blocks import filled_unit


def test_parameter_data_needs_a_buffer_that_points_to_the_guest():
    command, buffer = make_command(bytes(6), room=10, pieces=(3,))
    assert fill(command, b"abcdefghijkl", 8) == (0, b"", 8)
    assert buffer == b"abcdefgh\0\0"
    command, _ = make_command(bytes(6))
    assert fill(command, b"abc", 8) == (0, b"", 0)


async def test_parameter_data_into_an_outgoing_buffer_is_refused():
    disk, unit = make_unit()
    reply = await run(unit, "12 00 00 0024 00", out=b"x" * 36)
    assert (reply.fault, reply.buffer) == ((5, 0x2400), b"x" * 36)
    drive = CdromUnit(luns=list)
    assert (await run(drive, "12 00 00 0024 00", out=b"x" * 36)).fault == (5, 0x2400)
    assert disk.calls == []


def test_commands_describe_themselves():
    command = Command(b"\x12\0", [], 0, DataDirection.NONE, "guest")
    assert repr(command) == "<Command 12 00 NONE 0 B from 'guest'>"
    assert "5/2400" in str(CheckCondition(Sense(5, 0x2400)))


async def test_execute_does_everything_by_itself():
    disk, unit = filled_unit()
    for cdb, room in (("12 00 00 0024 00", 36), ("28 00 00000003 00 0002 00", 1024)):
        command, buffer = make_command(cdb, room=room)
        assert await unit.execute(command) == (0, b"", room)
    assert buffer == disk.data[1536:2560]
    for cdb in ("28 00 00000003 00 0000 00", "2a 00 00000003 00 0000 00"):
        command, _ = make_command(cdb)
        assert await unit.execute(command) == (0, b"", 0)
    command, _ = make_command("ff")
    assert (await unit.execute(command)).status == 2
