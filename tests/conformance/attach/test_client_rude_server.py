"""The client library against a server that answers nonsense, late, or not at all."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from tests.support.attach import Recorder
from tests.support.attach_client import RudeServer
from tests.support.patience import PATIENCE, SOON
from vmbus.attach.client.attachment import HV_STATUS_INVALID_CONNECTION_ID, Attachment
from vmbus.attach.client.operator import query
from vmbus.attach.protocol.framing import ASYNC, ERROR, REPLY
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import HelloReply
from vmbus.attach.protocol.to_vmm import (
    AddMsgPort,
    DeliverMessage,
    ErrorReply,
    Log,
    PostCredit,
    SignalFlag,
)
from vmbus.errors import AttachError

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


@pytest.mark.parametrize(
    "reply",
    [
        HelloReply(2, 64, 0, 32768, 1, ""),
        HelloReply(1, 64, 1 << 63, 32768, 1, ""),
        HelloReply(1, 64, 0, 32768, 0, ""),
    ],
)
def test_a_server_that_answers_hello_beyond_the_offer_is_left(
    rude: RudeServer, recorder: Recorder, reply: HelloReply
) -> None:
    thread = threading.Thread(target=lambda: rude.reply(rude.receive(), reply.encode()))
    thread.start()
    with pytest.raises(AttachError, match="HELLO reply"):
        Attachment.connect(rude.client, recorder)
    thread.join(PATIENCE)
    with pytest.raises(EOFError):
        rude.receive()


def test_a_server_that_says_nothing_is_given_up(rude: RudeServer, recorder: Recorder) -> None:
    with pytest.raises(AttachError, match="no answer"):
        Attachment.connect(rude.client, recorder, timeout=SOON)


def test_a_late_answer_is_dropped(attached: Attachment, rude: RudeServer) -> None:
    with pytest.raises(AttachError, match="no answer"):
        attached.query("slow", timeout=SOON)
    frame = rude.receive()
    rude.send(Number.QUERY, b"", flags=REPLY, seq=frame.seq, fds=(rude.eventfd(),))
    assert attached.process()
    assert rude.ask(attached, Number.ADD_MSG_PORT, AddMsgPort(1).encode()) == 0


@pytest.mark.parametrize(
    ("kind", "payload", "flags", "code"),
    [
        (Number.POST_MESSAGE, b"", 0, errno.ENOSYS),
        (0x4242, b"", 0, errno.ENOSYS),
        (Number.SIGNAL_FLAG, SignalFlag(0, 2, 1).encode(), 0, errno.EPROTO),
        (Number.ADD_MSG_PORT, b"", 0, errno.EMSGSIZE),
        (Number.DELIVER_MESSAGE, DeliverMessage(2, 2, 1, b"").encode(), 0, errno.EINVAL),
        (Number.DELIVER_MESSAGE, DeliverMessage(0, 16, 1, b"").encode(), 0, errno.EINVAL),
    ],
)
def test_a_bad_request_is_refused(
    attached: Attachment, rude: RudeServer, kind: int, payload: bytes, flags: int, code: int
) -> None:
    assert rude.ask(attached, kind, payload, flags=flags) == code


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Number.SIGNAL_FLAG, b"short"),
        (Number.SIGNAL_FLAG, SignalFlag(2, 2, 1).encode()),
        (Number.LOG, b"\0\0\0\0\x1b"),
        (0x4242, b""),
    ],
)
def test_a_bad_asynchronous_message_is_dropped(
    attached: Attachment, rude: RudeServer, recorder: Recorder, kind: int, payload: bytes
) -> None:
    rude.send(kind, payload, flags=ASYNC)
    assert attached.process()
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("kind", "payload", "flags", "text"),
    [
        (Number.RESET, b"", REPLY, "nothing was asked"),
        (Number.ADD_MSG_PORT, b"", ASYNC, "async flag"),
        (Number.POST_CREDIT, PostCredit(1).encode(), ASYNC, "more than was taken"),
        (Number.LOG, b"", ASYNC | REPLY, "flags"),
    ],
)
def test_a_server_that_cannot_be_answered_is_left(
    attached: Attachment,
    rude: RudeServer,
    recorder: Recorder,
    kind: int,
    payload: bytes,
    flags: int,
    text: str,
) -> None:
    rude.send(Number.LOG, Log(0, "before").encode(), flags=ASYNC)
    rude.send(kind, payload, flags=flags, fds=(rude.eventfd(),) if flags == REPLY else ())
    while attached.process():
        pass
    assert recorder.calls[0] == ("log", "before")
    assert recorder.calls[-1][0] == "closed"
    assert text in recorder.calls[-1][1]


@pytest.mark.parametrize("wrong", ["kind", "fds", "error", "json", "memfd", "both"])
def test_a_server_that_answers_nonsense_is_left_or_told_apart(
    attached: Attachment, rude: RudeServer, wrong: str
) -> None:
    fd = rude.eventfd()

    def answer() -> None:
        frame = rude.receive()
        if wrong == "kind":
            rude.send(Number.RESET, flags=REPLY, seq=frame.seq)
        elif wrong == "fds":
            rude.send(frame.kind, flags=REPLY, seq=frame.seq, fds=(fd, fd))
        elif wrong == "error":
            rude.send(frame.kind, b"\0\0\0\0", flags=REPLY | ERROR, seq=frame.seq)
        elif wrong == "json":
            rude.send(frame.kind, b"[]", flags=REPLY, seq=frame.seq)
        elif wrong == "memfd":
            rude.send(frame.kind, flags=REPLY, seq=frame.seq, fds=(fd,))
        else:
            rude.send(frame.kind, b"{}", flags=REPLY, seq=frame.seq, fds=(fd,))

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(AttachError):
        attached.query("x")
    thread.join(PATIENCE)


def test_two_replies_of_which_one_is_too_many_do_not_leak(
    attached: Attachment, rude: RudeServer
) -> None:
    fd = rude.eventfd()
    for seq in (1000, 1001):
        rude.send(Number.QUERY, flags=REPLY, seq=seq, fds=(fd,))
    assert not attached.process()


def test_a_dead_server_is_noticed_by_those_who_send(rude: RudeServer, recorder: Recorder) -> None:
    recorder.hold_deliveries = True
    attachment = rude.attach(recorder)
    assert rude.ask(attachment, Number.ADD_MSG_PORT, AddMsgPort(4).encode()) == 0
    rude.send(Number.DELIVER_MESSAGE, DeliverMessage(0, 2, 1, b"x").encode(), seq=9)
    assert attachment.process()
    rude.close()
    assert attachment.post_message(4, 1, 0, b"x") == HV_STATUS_INVALID_CONNECTION_ID
    recorder.pending[0]()
    with pytest.raises(AttachError, match=r"closed|lost"):
        attachment.pause()
    assert not attachment.process()
    attachment.close()
    assert len(recorder.named("closed")) == 1
    with pytest.raises(AttachError, match="closed"):
        attachment._io.try_send(b"x")
    attachment._io.close()
    attachment._io.shutdown()


@pytest.mark.parametrize("script", ["eof", "error", "type", "framing", "hello", "silence"])
def test_an_operator_is_told_what_is_wrong_with_the_server(rude: RudeServer, script: str) -> None:
    def serve() -> None:
        frame = rude.receive()
        if script == "eof":
            rude.sock.close()
        elif script == "error":
            rude.send(
                frame.kind,
                ErrorReply(errno.EPERM, "no").encode(),
                flags=REPLY | ERROR,
                seq=frame.seq,
            )
        elif script == "type":
            rude.send(Number.LOG, flags=ASYNC)
        elif script == "framing":
            rude.sock.send(b"\xff" * 20)
        elif script == "hello":
            rude.reply(frame, b"nonsense")

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(AttachError):
        query(rude.client, "x", timeout=SOON if script == "silence" else 20)
    thread.join(PATIENCE)


def test_a_huge_or_odd_reply_descriptor_is_not_read(rude: RudeServer) -> None:
    huge = os.memfd_create("huge")
    os.ftruncate(huge, 1 << 40)

    def serve() -> None:
        rude.reply(rude.receive(), HelloReply(1, 64, 0, 32768, 1, "").encode())
        frame = rude.receive()
        rude.send(frame.kind, flags=REPLY, seq=frame.seq, fds=(huge,))

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(AttachError, match="at most"):
        query(rude.client, "x")
    thread.join(PATIENCE)
    os.close(huge)


def test_a_reply_memfd_that_cannot_be_read_is_an_error(rude: RudeServer, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("{}")
    write_only = os.open(tmp_path / "f", os.O_WRONLY)

    def serve() -> None:
        rude.reply(rude.receive(), HelloReply(1, 64, 0, 32768, 1, "").encode())
        frame = rude.receive()
        rude.send(frame.kind, flags=REPLY, seq=frame.seq, fds=(write_only,))

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(AttachError, match="JSON reply"):
        query(rude.client, "x")
    thread.join(PATIENCE)
    os.close(write_only)


def test_a_server_that_hangs_up_with_unread_frames_is_noticed(
    rude: RudeServer, recorder: Recorder
) -> None:
    attachment = rude.attach(recorder)
    assert rude.ask(attachment, Number.ADD_MSG_PORT, AddMsgPort(4).encode()) == 0
    assert attachment.post_message(4, 1, 0, b"x") == 0
    rude.close()
    assert not attachment.process()
    assert "reset" in recorder.calls[-1][1]
