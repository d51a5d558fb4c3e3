"""Any record on the line of a shared disk, at either end."""

from __future__ import annotations

import contextlib
import json

import trio
from hypothesis import given, strategies as st

from storvsp.scsi import DataDirection, Outcome
from storvsp.shared.messages import (
    INFO,
    CommandRecord,
    DoneRecord,
    Kind,
    Line,
    decode_to_keeper_untrusted,
    decode_to_unit_untrusted,
    info_record,
    number_record,
)
from tests.support.scsi import MemoryDisk
from tests.support.shared import kept, visitor
from vmbus.errors import PeerProtocolError

KINDS = st.sampled_from(list(Kind))
RECORDS = (
    st.binary(max_size=60)
    | st.builds(number_record, KINDS, st.integers(0, 2**32 - 1))
    | st.builds(lambda kind, rest: bytes([kind]) + rest, KINDS, st.binary(min_size=35, max_size=35))
    | st.builds(
        lambda *fields: CommandRecord(*fields).encode(),
        st.integers(0, 3),
        st.binary(min_size=1, max_size=16),
        st.sampled_from(DataDirection),
        st.sampled_from([0, 512, 4096, 1 << 20]),
        st.sampled_from([0, 4096, 1 << 20]),
    )
    | st.dictionaries(st.sampled_from(list(INFO)), st.integers() | st.booleans() | st.text()).map(
        info_record
    )
)


@given(data=RECORDS, staging=st.sampled_from([0, 4096, 1 << 20]))
def test_a_record_is_understood_or_refused(data, staging):
    with contextlib.suppress(PeerProtocolError):
        match decode_to_keeper_untrusted(data, staging):
            case CommandRecord() as record:
                assert 0 < len(record.cdb) <= 16
                assert record.offset + record.length <= staging
            case (kind, number):
                assert Kind.ABORT <= kind <= Kind.GO_ON
                assert 0 <= number < 1 << 32
    with contextlib.suppress(PeerProtocolError):
        match decode_to_unit_untrusted(data):
            case DoneRecord(_, outcome):
                assert len(outcome.sense) <= 20
            case dict(info):
                assert type(info["size"]) is int
            case (kind, _):
                assert kind in {Kind.WAITED, Kind.HELD}


@given(
    number=st.integers(0, 2**32 - 1),
    cdb=st.binary(min_size=1, max_size=16),
    direction=st.sampled_from(DataDirection),
    length=st.integers(0, 4096),
    status=st.integers(0, 255),
    sense=st.binary(max_size=20),
)
def test_what_was_said_is_heard(number, cdb, direction, length, status, sense):
    command = CommandRecord(number, cdb, direction, length, 4096 - length)
    assert decode_to_keeper_untrusted(command.encode(), 4096) == command
    done = DoneRecord(number, Outcome(status, sense, length))
    assert decode_to_unit_untrusted(done.encode()) == done
    info = {"size": number, "read_only": False, "kind": "RamDisk", "warnings": []}
    assert decode_to_unit_untrusted(info_record(info)) == info
    assert json.loads(info_record(info)[1:]) == info


@given(records=st.lists(RECORDS, max_size=6))
def test_no_guest_harms_a_keeper_or_its_neighbours(records):
    async def main() -> None:
        async with kept(MemoryDisk()) as keeper:
            line = keeper.line("hostile")
            hostile = Line(line.sock)
            for record in filter(None, records):
                with contextlib.suppress(OSError):
                    await hostile.send(record)
            async with visitor(keeper, "good") as good:
                assert good.info["size"] == 128 * 512
            hostile.close()

    trio.run(main)


@given(records=st.lists(RECORDS, max_size=6))
def test_no_keeper_harms_a_guest(records):
    async def main() -> None:
        async with visitor(None, "guest") as unit:
            keeper = Line(unit.other.sock)
            for record in filter(None, records):
                with contextlib.suppress(OSError):
                    await keeper.send(record)
            keeper.close()
            await unit.known.wait()
            await unit.ended()

    trio.run(main)
