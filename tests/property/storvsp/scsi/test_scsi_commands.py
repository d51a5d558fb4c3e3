"""Whatever a guest sends, a unit answers within the rules."""

import functools
import struct
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings, strategies as st

from storvsp.scsi import CdromUnit, DiskUnit, absent_unit
from storvsp.scsi.cdb import check_transfer_flags_untrusted, decode_transfer_untrusted
from storvsp.scsi.cdrom_data import (
    configuration_untrusted,
    disc_information_untrusted,
    dvd_structure_untrusted,
    event_status_untrusted,
    performance_untrusted,
    toc_untrusted,
    track_information_untrusted,
)
from storvsp.scsi.cdrom_unit import TABLE
from storvsp.scsi.disk_provision import parse_unmap_untrusted
from storvsp.scsi.medium import Medium
from storvsp.scsi.modes import ModePages, cdrom_pages, disk_pages
from storvsp.scsi.sense import CheckCondition
from storvsp.scsi.table import (
    Spec,
    Table,
    check_shape_untrusted,
    find_untrusted,
    report_supported_opcodes_untrusted,
)
from storvsp.scsi.target import report_luns_untrusted
from storvsp.scsi.unit import Command, DataDirection, data_in_untrusted
from tests.support.scsi import MemoryDisk, finish, make_command

T = TypeVar("T")
GUARD = 64
BLOCKS = 32
STATUSES = {0x00, 0x02, 0x18, 0x40}


def opcodes(table: Table) -> Iterator[bytes]:
    for opcode, entry in table.items():
        if isinstance(entry, Spec):
            yield bytes([opcode])
        else:
            yield from (bytes((opcode, action)) for action in entry)


KNOWN = sorted({*opcodes(DiskUnit(MemoryDisk(supports_unmap=True), luns=list).table),
                *opcodes(TABLE)})  # fmt: skip
SMALL = st.integers(0, BLOCKS + 2)


