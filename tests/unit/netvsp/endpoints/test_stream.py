"""Frames over a stream socket."""

import socket

import pytest
import trio
import trio.testing

from netvsp.endpoint import EndpointError
from netvsp.endpoints.stream import TURN, FrameStream
from netvsp.frames.frame import Frame
from netvsp.testing import ListeningPort
from netvsp.testing.frames import GuestFrame, Packet
from tests.support.patience import PATIENCE, until, waits
from tests.support.turns import counting


@pytest.fixture
async def ends():
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    stream = FrameStream(ours, "the peer")
    with theirs:
        yield stream, theirs
    stream.close()


async def test_what_the_socket_takes_a_part_of_arrives_whole(ends):
    """And it is of the guest's memory as it was, whatever becomes of that."""
    stream, theirs = ends
    sent = []
    for number in range(200):
        data = Packet(payload=bytes([number]) * 9000).build()
        made = GuestFrame(data)
        if not stream.send([made.frame]):
            break
        made.spoil()
        sent.append(data)
    assert 0 < len(sent) < 200
    assert await waits(stream.wait_writable)
    wanted = b"".join(len(each).to_bytes(4, "big") + each for each in sent)
    found = b""
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(stream.wait_writable)
        theirs.setblocking(False)
        while len(found) < len(wanted):
            await trio.lowlevel.wait_readable(theirs)
            found += theirs.recv(1 << 16)
            await trio.lowlevel.checkpoint()
    assert found == wanted
    assert stream.send([Frame(bytes(60))]) == 1


async def test_what_is_left_of_the_last_frame_follows_it_without_another(ends):
    stream, theirs = ends
    theirs.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.receive, ListeningPort())
        for number in range(3):
            data = bytes([number]) * 60000
            assert stream.send([Frame(data)]) == 1
            found = b""
            while len(found) < 4 + len(data):
                with trio.fail_after(PATIENCE):
                    await trio.lowlevel.wait_readable(theirs)
                found += theirs.recv(1 << 16)
            assert found == len(data).to_bytes(4, "big") + data
        nursery.cancel_scope.cancel()


async def test_frames_come_however_they_are_cut(ends):
    stream, theirs = ends
    sent = [bytes([number]) * (14 + 40 * number) for number in range(30)]
    data = b"".join(len(each).to_bytes(4, "big") + each for each in [b"short", *sent])
    port = ListeningPort(room=3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.receive, port)
        for start in range(0, len(data), 1001):
            theirs.sendall(data[start : start + 1001])
            await trio.testing.wait_all_tasks_blocked()
        assert len(port.frames) == 3
        port.make_room()
        await until(lambda: len(port.frames) == len(sent))
        nursery.cancel_scope.cancel()
    assert [frame.head for frame in port.frames] == sent
    assert stream.dropped == 1


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"", "the peer is gone"), (b"\0\1\0\x12", "the peer sends a frame of 65554 bytes")],
)
async def test_an_end_or_nonsense_is_the_end(ends, data, text):
    stream, theirs = ends
    theirs.sendall(data)
    theirs.close()
    with pytest.raises(EndpointError, match=text):
        await stream.receive(ListeningPort())
    assert stream.send([Frame(bytes(60))] * 3) == 3
    await stream.wait_writable()
    with pytest.raises(EndpointError, match="the peer is gone"):
        await stream.receive(ListeningPort())


@pytest.mark.parametrize("size", [0, 14])
async def test_a_peer_with_tiny_frames_takes_no_more_than_its_turn(size):
    ours, theirs = socket.socketpair()
    for each in (ours, theirs):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    stream = FrameStream(ours, "the peer")
    one = size.to_bytes(4, "big") + bytes(size)
    with theirs:
        theirs.setblocking(False)
        count = theirs.send(one * 10000) // len(one)
        port = Counting()
        with counting(FrameStream, "_cut") as cut:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.receive, port)
                await until(lambda: port.count + stream.dropped == count)
                nursery.cancel_scope.cancel()
        assert cut.most_in_step == 1
        assert cut.total >= count // TURN
    stream.close()


class Counting(ListeningPort):
    """Counts frames, and keeps none."""

    count = 0

    def receive(self, frames):
        assert len(frames) <= TURN
        self.count += len(frames)
        return len(frames)
