"""Captures: written, and brought in."""

import contextlib
import errno
import functools
import io
import os
import struct
import threading
import time
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from scapy.layers.l2 import Ether
from scapy.utils import PcapNgReader, PcapWriter, RawPcapNgReader

from netvsp.endpoint import EndpointError
from netvsp.endpoints import pcap
from netvsp.endpoints.specs import open_endpoint
from netvsp.endpoints.wrapper import EndpointWrapper
from netvsp.frames import pcapng
from netvsp.frames.frame import Frame
from netvsp.testing import ListeningPort
from netvsp.testing.frames import GuestFrame, Packet
from netvsp.testing.port import MAC
from tests.support.patience import PATIENCE, until
from vmbus.errors import ConfigError


@asynccontextmanager
async def running(spec, port=None):
    endpoint, port = await open_endpoint(spec), port or ListeningPort()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await trio.testing.wait_all_tasks_blocked()
        yield endpoint, port
        nursery.cancel_scope.cancel()
    await endpoint.aclose()


def read(path):
    with path.open("rb") as file:
        return list(pcapng.read_capture(file.read))


async def test_both_directions_are_written_as_others_read_them(tmp_path):
    path = tmp_path / "a.pcapng"
    sent = [Packet(payload=bytes([n]) * n * 50).build() for n in range(1, 30)]
    before = time.time()
    async with running(f"pcap:[write={path}]loopback:[as-is]") as (endpoint, port):
        for each in sent:
            made = GuestFrame(each)
            assert endpoint.transmit(0, [made.frame]) == 1
            made.spoil()
        await until(lambda: len(port.frames) == len(sent))
    with PcapNgReader(str(path)) as reader:
        packets = list(reader)
    for direction in (1, 2):
        mine = [each for each in packets if each.direction == direction]
        assert [bytes(each) for each in mine] == sent
    assert all(before <= float(each.time) <= time.time() for each in packets)
    assert {each.sniffed_on for each in packets} == {"guest"}
    found = read(path)
    assert [each.data for each in found] == [bytes(each) for each in packets]
    assert {each.direction for each in found} == {pcapng.INBOUND, pcapng.OUTBOUND}
    assert all(before - 1 <= each.time <= time.time() + 1 for each in found)


async def test_only_what_is_taken_is_written(tmp_path):
    path = tmp_path / "a.pcapng"
    frames = [Frame(Packet().build())] * 2000
    spec = f"pcap:[write={path}]loopback:[as-is]"
    async with running(spec, ListeningPort(room=7)) as (endpoint, port):
        assert endpoint.transmit(0, frames) == 1024
        await until(lambda: len(port.frames) == 7)
    directions = [each.direction for each in read(path)]
    assert (directions.count(2), directions.count(1)) == (1024, 7)


async def test_the_beginning_of_frames_will_do(tmp_path):
    path = tmp_path / "a.pcapng"
    data = Packet(payload=bytes(1000)).build()
    async with running(f"pcap:[write={path},snap=60]null:") as (endpoint, _port):
        endpoint.transmit(0, [GuestFrame(data).frame, Frame(data[:42])])
        await until(lambda: endpoint.snapshot()["write"]["written"] == 2)
    with RawPcapNgReader(str(path)) as reader:
        (one, meta), (other, _) = list(reader)
    assert (one, meta.wirelen) == (data[:60], len(data))
    assert other == data[:42]


async def test_a_tag_beside_its_frame_is_among_its_bytes(tmp_path):
    path = tmp_path / "a.pcapng"
    async with running(f"pcap:[write={path}]null:") as (endpoint, _port):
        endpoint.transmit(0, [Frame(Packet().build(), (), None, 7)])
    (frame,) = read(path)
    assert frame.data[12:16] == b"\x81\0\0\7"


async def test_a_full_disk_ends_the_capture_and_nothing_else(caplog):
    async with running("pcap:[write=/dev/full]loopback:") as (endpoint, port):
        for count in range(1, 4):
            assert endpoint.transmit(0, [Frame(Packet().build())]) == 1
            while len(port.frames) < count:
                await port.changed()
            await trio.testing.wait_all_tasks_blocked()
        await until(lambda: endpoint.snapshot()["write"]["failure"])
        assert endpoint.snapshot()["write"]["failure"] == "No space left on device"
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warnings == ["/dev/full: No space left on device; the capture has ended"]


class SmallDisk(io.FileIO):
    """Has room for so many bytes more."""

    room = 1000

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(data[: self.room])
        self.room -= taken
        return taken


async def test_a_disk_that_becomes_full_keeps_what_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pcap, "open_to_write", lambda path: SmallDisk(path, "wb"))
    path = tmp_path / "a.pcapng"
    frame = Frame(Packet(payload=bytes(200)).build())
    async with running(f"pcap:[write={path}]null:") as (endpoint, _port):
        for count in (1, 9):
            assert endpoint.transmit(0, [frame] * count) == count
            await until(functools.partial(has_seen, endpoint, count))
        state = endpoint.snapshot()["write"]
    assert state["failure"] == "No space left on device"
    found = read(path)
    assert [each.data for each in found] == [frame.head] * state["written"]
    assert 1 < state["written"] < 10
    assert state["written"] + state["left_out"] == 10


