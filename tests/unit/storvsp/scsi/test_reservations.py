"""Persistent reservations, RESERVE and RELEASE, between several initiators of one unit."""

import hashlib
import struct
import uuid
from collections.abc import Hashable

import pytest
import trio
import trio.testing

from storvsp.scsi import DiskUnit
from storvsp.scsi.reservations import MAX_REGISTRATIONS, TYPES
from tests.support.scsi import MemoryDisk, Reply, make_command, run

CONFLICT = 0x18
READY = "00" * 6
READ = "28 00 00000000 00 0001 00"
WRITE = "2a 00 00000000 00 0001 00"
REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, IGNORE = range(7)
WE, EA, WE_RO, EA_RO, WE_AR, EA_AR = 1, 3, 5, 6, 7, 8


class Cluster:
    """A unit and shorthand for initiators "a", "b", "c" whose keys are 1, 2, 3."""

    def __init__(self) -> None:
        self.disk = MemoryDisk(supports_unmap=True, removable=True)
        self.unit = DiskUnit(self.disk, luns=lambda: [0])

    async def out(
        self,
        who: Hashable,
        action: int,
        kind: int = 0,
        key: int = 0,
        new: int = 0,
        flags: int = 0,
        size: int = 24,
        room: int | None = None,
    ) -> Reply:
        cdb = struct.pack(">BBBHIB", 0x5F, action, kind, 0, size, 0)
        data = struct.pack(">QQ4xB3x", key, new, flags).ljust(size if room is None else room, b"\0")
        return await run(self.unit, cdb, out=data[:room], initiator=who)

    async def join(self, *names: str) -> None:
        for name in names:
            reply = await self.out(name, REGISTER, new=ord(name) - 96)
            assert (reply.status, reply.transferred) == (0, 24)

    async def ask(self, action: int, who: Hashable = "x", room: int = 512) -> bytes:
        cdb = struct.pack(">BB5xHB", 0x5E, action, room, 0)
        reply = await run(self.unit, cdb, room=room, initiator=who)
        assert reply.status == 0
        return reply.data

    async def keys(self) -> list[int]:
        data = await self.ask(0)
        assert int.from_bytes(data[4:8], "big") == len(data) - 8
        return [int.from_bytes(data[at : at + 8], "big") for at in range(8, len(data), 8)]

    async def held(self) -> tuple[int, int] | None:
        data = await self.ask(1)
        if len(data) == 8:
            return None
        assert data[4:8] == b"\0\0\0\x10"
        return int.from_bytes(data[8:16], "big"), data[21]

    async def generation(self) -> int:
        return int.from_bytes((await self.ask(0))[:4], "big")

    async def status(self, who: Hashable, cdb: str) -> int:
        if bytes.fromhex(cdb)[0] in {0x28, 0x5A, 0x1A}:
            reply = await run(self.unit, cdb, room=512, initiator=who)
        else:
            reply = await run(self.unit, cdb, out=bytes(512), initiator=who)
        return reply.status

    async def attention(self, who: Hashable) -> int | None:
        reply = await run(self.unit, READY, initiator=who)
        return reply.fault[1] if reply.status else None


async def test_registrations_come_change_and_go():
    cluster = Cluster()
    await cluster.join("a", "b")
    assert await cluster.keys() == [1, 2]
    assert await cluster.generation() == 2
    assert (await cluster.out("a", REGISTER, key=9, new=5)).status == CONFLICT
    assert (await cluster.out("a", REGISTER, key=1, new=5)).status == 0
    assert await cluster.keys() == [5, 2]
    assert (await cluster.out("c", REGISTER, key=1, new=5)).status == CONFLICT
    assert (await cluster.out("c", IGNORE, key=1, new=7)).status == 0
    assert (await cluster.out("c", IGNORE, key=99, new=8)).status == 0
    assert await cluster.keys() == [5, 2, 8]
    assert (await cluster.out("c", IGNORE, new=0)).status == 0
    assert (await cluster.out("a", REGISTER, key=5, new=0)).status == 0
    assert await cluster.keys() == [2]
    assert await cluster.generation() == 7
    assert (await cluster.out("a", REGISTER, new=0)).status == 0
    assert await cluster.generation() == 7