@st.composite
def cdbs(draw):
    """Arbitrary bytes, and CDBs that are nearly right."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.binary(max_size=16))
    head = draw(st.sampled_from(KNOWN))
    if kind == 1:
        return (head + draw(st.binary(min_size=15, max_size=15)))[:16]
    flags = b"" if len(head) == 2 else bytes([draw(st.sampled_from([0, 0, 0x02, 0x08, 0x06, 1]))])
    lba, count = draw(SMALL), draw(SMALL)
    group = head[0] >> 5
    if group == 0:
        return head + bytes((0, 0, lba, count, 0)) if len(head) == 1 else head + bytes(5)
    if group == 4:
        return head + flags + struct.pack(">QIBB", lba, count, draw(SMALL), 0)
    if group == 5:
        return head + flags + struct.pack(">IIBB", lba, count, 0, 0)
    return head + flags + struct.pack(">IBHB", lba, 0, count, 0)


@st.composite
def commands(draw):
    """A command and the buffer behind it, with a guard at its end."""
    length = draw(st.one_of(st.integers(0, 64), st.integers(0, 3 * 4096),
                            st.sampled_from([24, 512, 1024, 2048, 4096])))  # fmt: skip
    seed = draw(st.binary(min_size=1, max_size=40))
    buffer = bytearray((seed * (length // len(seed) + 1))[:length]) + bytearray(b"\xa5" * GUARD)
    view = memoryview(buffer)[:length]
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
    data = [view[a:b] for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    direction = draw(st.sampled_from(list(DataDirection)))
    command = Command(draw(cdbs()), data, length, direction, draw(st.sampled_from("ab")))
    return command, buffer


class Counting(MemoryDisk):
    """Fails the test if the SCSI layer breaks the disk contract."""

    def _check(self, offset, buffers):
        size = super()._check(offset, buffers)
        assert offset >= 0
        assert offset + size <= len(self.data)
        return size

    async def unmap(self, offset, length):
        assert offset >= 0
        assert offset + length <= len(self.data)
        await super().unmap(offset, length)


def a_disk(**changes: Any) -> Callable[[], DiskUnit | CdromUnit]:
    return lambda: DiskUnit(Counting(BLOCKS, **changes), luns=lambda: [0, 1])


UNITS: list[Callable[[], DiskUnit | CdromUnit]] = [
    a_disk(),
    a_disk(read_only=True),
    a_disk(supports_unmap=True, max_transfer=1024),
    lambda: CdromUnit(Counting(BLOCKS, sector_size=2048, read_only=True), luns=list),
    lambda: CdromUnit(luns=list),
]


@pytest.mark.parametrize("make", UNITS)
@pytest.mark.parametrize("inline", [True, False])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batch=st.lists(commands(), min_size=1, max_size=8))
def test_every_command_has_one_outcome_within_its_bounds(make, inline, batch):
    unit = make()
    if isinstance(unit.disk, Medium) and isinstance(unit.disk.disk, MemoryDisk):
        unit.disk.disk.inline = inline

    async def main():
        for command, buffer in batch:
            before = bytes(buffer)
            status, sense, transferred = await finish(unit, command)
            assert status in STATUSES
            assert len(sense) <= 20
            assert bool(sense) == (status == 2)
            assert 0 <= transferred <= command.length
            if status:
                assert transferred == 0
            if sense:
                assert sense[0] & 0x7F == 0x70
                assert sense[2] in {2, 3, 4, 5, 6, 7, 0xE}
                assert sense[2:3] + sense[12:13] != b"\x04\x44"  # nobody failed inside
            if command.direction == DataDirection.READ:
                assert buffer[transferred:] == before[transferred:] or status
            else:
                assert buffer == before
            assert buffer[command.length :] == b"\xa5" * GUARD

    trio.run(main)


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(commands(), min_size=2, max_size=8))
def test_commands_at_the_same_time_all_end(batch):
    disk = Counting(BLOCKS, supports_unmap=True)
    disk.inline = False
    unit = DiskUnit(disk, luns=lambda: [0])
    ends = []

    async def one(command):
        ends.append(await finish(unit, command))

    async def main():
        async with trio.open_nursery() as nursery:
            for command, _ in batch:
                nursery.start_soon(one, command)

    trio.run(main)
    assert len(ends) == len(batch)
    assert not unit.gate.closed


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(1, 8), st.binary(min_size=1,
             max_size=5)), max_size=12)
)  # fmt: skip
@settings(deadline=None)
def test_reads_return_what_was_written_last(steps):
    disk = MemoryDisk(16)
    unit = DiskUnit(disk, luns=lambda: [0])
    model = bytearray(16 * 512)

    async def main():
        for writing, lba, count, seed in steps:
            size = count * 512
            if writing:
                payload = (seed * size)[:size]
                cdb = struct.pack(">BBIBHB", 0x2A, 0, lba, 0, count, 0)
                command, _ = make_command(cdb, out=payload, pieces=(len(seed),))
                model[lba * 512 : lba * 512 + size] = payload
            else:
                cdb = struct.pack(">BBQIBB", 0x88, 0, lba, count, 0, 0)
                command, buffer = make_command(cdb, room=size, pieces=(len(seed),))
            assert (await finish(unit, command)).status == 0
            if not writing:
                assert buffer == model[lba * 512 : lba * 512 + size]

    trio.run(main)
    assert disk.data == model


def only_check_conditions(function: Callable[[], T]) -> T | None:
    try:
        return function()
    except CheckCondition as error:
        sense = error.sense
    assert len(sense.fixed()) == 18
    assert len(sense.descriptors()) >= 8
    return None


CDB = st.binary(min_size=16, max_size=16)


@given(CDB, st.integers(0, 0xFFFFFFFF))
@example(b"\x43" + bytes(8) + b"\xc0" + bytes(6), 0)
def test_cdb_parsers_let_nothing_else_escape(cdb, blocks):
    table = DiskUnit(MemoryDisk(), luns=list).table
    transfer = decode_transfer_untrusted(cdb)
    assert 0 <= transfer.lba < 1 << 64
    assert 0 <= transfer.blocks < 1 << 32
    only_check_conditions(lambda: check_transfer_flags_untrusted(cdb))
    spec = only_check_conditions(lambda: find_untrusted(table, cdb))
    if spec is not None:
        only_check_conditions(lambda: check_shape_untrusted(spec, cdb))
    only_check_conditions(lambda: report_supported_opcodes_untrusted(table, cdb))
    only_check_conditions(lambda: toc_untrusted(cdb, blocks))
    only_check_conditions(lambda: configuration_untrusted(cdb, blocks))
    only_check_conditions(lambda: disc_information_untrusted(cdb))
    only_check_conditions(lambda: track_information_untrusted(cdb, max(blocks, 1)))
    only_check_conditions(lambda: dvd_structure_untrusted(cdb, blocks))
    only_check_conditions(lambda: performance_untrusted(cdb, blocks))
    only_check_conditions(
        lambda: event_status_untrusted(cdb, event=0, tray_open=True, present=False)
    )
    for pages in (ModePages(disk_pages(write_cache=True)), ModePages(cdrom_pages())):
        sense = functools.partial(pages.sense_untrusted, cdb, specific=0, descriptor=b"")
        sensed = only_check_conditions(sense)
        assert sensed is None or len(sensed) < 256


@given(commands(), st.lists(st.integers(0, 0x3FFF)))
def test_absent_units_let_nothing_escape(pair, luns):
    command, buffer = pair
    before = bytes(buffer)
    outcome = absent_unit(command, luns)
    assert outcome is None or (0 <= outcome.transferred <= command.length)
    if outcome is None or not outcome.transferred:
        assert buffer == before
    only_check_conditions(lambda: report_luns_untrusted(luns, command))
    only_check_conditions(lambda: data_in_untrusted(command, 1024, 512, 7))


@given(st.binary(min_size=1, max_size=300))
def test_unmap_lists_let_nothing_else_escape(parameters):
    ranges = only_check_conditions(lambda: parse_unmap_untrusted(parameters))
    assert ranges is None or len(ranges) <= (len(parameters) - 8) // 16


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)), max_size=20))
def test_unmap_lists_are_read_as_written(ranges):
    body = b"".join(struct.pack(">QI4x", *pair) for pair in ranges)
    parameters = struct.pack(">HH4x", len(body) + 6, len(body)) + body
    assert parse_unmap_untrusted(parameters) == ranges


@given(st.binary(max_size=80), st.booleans())
def test_mode_select_lets_nothing_else_escape(parameters, long):
    pages = ModePages(disk_pages(write_cache=True))
    before = [pages.current(code) for code in (1, 8, 10, 28)]
    changed = only_check_conditions(
        lambda: pages.select_untrusted(parameters, long=long, sector_size=512)
    )
    if changed is None:
        assert [pages.current(code) for code in (1, 8, 10, 28)] == before