def has_seen(endpoint, count):
    state = endpoint.snapshot()["write"]
    return state["written"] + state["left_out"] >= count


class StuckDisk(io.FileIO):
    """Does not come back until it is let go."""

    def __init__(self, *args):
        super().__init__(*args)
        self.go_on = threading.Event()

    def write(self, data):
        assert self.go_on.wait(PATIENCE)
        return super().write(data)


async def test_a_disk_that_hangs_keeps_neither_a_life_nor_the_end(tmp_path, monkeypatch):
    disk = StuckDisk(tmp_path / "a", "wb")
    monkeypatch.setattr(pcap, "open_to_write", lambda _path: disk)
    monkeypatch.setattr(pcap, "PATIENCE", 0.01)
    endpoint = await open_endpoint(f"pcap:[write={tmp_path}/a]null:")
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, ListeningPort())
            await trio.testing.wait_all_tasks_blocked()
            assert endpoint.transmit(0, [Frame(Packet().build())]) == 1
            nursery.cancel_scope.cancel()
    await endpoint.aclose()
    assert endpoint.transmit(0, [Frame(Packet().build())]) == 1
    assert "has not come back" in endpoint.snapshot()["write"]["failure"]
    assert not disk.closed, "its number is not given to another one"
    disk.go_on.set()
    await until(lambda: disk.closed)


async def test_what_comes_faster_than_it_is_written_is_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(pcap, "MAX_WAITING", 1000)
    path = tmp_path / "a.pcapng"
    async with running(f"pcap:[write={path}]null:") as (endpoint, _port):
        assert endpoint.transmit(0, [Frame(bytes(300))] * 10) == 10
        await until(lambda: endpoint.snapshot()["write"]["written"])
        found = endpoint.snapshot()["write"]
        assert found["written"] + found["left_out"] == 10
        assert found["left_out"] >= 7
        assert endpoint.transmit(0, [Frame(bytes(300))]) == 1
    assert len(read(path)) == found["written"] + 1


async def test_what_is_sent_between_lives_is_there_at_the_end(tmp_path, no_descriptor_is_leaked):
    path = tmp_path / "a.pcapng"
    endpoint = await open_endpoint(f"pcap:[write={path}]null:")
    endpoint.transmit(0, [Frame(bytes(60))] * 3)
    with trio.CancelScope() as scope:
        scope.cancel()
        await endpoint.aclose()
    assert len(read(path)) == 3
    endpoint.transmit(0, [Frame(bytes(60))])
    await endpoint.aclose()
    assert len(read(path)) == 3


# -- bringing in -----------------------------------------------------------------------------------


async def test_the_frames_of_a_capture_come_to_the_guest(tmp_path):
    path = tmp_path / "a.pcapng"
    sent = [Packet(source_port=number).build() for number in range(200)]
    blocks = [pcapng.build_header("x", 0)]
    for number, each in enumerate(sent):
        direction = pcapng.OUTBOUND if number % 4 == 3 else number % 2
        blocks.append(pcapng.build_packet(each, len(each), number, direction))
    path.write_bytes(b"".join(blocks))
    wanted = [each for number, each in enumerate(sent) if number % 4 != 3]
    async with running(f"pcap:[read={path}]null:", ListeningPort(room=10)) as (endpoint, port):
        await until(lambda: len(port.frames) == 10)
        port.make_room()
        await until(lambda: len(port.frames) == len(wanted))
        assert [frame.head for frame in port.frames] == wanted
        assert endpoint.snapshot()["read"]["brought"] == len(wanted)
        again = ListeningPort()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, again)
            await until(lambda: len(again.frames) == len(wanted))
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nano", [False, True])
async def test_a_capture_of_the_old_format_will_do(tmp_path, order, nano):
    path = tmp_path / "a.pcap"
    with PcapWriter(str(path), linktype=1, endianness=order, nano=nano) as writer:
        packet = Ether(Packet(payload=b"old").build())
        packet.time = 12.5
        writer.write(packet)
    (found,) = read(path)
    assert found == (Packet(payload=b"old").build(), 12.5, 0)
    async with running(f"pcap:[read={path}]null:") as (_endpoint, port):
        await until(lambda: port.frames)
    assert port.frames[0].head == found.data