async def test_registrations_are_bounded():
    cluster = Cluster()
    for number in range(MAX_REGISTRATIONS):
        assert (await cluster.out(number, REGISTER, new=1)).status == 0
    assert (await cluster.out("late", REGISTER, new=1)).fault == (5, 0x5504)
    assert (await cluster.out(0, REGISTER, key=1, new=2)).status == 0


@pytest.mark.parametrize(("flags", "bit"), [(1, 0), (4, 2), (8, 3), (9, 3)])
async def test_what_cannot_be_kept_is_refused_by_name(flags, bit):
    cluster = Cluster()
    for action in (REGISTER, IGNORE):
        reply = await cluster.out("a", action, new=1, flags=flags)
        assert (reply.fault, reply.pointer) == ((5, 0x2600), (20, bit, False))
    reply = await cluster.out("a", REGISTER, new=1, flags=8, size=48)
    assert reply.fault == (5, 0x2600)


async def test_parameter_lists_have_24_bytes():
    cluster = Cluster()
    for size in (0, 23, 25, 0xFFFFFFFF):
        assert (await cluster.out("a", REGISTER, new=1, size=size, room=64)).fault == (5, 0x1A00)
    assert (await cluster.out("a", REGISTER, new=1, room=23)).fault == (5, 0x1A00)
    assert await cluster.keys() == []


async def test_a_reservation_is_made_reported_and_released():
    cluster = Cluster()
    await cluster.join("a", "b")
    assert await cluster.held() is None
    assert (await cluster.out("c", RESERVE, WE)).status == CONFLICT
    assert (await cluster.out("a", RESERVE, WE, key=2)).status == CONFLICT
    assert (await cluster.out("a", RESERVE, WE, key=1)).status == 0
    assert await cluster.held() == (1, WE)
    assert (await cluster.out("a", RESERVE, WE, key=1)).status == 0
    assert (await cluster.out("a", RESERVE, EA, key=1)).status == CONFLICT
    assert (await cluster.out("b", RESERVE, WE, key=2)).status == CONFLICT
    assert (await cluster.out("b", RELEASE, WE, key=2)).status == 0
    assert await cluster.held() == (1, WE)
    assert (await cluster.out("a", RELEASE, EA, key=1)).fault == (5, 0x2604)
    assert (await cluster.out("a", RELEASE, WE, key=1)).status == 0
    assert await cluster.held() is None
    assert (await cluster.out("a", RELEASE, WE, key=1)).status == 0
    assert await cluster.generation() == 2
    assert await cluster.attention("b") is None


async def test_scopes_and_types_that_do_not_exist_are_refused():
    cluster = Cluster()
    await cluster.join("a")
    for kind in set(range(16)) - TYPES:
        assert (await cluster.out("a", RESERVE, kind, key=1)).pointer == (2, 3, True)
    for action in (RESERVE, RELEASE, PREEMPT):
        assert (await cluster.out("a", action, 0x21, key=1, new=1)).pointer == (2, 7, True)
    await cluster.out("a", RESERVE, WE, key=1)
    assert (await cluster.out("a", PREEMPT, 0, key=1, new=1)).pointer == (2, 3, True)


@pytest.mark.parametrize("kind", [WE_RO, EA_RO, WE_AR, EA_AR])
async def test_releasing_a_shared_reservation_is_announced_to_registrants(kind):
    cluster = Cluster()
    await cluster.join("a", "b")
    await run(cluster.unit, READY, initiator="c")
    assert (await cluster.out("a", RESERVE, kind, key=1)).status == 0
    assert await cluster.held() == (0 if kind in {WE_AR, EA_AR} else 1, kind)
    assert (await cluster.out("a", RELEASE, kind, key=1)).status == 0
    assert await cluster.attention("a") is None
    assert await cluster.attention("b") == 0x2A04
    assert await cluster.attention("c") is None


