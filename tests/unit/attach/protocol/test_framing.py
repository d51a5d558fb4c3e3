"""Frames over SEQPACKET and STREAM, and who closes which descriptor."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from tests.support.attach import make_eventfd, send_raw
from vmbus.attach.protocol.closing import close_all
from vmbus.attach.protocol.framing import (
    ASYNC,
    ERROR,
    HEADER,
    MAX_FRAME,
    REPLY,
    Frame,
    FrameReader,
    pack_frame,
    receive,
    send,
)
from vmbus.attach.protocol.limits import MAX_FDS, MAX_PAYLOAD
from vmbus.errors import PeerProtocolError

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["seqpacket", "stream"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    kind = socket.SOCK_STREAM if request.param == "stream" else socket.SOCK_SEQPACKET
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    theirs.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def reader_for(sock: socket.socket) -> FrameReader:
    return FrameReader(stream=sock.type == socket.SOCK_STREAM)


def frames_of(reader: FrameReader) -> list[Frame]:
    frames = []
    while (frame := reader.next_frame()) is not None:
        frames.append(frame)
    return frames


def lost(reader: FrameReader) -> PeerProtocolError:
    with pytest.raises(PeerProtocolError) as caught:
        reader.next_frame()
    assert caught.value.fatal
    return caught.value


def test_a_frame_arrives_with_its_descriptors(pair: Pair) -> None:
    ours, theirs = pair
    mine = [make_eventfd(), make_eventfd()]
    data = pack_frame(0x82, 0, 7, b"payload", 2)
    assert send(ours, data, mine) == len(data)
    reader = reader_for(theirs)
    assert receive(theirs, reader)
    (frame,) = frames_of(reader)
    assert (frame.kind, frame.flags, frame.seq, frame.payload) == (0x82, 0, 7, b"payload")
    assert len(frame.fds) == 2
    assert not os.get_inheritable(frame.fds[0])
    os.eventfd_write(mine[0], 5)
    taken = frame.take_fd()
    assert os.eventfd_read(taken) == 5
    frame.close()
    frame.close()
    close_all([taken, *mine])
    reader.close()


def test_the_end_of_the_connection_is_told(pair: Pair) -> None:
    ours, theirs = pair
    ours.close()
    assert not receive(theirs, reader_for(theirs))


def test_nothing_to_read_blocks(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        receive(pair[1], reader_for(pair[1]))


def test_a_full_socket_blocks(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        while True:
            send(pair[0], bytes(MAX_FRAME))


def test_more_descriptors_than_a_frame_may_have_break_the_framing(pair: Pair) -> None:
    ours, theirs = pair
    fd = make_eventfd()
    send_raw(ours, pack_frame(1, 0, 1, b"", 65), (fd,) * (MAX_FDS + 1))
    reader = reader_for(theirs)
    assert receive(theirs, reader)
    assert lost(reader).errno == errno.EMSGSIZE
    assert reader.last_header == (1, 0, 1)
    os.close(fd)


def test_a_record_that_is_too_long_breaks_the_framing() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(HEADER.pack(1, 0, 1, MAX_PAYLOAD, 0, 0) + bytes(MAX_PAYLOAD + 1))
    reader = FrameReader(stream=False)
    assert receive(theirs, reader)
    assert "longer" in str(lost(reader))
    ours.close()
    theirs.close()


BROKEN = [
    (HEADER.pack(1, 2, 1, 0, 0, 0), 0, errno.EBADMSG),
    (HEADER.pack(1, REPLY | ASYNC, 1, 0, 0, 0), 0, errno.EBADMSG),
    (HEADER.pack(1, 8, 1, 0, 0, 0), 0, errno.EBADMSG),
    (HEADER.pack(1, 0, 1, 0, 0, 1), 0, errno.EBADMSG),
    (HEADER.pack(1, 0, 1, MAX_PAYLOAD + 1, 0, 0), 0, errno.EMSGSIZE),
    (HEADER.pack(1, 0, 1, 0xFFFFFFFF, 0, 0), 0, errno.EMSGSIZE),
    (HEADER.pack(1, 0, 1, 0, 65, 0), 0, errno.EMSGSIZE),
    (HEADER.pack(1, 0, 1, 0, 1, 0), 0, errno.EBADMSG),
    (HEADER.pack(1, 0, 1, 0, 0, 0), 1, errno.EBADMSG),
    (HEADER.pack(1, 0, 1, 0, 1, 0), 2, errno.EBADMSG),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("data", "fds", "code"), BROKEN)
def test_a_broken_header_loses_the_framing_and_closes_what_came(
    data: bytes, fds: int, code: int, *, stream: bool
) -> None:
    reader = FrameReader(stream=stream)
    reader.feed_untrusted(data, [make_eventfd() for _ in range(fds)])
    assert lost(reader).errno == code
    assert reader.last_header is not None
    # Whatever comes now is closed and ignored.
    reader.feed_untrusted(pack_frame(1, 0, 1, b"", 1), [make_eventfd()])
    lost(reader)


@pytest.mark.parametrize("data", [b"x", b"x" * 15])
def test_a_record_without_a_whole_header_is_lost(data: bytes) -> None:
    reader = FrameReader(stream=False)
    reader.feed_untrusted(data)
    assert lost(reader).errno == errno.EBADMSG


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_record_of_another_length_than_it_says_is_lost(extra: int) -> None:
    reader = FrameReader(stream=False)
    reader.feed_untrusted(HEADER.pack(1, 0, 1, 8 + extra, 0, 0) + bytes(8))
    assert lost(reader).errno == errno.EBADMSG


def test_a_stream_may_be_cut_anywhere() -> None:
    one = pack_frame(1, 0, 1, b"first")
    two = pack_frame(2, ASYNC, 0, b"second")
    data = one + two
    for cut in range(1, len(data)):
        reader = FrameReader(stream=True)
        reader.feed_untrusted(data[:cut])
        got = frames_of(reader)
        assert reader.at_boundary() == (cut == len(one))
        reader.feed_untrusted(data[cut:])
        got += frames_of(reader)
        assert [frame.payload for frame in got] == [b"first", b"second"]
        assert reader.at_boundary()


def test_descriptors_come_with_the_first_byte_of_a_stream_frame() -> None:
    reader = FrameReader(stream=True)
    data = pack_frame(0x82, 0, 1, b"payload", 1)
    fd = make_eventfd()
    reader.feed_untrusted(pack_frame(1, 0, 1, b"") + data[:3], [fd])
    (first,) = frames_of(reader)
    assert first.fds == []
    reader.feed_untrusted(data[3:20])
    assert reader.next_frame() is None
    reader.feed_untrusted(data[20:])
    (second,) = frames_of(reader)
    assert second.fds == [fd]
    second.close()


def test_a_stream_frame_without_its_descriptors_is_lost() -> None:
    reader = FrameReader(stream=True)
    reader.feed_untrusted(pack_frame(0x82, 0, 1, b"payload", 1)[:18])
    assert lost(reader).errno == errno.EBADMSG


def test_descriptors_in_the_middle_of_a_stream_frame_are_lost() -> None:
    reader = FrameReader(stream=True)
    data = pack_frame(0x82, 0, 1, b"payload")
    reader.feed_untrusted(data[:18])
    reader.feed_untrusted(data[18:20], [make_eventfd()])
    assert "1 descriptors came" in str(lost(reader))


def test_descriptors_cannot_be_heaped_up_before_a_header() -> None:
    reader = FrameReader(stream=True)
    reader.feed_untrusted(b"\1", [make_eventfd() for _ in range(MAX_FDS)])
    assert reader.next_frame() is None
    reader.feed_untrusted(b"\0", [make_eventfd()])
    assert lost(reader).errno == errno.EMSGSIZE


def test_good_frames_before_a_broken_one_are_handed_out() -> None:
    reader = FrameReader(stream=True)
    reader.feed_untrusted(pack_frame(1, 0, 1, b"") + HEADER.pack(1, ERROR, 1, 0, 0, 0))
    frame = reader.next_frame()
    assert frame is not None
    lost(reader)


def test_closing_the_reader_closes_frames_and_fragments() -> None:
    reader = FrameReader(stream=True)
    reader.feed_untrusted(pack_frame(1, 0, 1, b"", 1), [make_eventfd()])
    reader.feed_untrusted(pack_frame(1, 0, 1, b"abc", 1)[:17], [make_eventfd()])
    reader.close()
    reader.close()
    assert reader.next_frame() is None


def test_closing_what_is_closed_already_is_harmless() -> None:
    fd = make_eventfd()
    close_all([fd, fd])


# -- descriptors that this process had no room for -------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("came", [0, 1])
def test_a_frame_whose_descriptors_were_lost_says_so(came: int, *, stream: bool) -> None:
    reader = FrameReader(stream=stream)
    fds = [make_eventfd() for _ in range(came)]
    reader.feed_untrusted(pack_frame(1, 0, 1, b"abc", 2), fds, socket.MSG_CTRUNC)
    (frame,) = frames_of(reader)
    assert (frame.fds, frame.payload) == ([], b"abc")
    with pytest.raises(PeerProtocolError, match="too many files are open") as caught:
        frame.check_whole()
    assert (caught.value.errno, caught.value.fatal) == (errno.EMFILE, False)
    # The next one is whole again.
    reader.feed_untrusted(pack_frame(1, 0, 2, b"", 1), [make_eventfd()])
    (frame,) = frames_of(reader)
    frame.check_whole()
    frame.close()


def test_descriptors_are_lost_with_the_frame_of_a_stream_that_claims_them() -> None:
    reader = FrameReader(stream=True)
    data = pack_frame(1, 0, 1, b"") + pack_frame(2, 0, 2, b"payload", 1)
    reader.feed_untrusted(data[:20], (), socket.MSG_CTRUNC)
    (first,) = frames_of(reader)
    first.check_whole()
    assert reader.next_frame() is None
    reader.feed_untrusted(data[20:35])
    assert reader.next_frame() is None
    reader.feed_untrusted(data[35:] + pack_frame(3, 0, 3, b""))
    second, third = frames_of(reader)
    assert (second.short, third.short) == (True, False)


@pytest.mark.parametrize("stream", [False, True])
def test_lost_descriptors_that_no_header_claims_lose_the_framing(*, stream: bool) -> None:
    reader = FrameReader(stream=stream)
    reader.feed_untrusted(pack_frame(1, 0, 1, b""), (), socket.MSG_CTRUNC)
    assert "more descriptors came" in str(lost(reader))


def test_a_stream_is_taken_apart_as_frames_are_asked_for() -> None:
    """Many small ones are the time of who takes them, not of who feeds them all at once."""
    reader = FrameReader(stream=True)
    good = pack_frame(1, 0, 1, b"")
    reader.feed_untrusted(good * 2 + HEADER.pack(1, ERROR, 1, 0, 0, 0))
    for left in (2 * 16, 16):
        assert reader.next_frame() is not None
        assert len(reader._buffer) == left
    lost(reader)
