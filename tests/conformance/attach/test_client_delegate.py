"""What the client library asks of the VMM that uses it: ports, deliveries, memory."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from tests.support.attach import RAM_SIZE, Recorder, make_memfd
from tests.support.attach_client import RudeServer, ServerThread
from tests.support.patience import PATIENCE
from vmbus.attach.client.attachment import Attachment, Region
from vmbus.attach.client.operator import query
from vmbus.attach.protocol.framing import ASYNC, ERROR
from vmbus.attach.protocol.limits import PortKind
from vmbus.attach.protocol.messages import Number, RefusedError, State
from vmbus.attach.protocol.to_server import HelloReply, JsonObject
from vmbus.attach.protocol.to_vmm import (
    AddEventPort,
    AddMsgPort,
    DeliverMessage,
    DelPort,
    ErrorReply,
    Log,
    SetCallFd,
)
from vmbus.errors import LocalProtocolError

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


def test_ports_are_checked(attached: Attachment, rude: RudeServer, recorder: Recorder) -> None:
    one = AddMsgPort(1).encode()
    assert rude.ask(attached, Number.ADD_MSG_PORT, one) == 0
    assert rude.ask(attached, Number.ADD_MSG_PORT, one) == errno.EEXIST
    port = AddEventPort(17, 0).encode()
    fd = rude.eventfd()
    pipe, other = os.pipe()
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port) == errno.EINVAL
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port, fds=(pipe,)) == errno.EINVAL
    os.close(pipe)
    os.close(other)
    recorder.raise_on["port"] = OSError(errno.ENOSPC, "no slot")
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port, fds=(fd,)) == errno.ENOSPC
    recorder.raise_on["port"] = ZeroDivisionError()
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port, fds=(fd,)) == errno.EIO
    recorder.raise_on.clear()
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port, fds=(fd,)) == 0
    assert rude.ask(attached, Number.ADD_EVENT_PORT, port, fds=(fd,)) == errno.EEXIST
    gone = DelPort(17, 0, PortKind.EVENT).encode()
    assert rude.ask(attached, Number.DEL_PORT, gone) == 0
    assert rude.ask(attached, Number.DEL_PORT, gone) == errno.ENOENT
    gone = DelPort(1, 0, PortKind.MESSAGE).encode()
    assert rude.ask(attached, Number.DEL_PORT, gone) == 0
    assert rude.ask(attached, Number.DEL_PORT, gone) == errno.ENOENT
    call = SetCallFd(3, 0, 2, 1).encode()
    assert rude.ask(attached, Number.SET_CALL_FD, call) == errno.ENOENT
    assert rude.ask(attached, Number.SET_CALL_FD, call, fds=(fd,)) == 0


def test_ports_are_limited(
    attached: Attachment, rude: RudeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.attach.client.ports.MAX_PORTS", 1)
    fd = rude.eventfd()
    codes = []
    for number in (1, 2):
        codes += [
            rude.ask(attached, Number.ADD_MSG_PORT, AddMsgPort(number).encode()),
            rude.ask(attached, Number.ADD_EVENT_PORT, AddEventPort(number, 0).encode(), fds=(fd,)),
            rude.ask(attached, Number.SET_CALL_FD, SetCallFd(number, 0, 2, 1).encode(), fds=(fd,)),
        ]
    assert codes == [0, 0, 0, errno.ENOSPC, errno.ENOSPC, errno.ENOSPC]
    # Replacing is not adding.
    again = SetCallFd(1, 1, 2, 1).encode()
    assert rude.ask(attached, Number.SET_CALL_FD, again, fds=(fd,)) == 0


def test_a_delegate_that_fails_refuses_the_delivery(
    attached: Attachment, rude: RudeServer, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.hold_deliveries = True
    recorder.raise_on["deliver"] = ZeroDivisionError("a bug")
    message = DeliverMessage(0, 2, 1, b"x").encode()
    assert rude.ask(attached, Number.DELIVER_MESSAGE, message) == errno.EIO
    assert "a bug" in caplog.text
    recorder.raise_on["log"] = ZeroDivisionError("another bug")
    rude.send(Number.LOG, Log(0, "x").encode(), flags=ASYNC)
    assert attached.process()
    assert "another bug" in caplog.text


def test_a_delegate_that_fails_on_a_call_is_logged(
    attached: Attachment, rude: RudeServer, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    fd = rude.eventfd()
    assert rude.ask(attached, Number.SET_CALL_FD, SetCallFd(3, 0, 2, 1).encode(), fds=(fd,)) == 0
    recorder.raise_on["flag"] = ZeroDivisionError("a bug")
    os.eventfd_write(fd, 1)
    while not recorder.named("flag"):
        assert attached.process()
    assert "a bug" in caplog.text
    recorder.raise_on.clear()
    # Somebody else has read the eventfd by the time we look.
    attached._ports.called(next(iter(attached._ports._watched)))
    attached._ports.called(-5)
    assert len(recorder.named("flag")) == 1


@pytest.mark.parametrize("code", [0, errno.ENXIO])
def test_deliveries_are_answered_by_any_thread(
    attached: Attachment, rude: RudeServer, recorder: Recorder, code: int
) -> None:
    recorder.hold_deliveries = True
    rude.send(Number.DELIVER_MESSAGE, DeliverMessage(0, 2, 1, b"x").encode(), seq=9)
    assert attached.process()
    thread = threading.Thread(target=recorder.pending[0], args=(code,))
    thread.start()
    thread.join(PATIENCE)
    frame = rude.receive()
    assert (frame.kind, frame.seq) == (Number.DELIVER_MESSAGE, 9)
    assert bool(frame.flags & ERROR) == bool(code)


def test_deliveries_that_cross_a_reset_are_called_off(
    attached: Attachment, rude: RudeServer, recorder: Recorder
) -> None:
    def answer() -> None:
        frame = rude.receive()
        rude.send(Number.DELIVER_MESSAGE, DeliverMessage(0, 2, 1, b"x").encode(), seq=9)
        refused = rude.receive()
        assert ErrorReply.decode_untrusted(refused.payload).errno == errno.ECANCELED
        rude.reply(frame)

    thread = threading.Thread(target=answer)
    thread.start()
    attached.reset()
    thread.join(PATIENCE)
    assert recorder.calls == []


def test_a_delegate_must_not_block(
    attached: Attachment, rude: RudeServer, recorder: Recorder
) -> None:
    problems: list[Exception] = []

    def log(text: str) -> None:
        for function in (attached.pause, attached.run, attached.process):
            try:
                function()
            except LocalProtocolError as error:
                problems.append(error)
        attached.close("enough")

    recorder.log = log  # type: ignore[method-assign]
    rude.send(Number.LOG, Log(0, "x").encode(), flags=ASYNC)
    assert not attached.process()
    assert len(problems) == 1
    assert recorder.calls == [("closed", "enough")]
    attached.close()


def test_a_connected_descriptor_can_be_adopted(recorder: Recorder) -> None:
    server = RudeServer()

    def serve() -> None:
        server.reply(server.receive(), HelloReply(1, 64, 0, 32768, 1, "").encode())
        server.reply(server.receive(), JsonObject({"a": 1}).encode())
        server.reply(server.receive())

    thread = threading.Thread(target=serve)
    thread.start()
    assert query(server.client.detach(), "x") == {"a": 1}
    thread.join(PATIENCE)
    server.close()


def test_a_refused_memory_table_can_be_repeated(tmp_path: Path) -> None:
    def states() -> list[State]:
        return [vmm.state]

    with (
        ServerThread(tmp_path / "s", "seqpacket"),
        Attachment.connect(tmp_path / "s", Recorder()) as vmm,
    ):
        vmm.vm_info(1)
        fd = make_memfd(seal=False)
        with pytest.raises(RefusedError, match="F_SEAL_SHRINK"):
            vmm.set_memory_table([Region(0, RAM_SIZE, fd)])
        os.close(fd)
        assert states() == [State.DESCRIBED]
        fd = make_memfd()
        vmm.set_memory_table([Region(0, RAM_SIZE, fd)])
        with pytest.raises(RefusedError, match="overlap"):
            vmm.set_memory_table([Region(0, RAM_SIZE, fd), Region(0, RAM_SIZE, fd)])
        os.close(fd)
        assert states() == [State.ATTACHED]
