"""What was recorded of real exchanges is understood, answers with their requests."""

from __future__ import annotations

import io
import json

import pytest

from netvsp.frames.frame import Frame
from netvsp.guest import attach as attach_nic
from storvsp import ScsiController, open_disk
from storvsp.guest import attach, scan
from tests.support.nics import MAC, PEER, Wire, network_adapter, plain_frame
from tests.support.worlds import world
from vmbus.capture import Recorder
from vmbus.dissect import Dissection, Dissector, session
from vmbus.guest import PERSONALITIES
from vmbus.trace import Flag, Kind, Record, RingSink, Trace, TraceWriter, Way
from vmbus.wire.packets import COMPLETION, IN_BAND, build_packet


def dissected(sink: RingSink) -> list[Dissection]:
    dissector = Dissector()
    return [dissector.dissect(each) for each in Trace(io.BytesIO(b"".join(sink.pieces())))]


async def record_a_disk(name: str) -> list[Dissection]:
    sink = RingSink(16 << 20)
    device = ScsiController()
    device.add_disk(await open_disk("ram:8M"))
    async with world(device) as there:
        there.bus.observe(Recorder(TraceWriter(sink)))
        async with there.boot(PERSONALITIES[name]) as guest:
            (offer, *_) = await guest.connection.connect()
            (disk, *_) = await scan(await attach(guest, offer))
            await disk.write(8, bytes(4096))
            await disk.read(8, 8)
    return dissected(sink)


@pytest.mark.parametrize("name", ["linux-6.1", "freebsd", "macos", "uefi", "linux-new"])
async def test_every_record_of_a_disk_is_understood(name):
    found = await record_a_disk(name)
    assert [each.summary for each in found if each.problem] == []
    lines = [each.summary for each in found]
    assert lines[0].startswith("INITIATE_CONTACT version=")
    assert "channel 1: scsi" in lines
    write = next(each for each in found if each.field("scsi.lba") == 8)
    assert write.field("scsi.opcode") in {"WRITE(10)", "WRITE(16)"}
    assert write.field("scsi.blocks") == 8
    answer = next(each for each in found if each.request == write.record.number and each.latency_ns)
    assert answer.field("scsi.status") == "GOOD"
    assert answer.field("scsi.transfer_length") == 4096
    what = f"data of {write.field('scsi.opcode')}"
    data = next(each for each in found if each.summary.endswith(what))
    assert data.request == write.record.number
    for each in found:
        json.dumps([[layer.name, layer.fields] for layer in each.layers])


@pytest.mark.parametrize("name", ["linux-6.1", "dpdk", "uefi"])
async def test_every_record_of_an_adapter_is_understood(name):
    sink = RingSink(16 << 20)
    wire = Wire()
    personality = PERSONALITIES[name]
    async with world(network_adapter(personality, wire)) as there:
        there.bus.observe(Recorder(TraceWriter(sink)))
        async with there.boot(personality) as guest:
            (offer, *_) = await guest.connection.connect()
            adapter = await attach_nic(guest, offer, sub_channels=0)
            await adapter.up()
            await adapter.send(plain_frame(100))
            assert wire.port is not None
            wire.port.receive([Frame(plain_frame(200, to=MAC, source=PEER))])
            await adapter.receive()
    found = dissected(sink)
    assert [each.summary for each in found if each.problem] == []
    lines = [each.summary for each in found]
    assert any("INIT " in each for each in lines)
    assert any("rndis" in [layer.name for layer in each.layers] for each in found)
    assert {each.field("ethernet.type") for each in found} - {None}
    assert any("PACKET, 200 bytes" in each for each in lines)


def test_records_that_are_about_the_trace_are_text():
    dissector = Dissector()
    texts = [
        dissector.dissect(each).summary
        for each in (
            Record(Kind.NOTE, b"hello\n\x1b[31m"),
            Record(Kind.FAULT, b"what"),
            Record(Kind.GAP, b"full", ref=3),
            Record(Kind.META, b"{}"),
            Record(Kind.SIGNAL, way=Way.TO_GUEST, relid=5, life=1, ref=1),
            Record(Kind.OPEN, b"{}", relid=5, life=1),
            Record(Kind.CLOSE, relid=5, life=1),
            Record(99, b"?"),
        )
    ]
    assert texts == [
        "note: hello??[31m", "fault: what", "gap: full", "{}", "host rings",
        "channel 5: unknown: [no description of a channel]", "channel 5 is over", "KIND_99",
    ]  # fmt: skip


def test_what_is_not_understood_is_said():
    dissector = Dissector()
    dissector.dissect(Record(Kind.OPEN, b'{"name": "scsi"}', relid=5, life=1))
    short = dissector.dissect(Record(Kind.PACKET, b"short", way=Way.TO_HOST, relid=5, life=1))
    assert "shorter than a descriptor" in short.problem
    packet = build_packet(IN_BAND, bytes(8))
    found = dissector.dissect(Record(Kind.PACKET, packet, way=Way.TO_HOST, relid=5, life=1))
    assert "vstor packet of 8 bytes" in found.problem
    message = dissector.dissect(Record(Kind.MESSAGE, b"\x0e\0\0\0", way=Way.TO_HOST))
    assert message.summary.startswith("INITIATE_CONTACT: [")


def test_requests_of_one_id_are_answered_in_their_order_and_forgotten_when_there_are_too_many(
    monkeypatch,
):
    dissector = Dissector()
    ask = build_packet(IN_BAND, bytes(8), transaction_id=7, flags=1)
    answer = build_packet(COMPLETION, bytes(8), transaction_id=7)
    records = [
        Record(Kind.PACKET, data, way=way, relid=5, life=1, number=number, time_ns=number * 10)
        for number, (data, way) in enumerate(
            [(ask, Way.TO_HOST), (ask, Way.TO_HOST), (answer, Way.TO_GUEST),
             (answer, Way.TO_GUEST), (answer, Way.TO_GUEST)], 1,
        )
    ]  # fmt: skip
    found = [dissector.dissect(each) for each in records]
    answers = [(each.request, each.latency_ns) for each in found[2:]]
    assert answers == [(1, 20), (2, 20), (None, None)]

    monkeypatch.setattr(session, "MAX_REQUESTS", 2)
    for number in (1, 2, 3):
        data = build_packet(IN_BAND, bytes(8), transaction_id=number, flags=1)
        record = Record(Kind.PACKET, data, way=Way.TO_HOST, relid=5, life=1, number=number)
        dissector.dissect(record)
    for number, request in ((1, None), (2, 2), (3, 3)):
        data = build_packet(COMPLETION, bytes(8), transaction_id=number)
        record = Record(Kind.PACKET, data, way=Way.TO_GUEST, relid=5, life=1)
        assert dissector.dissect(record).request == request


def test_memory_of_a_hosts_packet_is_of_no_request_of_the_guests():
    dissector = Dissector()
    ask = build_packet(IN_BAND, bytes(8), transaction_id=7, flags=1)
    dissector.dissect(Record(Kind.PACKET, ask, way=Way.TO_HOST, relid=5, life=1, number=1))
    for flags, request in ((Flag.HOST_WROTE, 1), (Flag.HOST_WROTE | Flag.HOSTS_PACKET, None)):
        record = Record(
            Kind.MEMORY, b"x", way=Way.TO_GUEST, relid=5, life=1, ref=7, flags=flags, total=1
        )
        assert dissector.dissect(record).request == request