ALLOWED, WRITES_ONLY, NEVER = "allowed", "only writes exclude it", "always excluded"
RULES = {
    "12 00 00 0000 00": ALLOWED,  # INQUIRY
    "03 00 00 00 00 00": ALLOWED,  # REQUEST SENSE
    READY: ALLOWED,
    "a0" + "00" * 11: ALLOWED,  # REPORT LUNS
    "25" + "00" * 9: ALLOWED,  # READ CAPACITY
    "9e 10" + "00" * 14: ALLOWED,
    "4d" + "00" * 9: ALLOWED,  # LOG SENSE
    "5e 00" + "00" * 8: ALLOWED,  # PERSISTENT RESERVE IN
    "1b 00 00 00 01 00": ALLOWED,  # START STOP UNIT, START
    "1e 00 00 00 00 00": ALLOWED,  # PREVENT ALLOW, allow
    READ: WRITES_ONLY,
    "88" + "00" * 15: WRITES_ONLY,
    "08 000000 01 00": WRITES_ONLY,
    "1a 00 3f 00 ff 00": WRITES_ONLY,  # MODE SENSE
    "5a 00 3f 00 00 00 00 00ff 00": WRITES_ONLY,
    "2f" + "00" * 9: WRITES_ONLY,  # VERIFY
    "34" + "00" * 9: WRITES_ONLY,  # PRE-FETCH
    "37" + "00" * 9: WRITES_ONLY,  # READ DEFECT DATA
    "9e 12" + "00" * 14: WRITES_ONLY,  # GET LBA STATUS
    "a3 0c" + "00" * 10: WRITES_ONLY,  # REPORT SUPPORTED OPERATION CODES
    WRITE: NEVER,
    "8a" + "00" * 15: NEVER,
    "2e" + "00" * 9: NEVER,
    "35" + "00" * 9: NEVER,  # SYNCHRONIZE CACHE
    "41 00 00000000 00 0001 00": NEVER,
    "42" + "00" * 9: NEVER,  # UNMAP
    "89" + "00" * 15: NEVER,  # COMPARE AND WRITE
    "8b" + "00" * 15: NEVER,
    "15 10 00 00 00 00": NEVER,  # MODE SELECT
    "1d 04 00 0000 00": NEVER,  # SEND DIAGNOSTIC
    "04 00 00 00 00 00": NEVER,  # FORMAT UNIT
    "1b 00 00 00 00 00": NEVER,  # START STOP UNIT, STOP
    "1b 00 00 00 31 00": NEVER,  # ... power condition
    "1e 00 00 00 01 00": NEVER,  # PREVENT ALLOW, prevent
}


@pytest.mark.parametrize("kind", sorted(TYPES))
async def test_the_conflict_table_holds_for_every_type(kind):
    cluster = Cluster()
    await cluster.join("a", "b")
    await cluster.out("a", RESERVE, kind, key=1)
    await run(cluster.unit, READY, initiator="c")
    exclusive = kind in {EA, EA_RO, EA_AR}
    for cdb, rule in RULES.items():
        for _ in range(2):
            conflict = rule == NEVER or (rule == WRITES_ONLY and exclusive)
            assert (await cluster.status("c", cdb) == CONFLICT) == conflict, cdb
            registered = conflict and kind in {WE, EA}
            assert (await cluster.status("b", cdb) == CONFLICT) == registered, cdb
            assert await cluster.status("a", cdb) != CONFLICT, cdb
        await cluster.status("a", "1e 00 00 00 00 00")
        await cluster.status("b", "1e 00 00 00 00 00")


async def test_a_conflict_leaves_unit_attentions_pending():
    cluster = Cluster()
    await cluster.join("a")
    await cluster.out("a", RESERVE, EA, key=1)
    await run(cluster.unit, READY, initiator="c")
    cluster.unit.raise_attention(0x2A09, but="a")
    assert await cluster.status("c", READ) == CONFLICT
    assert await cluster.attention("c") == 0x2A09


async def test_clear_removes_everything_and_tells_the_others():
    cluster = Cluster()
    await cluster.join("a", "b")
    await cluster.out("a", RESERVE, EA, key=1)
    assert (await cluster.out("c", CLEAR)).status == CONFLICT
    assert (await cluster.out("b", CLEAR, key=2)).status == 0
    assert await cluster.keys() == []
    assert await cluster.held() is None
    assert await cluster.attention("a") == 0x2A03
    assert await cluster.attention("b") is None
    assert await cluster.status("c", WRITE) == 0


