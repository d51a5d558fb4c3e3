"""What was said on a bus is in the trace: all of it, in order, with the memory it was about."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter

import pytest

from netvsp.frames.frame import Frame
from netvsp.guest import attach as attach_nic
from netvsp.wire import rndis
from storvsp import ScsiController, open_disk
from storvsp.disks.delay import DelayDisk
from storvsp.guest import attach, scan
from tests.support.nics import MAC, PEER, Wire, network_adapter, plain_frame
from tests.support.worlds import world
from vmbus.capture import Recorder
from vmbus.guest import LINUX_6_1, PERSONALITIES
from vmbus.trace import Flag, Kind, Record, RingSink, Trace, TraceWriter, Way
from vmbus.trace.records import MAX_DATA
from vmbus.wire.guids import CLASS_NIC
from vmbus.wire.messages import InitiateContact, OpenChannel, VersionResponse
from vmbus.wire.packets import COMPLETION, DESCRIPTOR, GPA_DIRECT, IN_BAND, TRANSFER_PAGES


class Recording:
    """A recorder, and what it has written."""

    def __init__(self, **options) -> None:
        self.sink = RingSink(64 << 20)
        self.recorder = Recorder(TraceWriter(self.sink), **options)

    def records(self) -> list[Record]:
        trace = Trace(io.BytesIO(b"".join(self.sink.pieces())))
        found = list(trace)
        assert [each.number for each in found] == list(range(1, len(found) + 1))
        return found


def ring_type(record: Record) -> int:
    return int(DESCRIPTOR.unpack_from(record.data)[0])


def transaction(record: Record) -> int:
    return int(DESCRIPTOR.unpack_from(record.data)[4])


def memory_of(records: list[Record], *, wrote: bool) -> list[tuple[int, bytes]]:
    """What packets point to, put together, by place of its last piece."""
    found = []
    data = b""
    for place, each in enumerate(records):
        if each.kind == Kind.MEMORY and bool(each.flags & Flag.HOST_WROTE) is wrote:
            assert each.offset == len(data)
            assert each.way == (Way.TO_GUEST if wrote else Way.TO_HOST)
            data += each.data
            if len(data) == each.total:
                found.append((place, data))
                data = b""
    assert not data
    return found


async def controller(spec: str = "ram:8M") -> ScsiController:
    device = ScsiController()
    device.add_disk(await open_disk(spec))
    return device


@pytest.mark.parametrize("name", ["linux-6.1", "freebsd", "macos", "uefi"])
async def test_a_guest_with_a_disk_is_recorded_from_contact_to_the_end(name):
    recording = Recording()
    personality = PERSONALITIES[name]
    data = bytes(range(256)) * (300 << 2)
    async with world(await controller()) as there:
        there.bus.observe(recording.recorder)
        async with there.boot(personality) as guest:
            (offer, *_) = await guest.connection.connect()
            adapter = await attach(guest, offer)
            (disk, *_) = await scan(adapter)
            await disk.write(8, data[:4096])
            assert await disk.read(8, 8) == data[:4096]
            await adapter.close()
        assert not there.bus.faults
    records = recording.records()

    messages = [each for each in records if each.kind == Kind.MESSAGE]
    assert messages[0].way == Way.TO_HOST
    assert messages[0].data[0] == InitiateContact.TYPE
    assert VersionResponse.TYPE in {each.data[0] for each in messages if each.way == Way.TO_GUEST}
    assert OpenChannel.TYPE in {each.data[0] for each in messages if each.way == Way.TO_HOST}
    opened = [json.loads(each.data) for each in records if each.kind == Kind.OPEN]
    assert opened[0]["name"] == "scsi"
    assert opened[0]["class"] == str(offer.class_id)
    assert "late" not in opened[0]
    assert len(opened) == sum(each.kind == Kind.CLOSE for each in records)

    # Each request that asks for an answer has one, behind it.
    asked: Counter[int] = Counter()
    for each in records:
        if each.kind == Kind.PACKET and each.way == Way.TO_HOST:
            asked[transaction(each)] += DESCRIPTOR.unpack_from(each.data)[3] & 1
        elif each.kind == Kind.PACKET and ring_type(each) == COMPLETION:
            asked[transaction(each)] -= 1
            assert asked[transaction(each)] >= 0
    assert not +asked

    (place, written) = next(found for found in memory_of(records, wrote=False) if found[1])
    assert written == data[:4096]
    request = next(
        each
        for each in reversed(records[:place])
        if each.kind == Kind.PACKET and each.way == Way.TO_HOST
    )
    assert ring_type(request) == GPA_DIRECT
    assert transaction(request) == records[place].ref
    (place, read) = memory_of(records, wrote=True)[-1]
    assert read == data[:4096]
    answer = next(each for each in records[place:] if each.kind == Kind.PACKET)
    assert (ring_type(answer), transaction(answer)) == (COMPLETION, records[place].ref)


@pytest.mark.parametrize("slow", [False, True])
async def test_memory_is_in_pieces_and_what_a_slow_disk_reads_is_there_too(slow):
    recording = Recording()
    data = bytes(range(251)) * 2000
    data += bytes(-len(data) % 512)
    device = ScsiController()
    base = await open_disk("ram:8M")
    device.add_disk(DelayDisk(base, read=0.001, write=0.001) if slow else base)
    async with world(device) as there, there.boot(LINUX_6_1) as guest:
        (offer, *_) = await guest.connection.connect()
        (disk,) = await scan(await attach(guest, offer))
        there.bus.observe(recording.recorder)
        await disk.write(0, data)
        assert await disk.read(0, len(data) // 512) == data
    records = recording.records()
    assert [each for _, each in memory_of(records, wrote=False)] == [data]
    assert [each for _, each in memory_of(records, wrote=True)] == [data]
    assert max(len(each.data) for each in records) == MAX_DATA
    opened = [json.loads(each.data) for each in records if each.kind == Kind.OPEN]
    assert all(each["late"] for each in opened)
    assert opened, "it was open before"


async def test_a_short_snap_keeps_the_beginning_and_says_how_much_there_was():
    recording = Recording(snap=100)
    async with world(await controller()) as there, there.boot(LINUX_6_1) as guest:
        (offer, *_) = await guest.connection.connect()
        (disk,) = await scan(await attach(guest, offer))
        there.bus.observe(recording.recorder)
        await disk.write(0, b"x" * 4096)
    (found,) = (each for each in recording.records() if each.kind == Kind.MEMORY)
    assert found.data == b"x" * 100
    assert (found.total, found.length, found.flags) == (4096, 4096, Flag.CUT)


@pytest.mark.parametrize("size", [60, 1514])
@pytest.mark.parametrize("name", ["linux-6.1", "dpdk", "uefi"])
async def test_frames_are_recorded_both_ways(name, size):
    recording = Recording()
    wire = Wire()
    personality = PERSONALITIES[name]
    async with world(network_adapter(personality, wire)) as there:
        there.bus.observe(recording.recorder)
        async with there.boot(personality) as guest:
            (offer, *_) = await guest.connection.connect()
            assert offer.class_id == CLASS_NIC
            adapter = await attach_nic(guest, offer, sub_channels=0)
            await adapter.up()
            sent, back = plain_frame(size, seed=1), plain_frame(size, to=MAC, source=PEER, seed=2)
            for _ in range(3):
                await adapter.send(sent)
                await wire.wait_sent(1)
                assert wire.port is not None
                assert wire.port.receive([Frame(back)]) == 1
                assert (await adapter.receive()).data == back
        assert not there.bus.faults
    records = recording.records()
    for wrote, frame in ((False, sent), (True, back)):
        found = [each for _, each in memory_of(records, wrote=wrote) if frame in each]
        assert len(found) == 3, "each frame is recorded once"
        assert all(int.from_bytes(each[:4], "little") == rndis.PACKET for each in found)
    # What the host has written stands before the packet that says so, and what it reads behind.
    for place, each in enumerate(records):
        if each.kind == Kind.MEMORY:
            wrote = bool(each.flags & Flag.HOST_WROTE)
            assert wrote is bool(each.flags & Flag.HOSTS_PACKET)
            others = records[place:] if wrote else reversed(records[:place])
            packet = next(
                one
                for one in others
                if one.kind == Kind.PACKET
                and transaction(one) == each.ref
                and ring_type(one) in ({TRANSFER_PAGES} if wrote else {IN_BAND, GPA_DIRECT})
            )
            assert packet.way == each.way


async def test_faults_notes_and_facts_are_recorded():
    recording = Recording(clock=lambda: 5)
    recording.recorder.describe({"devices": ["ram:8M"]})
    recording.recorder.note("grüße")
    recording.recorder.fault(None, "what?")
    found = recording.records()
    assert [(each.kind, each.data, each.time_ns) for each in found] == [
        (Kind.META, b'{"devices": ["ram:8M"]}', 5),
        (Kind.NOTE, "grüße".encode(), 5),
        (Kind.FAULT, b"what?", 5),
    ]


async def test_a_recorder_that_fails_harms_nobody(caplog):
    class Broken(Recorder):
        def packets_in(self, channel, packets):
            raise ValueError("broken")

    recorder = Broken(TraceWriter(RingSink(1)))
    with caplog.at_level(logging.ERROR, "vmbus.bus"):
        async with world(await controller()) as there, there.boot(LINUX_6_1) as guest:
            there.bus.observe(recorder)
            (offer, *_) = await guest.connection.connect()
            (disk,) = await scan(await attach(guest, offer))
            await disk.write(0, b"x" * 512)
            assert await disk.read(0, 1) == b"x" * 512
    assert "an observer failed and hears no more" in caplog.text
