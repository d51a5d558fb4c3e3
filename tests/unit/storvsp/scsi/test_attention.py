"""Unit attentions: who is told, once, and before what."""

from storvsp.scsi.attention import MAX_INITIATORS, MAX_PENDING, Attentions
from storvsp.scsi.sense import REPORTED_LUNS_DATA_HAS_CHANGED
from tests.support.scsi import hexes, make_unit, run


async def test_request_sense_tells_and_settles_a_unit_attention():
    disk, unit = make_unit()
    nothing = hexes("70 00 00 00000000 0a 00000000 00 00 00 000000")
    assert (await run(unit, "03 00 00 00 ff 00", room=255)).data == nothing
    assert (await run(unit, "03 01 00 00 ff 00", room=255)).data == hexes("7200000000000000")
    disk.resize(200)
    reply = await run(unit, "03 00 00 00 ff 00", room=255)
    assert reply.data == hexes("70 00 06 00000000 0a 00000000 2a 09 00 000000")
    assert (await run(unit, "00" * 6)).status == 0
    disk.resize(100)
    reply = await run(unit, "03 01 00 00 ff 00", room=255)
    assert reply.data == hexes("72062a0900000000")
    assert (await run(unit, "03 00 00 00 04 00", room=255)).data == nothing[:4]


async def test_report_luns_settles_the_attention_that_it_has_changed():
    _, unit = make_unit()
    await run(unit, "00" * 6)
    unit.raise_attention(REPORTED_LUNS_DATA_HAS_CHANGED)
    unit.raise_attention(REPORTED_LUNS_DATA_HAS_CHANGED)
    assert (await run(unit, "12 00 00 0024 00", room=36)).status == 0
    assert (await run(unit, "a0" + "00" * 11, room=64)).status == 0
    assert (await run(unit, "00" * 6)).status == 0
    unit.raise_attention(REPORTED_LUNS_DATA_HAS_CHANGED)
    assert (await run(unit, "00" * 6)).fault == (6, 0x3F0E)
    assert (await run(unit, "00" * 6)).status == 0


async def test_attentions_come_before_everything_wrong_with_the_command():
    _, unit = make_unit()
    for cdb in ("ff" + "00" * 9, "9e 1f" + "00" * 14, "28 20" + "00" * 8):
        await run(unit, "00" * 6)
        unit.raise_attention(0x3F0E)
        assert (await run(unit, cdb)).fault == (6, 0x3F0E)
        assert (await run(unit, cdb)).fault[0] == 5


def test_attentions_are_bounded_and_a_reset_supersedes_them():
    attentions = Attentions()
    for number in range(MAX_INITIATORS + 5):
        assert attentions.know(number)
    assert not attentions.know(MAX_INITIATORS)
    assert list(attentions) == list(range(5, MAX_INITIATORS + 5))
    attentions.add(0, 0x2A09)  # forgotten
    assert attentions.pop(0) is None
    for code in range(MAX_PENDING + 10):
        attentions.add(7, code)
    attentions.clear(7, 3)
    attentions.clear(7, 0xFFFF)
    attentions.clear(8, 3)
    assert [attentions.pop(7) for _ in range(MAX_PENDING - 1)] == [
        code for code in range(MAX_PENDING) if code != 3
    ]
    assert not attentions.pending(7)
    attentions.add(7, 0x2A09)
    attentions.add_all(0x2903, but=8)
    assert attentions.pop(7) == 0x2903
    assert attentions.pop(7) is None
    assert not attentions.pending(8)
    attentions.forget(7)
    attentions.forget(7)
    assert 7 not in list(attentions)


async def test_a_detached_initiator_is_not_told():
    disk, unit = make_unit()
    await run(unit, "00" * 6)
    disk.resize(10)
    unit.detach("guest")
    assert (await run(unit, "00" * 6)).status == 0