async def test_unregistering_the_holder_ends_the_reservation():
    cluster = Cluster()
    await cluster.join("a", "b")
    await cluster.out("a", RESERVE, WE_RO, key=1)
    await cluster.out("a", REGISTER, key=1)
    assert await cluster.held() is None
    assert await cluster.attention("b") == 0x2A04
    await cluster.join("a")
    await cluster.out("a", RESERVE, WE, key=1)
    await cluster.out("a", REGISTER, key=1)
    assert await cluster.attention("b") is None
    await cluster.out("b", RESERVE, EA_AR, key=2)
    await cluster.join("a")
    await cluster.out("b", REGISTER, key=2)
    assert await cluster.held() == (0, EA_AR)
    await cluster.out("a", REGISTER, key=1)
    assert await cluster.held() is None


@pytest.mark.parametrize("action", [PREEMPT, PREEMPT_AND_ABORT])
async def test_preempting_the_holder_takes_the_reservation_over(action):
    cluster = Cluster()
    await cluster.join("a", "b", "c")
    await cluster.out("a", RESERVE, WE_RO, key=1)
    generation = await cluster.generation()
    assert (await cluster.out("x", action, EA, new=1)).status == CONFLICT
    assert (await cluster.out("b", action, EA, key=2, new=1)).status == 0
    assert await cluster.held() == (2, EA)
    assert await cluster.keys() == [2, 3]
    assert await cluster.generation() == generation + 1
    assert await cluster.attention("a") == 0x2A05
    assert await cluster.attention("b") is None
    assert await cluster.attention("c") == 0x2A04
    # Preempting oneself changes the type only.
    assert (await cluster.out("b", action, EA_RO, key=2, new=2)).status == 0
    assert await cluster.held() == (2, EA_RO)
    assert await cluster.attention("c") is None


async def test_preempting_a_registration_leaves_the_reservation():
    cluster = Cluster()
    await cluster.join("a", "b", "c")
    await cluster.out("a", RESERVE, WE, key=1)
    assert (await cluster.out("b", PREEMPT, WE, key=2, new=77)).status == CONFLICT
    assert (await cluster.out("b", PREEMPT, WE, key=2, new=0)).pointer == (8, None, False)
    assert (await cluster.out("b", PREEMPT, WE, key=2, new=3)).status == 0
    assert await cluster.keys() == [1, 2]
    assert await cluster.held() == (1, WE)
    assert await cluster.attention("c") == 0x2A05
    assert (await cluster.out("b", PREEMPT, WE, key=2, new=2)).status == 0  # itself
    assert await cluster.keys() == [1]


async def test_preempting_all_registrants():
    cluster = Cluster()
    await cluster.join("a", "b", "c")
    await cluster.out("a", RESERVE, EA_AR, key=1)
    assert (await cluster.out("b", PREEMPT, WE, key=2, new=3)).status == 0
    assert await cluster.held() == (0, EA_AR)
    assert (await cluster.out("b", PREEMPT, WE, key=2, new=0)).status == 0
    assert await cluster.held() == (2, WE)
    assert await cluster.keys() == [2]
    for other in "ac":
        assert await cluster.attention(other) == 0x2A05


async def test_preempting_a_key_that_all_registrants_share_ends_the_reservation():
    cluster = Cluster()
    for who in "ab":
        await cluster.out(who, REGISTER, new=5)
    await cluster.out("a", RESERVE, WE_AR, key=5)
    assert (await cluster.out("a", PREEMPT, WE_AR, key=5, new=5)).status == 0
    assert await cluster.keys() == []
    assert await cluster.held() is None


async def test_preempt_and_abort_aborts_only_the_victims_commands():
    cluster = Cluster()
    await cluster.join("a", "b", "c")
    await cluster.out("a", RESERVE, WE_RO, key=1)
    cluster.disk.inline = False
    cluster.disk.pause = trio.Event()
    ends = {}

    async def write(who):
        command, _ = make_command(WRITE, out=bytes(512), initiator=who)
        ends[who] = (await cluster.unit.execute(command)).status

    async with trio.open_nursery() as nursery:
        for who in "ac":
            nursery.start_soon(write, who)
        await trio.testing.wait_all_tasks_blocked()
        reply = await cluster.out("b", PREEMPT_AND_ABORT, WE_RO, key=2, new=1)
        assert reply.status == 0
        await trio.testing.wait_all_tasks_blocked()
        assert ends == {"a": 0x40}
        cluster.disk.pause.set()
    assert ends == {"a": 0x40, "c": 0}