async def test_frames_come_at_the_distances_that_they_had(tmp_path, autojump_clock):
    path = tmp_path / "a.pcapng"
    times = (5, 6.5, 9)
    blocks = [
        pcapng.build_packet(bytes([n]) * 60, 60, int(when * 1e9), pcapng.INBOUND)
        for n, when in enumerate(times)
    ]
    path.write_bytes(pcapng.build_header("x", 0) + b"".join(blocks))
    found = []

    class Port(ListeningPort):
        def receive(self, frames):
            found.append(trio.current_time() - start)
            return super().receive(frames)

    start = trio.current_time()
    async with running(f"pcap:[read={path},timed]null:", Port()) as (_endpoint, port):
        while len(port.frames) < 3:
            await port.changed()
    assert found == pytest.approx([0, 1.5, 4])


async def test_a_capture_that_is_damaged_further_on_is_the_end(tmp_path):
    path = tmp_path / "a.pcapng"
    good = pcapng.build_header("x", 0) + pcapng.build_packet(bytes(60), 60, 0, 1)
    path.write_bytes(good + good[:-2])
    endpoint, port = await open_endpoint(f"pcap:[read={path}]null:"), ListeningPort()
    with pytest.raises(EndpointError, match=r"a\.pcapng: it ends in the middle"):
        await endpoint.run(port)
    await endpoint.aclose()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "it is empty"),
        (b"text", "neither pcapng nor pcap"),
        (pcapng.build_header("x", 0)[:20], "ends in the middle"),
        (pcapng.build_header("x", 0)[:8] + b"abcd" + bytes(20), "no known order"),
        (struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 0, 113), "not of Ethernet"),
        (struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 0, 1) + b"x", "ends in the middle"),
    ],
)
async def test_what_is_no_capture_is_refused_at_once(tmp_path, content, text):
    path = tmp_path / "a.pcapng"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        await open_endpoint(f"pcap:[read={path}]null:")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("pcap:null:", "needs write=FILE or read=FILE"),
        ("pcap:[write=/dev/null]", "needs a endpoint to work on|needs an endpoint"),
        ("pcap:[write=/no/such/file]null:", "/no/such/file: No such file"),
        ("pcap:[read=/no/such/file]null:", "/no/such/file: No such file"),
        ("pcap:[write=/dev/null,timed]null:", "timed for read=FILE"),
        ("pcap:[read=/dev/null,snap=60]null:", "snap is for write=FILE"),
        ("pcap:[write=/dev/null]nul:", "unknown endpoint scheme"),
        ("pcap:[wite=/dev/null]null:", "unknown option 'wite'"),
    ],
)
async def test_what_cannot_be_had_is_said_with_a_reason(spec, text):
    with pytest.raises(ConfigError, match=text):
        await open_endpoint(spec)


async def test_a_file_belongs_to_one_capture(tmp_path):
    path = tmp_path / "a.pcapng"
    async with running(f"pcap:[write={path}]null:") as (endpoint, _port):
        endpoint.transmit(0, [Frame(Packet().build())])
        for spec in (f"pcap:[write={path}]null:", f"pcap:[read={path}]null:"):
            with pytest.raises(ConfigError, match="a capture has it"):
                await open_endpoint(spec)
    assert len(read(path)) == 1, "nothing of it is lost"
    with pytest.raises(ConfigError, match="a capture has it"):
        await open_endpoint(f"pcap:[write={path},read={path}]null:")
    assert len(read(path)) == 1
    async with running(f"pcap:[write={path}]null:"):
        pass
    assert read(path) == []


async def test_what_is_no_file_keeps_nobody_waiting(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for spec in (f"pcap:[write={path}]null:", f"pcap:[read={path}]null:"):
        with pytest.raises(ConfigError, match=r"No such device|it is no file"):
            await open_endpoint(spec)
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with pytest.raises(ConfigError, match="it is no file"):
        await open_endpoint(f"pcap:[write={path}]null:")
    os.close(end)


async def test_blocks_without_end_do_not_fill_the_memory(tmp_path):
    path = tmp_path / "a.pcapng"
    header = pcapng.build_header("x", 0)
    block = pcapng.build_packet(bytes(pcap.TURN_SIZE), 0, 0, 0)
    with path.open("wb") as file:
        file.writelines([header, *[block] * 5])
    with path.open("rb") as file:
        frames = pcapng.read_capture(file.read)
        assert [len(pcap._next(frames)) for _ in range(4)] == [2, 2, 1, 0]


async def test_the_port_is_the_adapters(tmp_path):
    seen = []

    class Port(ListeningPort):
        def link_changed(self, *, up, speed=None):
            seen.append(up)

    class Inner(EndpointWrapper):
        async def run(self, port):
            seen.append(port.mac)
            port.link_changed(up=False)
            await port.wait_room()
            raise EndpointError("over")

    port = Port()
    port.make_room()
    inner = await open_endpoint("null:")
    endpoint = pcap.PcapEndpoint(Inner(inner), capture=pcap.Capture(str(tmp_path / "a")))
    with contextlib.suppress(EndpointError):
        await endpoint.run(port)
    assert seen == [MAC, False]
    await endpoint.aclose()
