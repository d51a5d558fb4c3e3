"""The client library and a server that does not read: what waits, what is repeated, what fails."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.attach import RAM_SIZE, Recorder, make_memfd
from tests.support.attach_client import RudeServer, ServerThread, Vmm
from tests.support.patience import PATIENCE, SOON, until_in_thread
from vmbus.attach.client.attachment import (
    HV_STATUS_INSUFFICIENT_BUFFERS,
    HV_STATUS_INVALID_CONNECTION_ID,
    Attachment,
    Region,
)
from vmbus.attach.client.channel_io import MAX_OUTGOING
from vmbus.attach.client.operator import command
from vmbus.attach.protocol import framing
from vmbus.attach.protocol.framing import ASYNC, Frame, pack_frame
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import PostMessage
from vmbus.attach.protocol.to_vmm import AddEventPort, AddMsgPort, DeliverMessage
from vmbus.errors import AttachError, LocalProtocolError
from vmbus.partition.events import PostedMessage

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


def test_a_full_socket_makes_the_guest_repeat_and_replies_wait(
    attached: Attachment, rude: RudeServer, recorder: Recorder
) -> None:
    recorder.hold_deliveries = True
    assert rude.ask(attached, Number.ADD_MSG_PORT, AddMsgPort(4).encode()) == 0
    payload = DeliverMessage(0, 2, 1, b"").encode()
    count = 3000
    seq = 0
    while seq < count:
        try:
            rude.sock.setblocking(False)
            rude.send(Number.DELIVER_MESSAGE, payload, seq=seq)
            seq += 1
        except BlockingIOError:
            assert attached.process()
    while len(recorder.pending) < count:
        assert attached.process()
    rude.sock.settimeout(PATIENCE)
    for done in recorder.pending:
        done(errno.ENXIO)
    assert attached.post_message(4, 1, 0, b"x") == HV_STATUS_INSUFFICIENT_BUFFERS
    for expected in range(count):
        while True:
            assert attached.process()
            rude.sock.setblocking(False)
            try:
                frame = rude.receive()
            except BlockingIOError:
                continue
            break
        assert frame.seq == expected
    assert attached.process()
    assert attached.post_message(4, 1, 0, b"x") == 0
    rude.sock.settimeout(PATIENCE)
    assert PostMessage.decode_untrusted(rude.receive().payload).payload == b"x"


def test_a_server_that_never_reads_is_left(
    attached: Attachment, rude: RudeServer, recorder: Recorder
) -> None:
    rude.sock.setblocking(False)
    bad = pack_frame(Number.ADD_MSG_PORT, 0, 1, b"")
    for _ in range(MAX_OUTGOING):
        try:
            rude.sock.send(bad)
        except BlockingIOError:
            if not attached.process():
                break
        except BrokenPipeError:
            break
    while attached.process():
        pass
    assert recorder.calls == [("closed", "the server does not read")]


def test_a_delivery_answered_to_a_server_that_never_reads_closes(
    attached: Attachment, rude: RudeServer, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.attach.client.channel_io.MAX_OUTGOING", 10)
    recorder.hold_deliveries = True
    rude.sock.setblocking(False)
    sent = 0
    while not recorder.named("closed"):
        try:
            rude.send(Number.DELIVER_MESSAGE, DeliverMessage(0, 2, 1, b"").encode(), seq=sent)
            sent += 1
        except (BlockingIOError, BrokenPipeError):
            sent += 0
        attached.process()
        while recorder.pending:
            recorder.pending.pop()()


def test_queued_descriptors_are_duplicated(attached: Attachment, rude: RudeServer) -> None:
    with pytest.raises(LocalProtocolError, match="regions"):
        attached.set_memory_table([])
    rude.sock.setblocking(False)
    filler = pack_frame(Number.SIGNAL_EVENT, ASYNC, 0, bytes(8))
    while attached._io.try_send(filler):
        pass
    fd = make_memfd()
    with pytest.raises(AttachError, match="no answer"):
        attached.add_memory(Region(1 << 32, RAM_SIZE, fd), timeout=SOON)
    os.close(fd)
    attached._io.send(filler, key="same")
    attached._io.send(filler, key="same")
    got: list[Frame] = []
    while not got or got[-1].kind != Number.ADD_MEM:
        try:
            got.append(rude.receive())
        except BlockingIOError:
            assert attached.process()
    attached.process()
    assert rude.receive().kind == Number.SIGNAL_EVENT
    with pytest.raises(BlockingIOError):
        rude.receive()


def test_an_operator_does_not_wait_for_ever_to_send(rude: RudeServer) -> None:
    huge = {"x": "y" * 32_000}
    rude.client.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            rude.client.send(bytes(1000))
    with pytest.raises(AttachError, match="does not answer"):
        command(rude.client, huge, timeout=SOON)


def test_frames_that_go_out_in_parts_arrive_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = framing.send

    def dribble(sock: socket.socket, data: Any, fds: Any = ()) -> int:
        return real(sock, data[:7], fds)

    monkeypatch.setattr("vmbus.attach.client.channel_io.send", dribble)
    with (
        ServerThread(tmp_path / "s", "stream", query=lambda kind: {"kind": kind}) as server,
        Vmm(tmp_path / "s", Recorder()) as vmm,
    ):
        assert vmm.query("a kind that is longer") == {"kind": "a kind that is longer"}
        until_in_thread(lambda: vmm.post_message(4, 1, 0, b"x" * 240) == 0)
        server.call(server.bus.wait_events, 1)
        assert server.bus.events == [PostedMessage(4, 1, 0, b"x" * 240)]


def test_a_signal_that_cannot_even_be_queued_fails(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rude = RudeServer()
    with rude.attach(recorder) as attachment:
        attachment._signal_by_message = True
        port = AddEventPort(17, 0).encode()
        assert rude.ask(attachment, Number.ADD_EVENT_PORT, port, fds=(rude.eventfd(),)) == 0
        monkeypatch.setattr("vmbus.attach.client.channel_io.MAX_OUTGOING", 0)
        while attachment._io.try_send(pack_frame(Number.SIGNAL_EVENT, ASYNC, 0, bytes(8))):
            pass
        assert attachment.signal_event(17) == HV_STATUS_INVALID_CONNECTION_ID
        with pytest.raises(AttachError, match="does not read"):
            attachment.pause()
    rude.close()