async def test_capabilities_are_reported():
    cluster = Cluster()
    assert (await cluster.ask(2)).hex() == "00081080ea010000"
    assert await cluster.ask(2, room=3) == b"\0\x08\x10"


async def test_full_status_names_every_registrant():
    cluster = Cluster()
    guid = uuid.UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
    await cluster.out(guid, REGISTER, new=0x1122334455667788)
    await cluster.out("b", REGISTER, new=2)
    await cluster.out("b", RESERVE, WE_RO, key=2)
    data = await cluster.ask(3)
    name = hashlib.blake2b(b"'b'", digest_size=16).digest()
    assert data.hex() == (
        "00000002 00000060"
        " 1122334455667788 00000000 00 00 00000000 0001 00000018"
        f" 0f00000000000000 {guid.hex}"
        " 0000000000000002 00000000 01 05 00000000 0001 00000018"
        f" 0f00000000000000 {name.hex()}"
    ).replace(" ", "")


async def test_a_persistent_reservation_survives_reset_and_detach():
    cluster = Cluster()
    await cluster.join("a")
    await cluster.out("a", RESERVE, EA, key=1)
    cluster.unit.reset()
    cluster.unit.detach("a")
    assert await cluster.attention("x") is None
    assert await cluster.held() == (1, EA)


RESERVE_6, RELEASE_6 = "16 00 00 00 00 00", "17 00 00 00 00 00"
RESERVE_10, RELEASE_10 = "56" + "00" * 9, "57" + "00" * 9


@pytest.mark.parametrize(("reserve", "release"), [(RESERVE_6, RELEASE_6), (RESERVE_10, RELEASE_10)])
async def test_reserve_keeps_others_out_until_release(reserve, release):
    cluster = Cluster()
    for _ in range(2):
        assert await cluster.status("a", reserve) == 0
    assert await cluster.status("b", reserve) == CONFLICT
    for cdb, rule in RULES.items():
        allowed = rule == ALLOWED and cdb != READY and not cdb.startswith("5e")
        assert (await cluster.status("b", cdb) == CONFLICT) == (not allowed), cdb
        assert await cluster.status("a", cdb) != CONFLICT
    assert (await cluster.out("b", REGISTER, new=2)).status == CONFLICT
    assert (await cluster.out("a", REGISTER, new=2)).status == CONFLICT
    await cluster.status("a", "1e 00 00 00 00 00")
    assert await cluster.status("b", release) == 0  # no effect
    assert await cluster.status("b", READ) == CONFLICT
    assert await cluster.status("a", release) == 0
    assert await cluster.status("b", READ) == 0


async def test_a_reset_and_a_lost_initiator_end_reserve():
    cluster = Cluster()
    await cluster.status("a", RESERVE_6)
    cluster.unit.detach("a")
    assert await cluster.status("b", RESERVE_6) == 0
    cluster.unit.reset()
    assert await cluster.attention("b") == 0x2903
    assert await cluster.status("a", RESERVE_6) == 0


async def test_persistent_registrations_exclude_reserve_but_not_for_those_let_in():
    cluster = Cluster()
    await cluster.join("a", "b")
    assert await cluster.status("a", RESERVE_6) == CONFLICT
    await cluster.out("a", RESERVE, WE, key=1)
    assert await cluster.status("a", RESERVE_6) == 0
    assert await cluster.status("b", RESERVE_6) == CONFLICT
    await cluster.out("a", RELEASE, WE, key=1)
    await cluster.out("a", RESERVE, WE_RO, key=1)
    assert await cluster.status("b", RESERVE_6) == 0
    assert await cluster.status("c", RESERVE_6) == CONFLICT
    assert await cluster.status("b", RELEASE_6) == 0
    assert await cluster.held() == (1, WE_RO)


async def test_third_party_and_extent_reservations_are_refused():
    cluster = Cluster()
    for opcode, size in ((0x16, 6), (0x17, 6), (0x56, 10), (0x57, 10)):
        for flag, bit in ((0x10, 4), (0x01, 0)):
            reply = await run(cluster.unit, bytes((opcode, flag)).ljust(size, b"\0"))
            assert reply.pointer == (1, bit, True)


async def test_the_generation_wraps_at_32_bits():
    cluster = Cluster()
    cluster.unit.reservations.generation = 0xFFFFFFFF
    await cluster.join("a")
    assert await cluster.generation() == 0
