"""The client library against the real server in another thread."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.attach import RAM_SIZE, Recorder, make_eventfd, make_memfd
from tests.support.attach_client import ServerThread, Vmm
from tests.support.patience import LOOK, PATIENCE, until_in_thread
from vmbus.attach.client.attachment import (
    HV_STATUS_INSUFFICIENT_BUFFERS,
    HV_STATUS_INVALID_CONNECTION_ID,
    HV_STATUS_INVALID_PARAMETER,
    Attachment,
    Region,
)
from vmbus.attach.client.connect import connect_socket
from vmbus.attach.client.operator import command, query
from vmbus.attach.protocol.limits import ALL_FEATURES
from vmbus.attach.protocol.messages import RefusedError, State
from vmbus.attach.server import ServerLimits
from vmbus.attach.server.transport import SocketTransport
from vmbus.errors import AttachError, ConfigError
from vmbus.partition.events import PartitionReset, PostedMessage

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


def test_a_guest_lives_a_whole_life(tmp_path: Path, mode: str) -> None:
    recorder = Recorder()
    with (
        ServerThread(tmp_path / "s", mode, query=lambda kind: {"kind": kind}) as server,
        Vmm(tmp_path / "s", recorder) as vmm,
    ):
        assert vmm.server_name == "vmbus"
        assert vmm.features == ALL_FEATURES
        assert vmm.post_message(4, 1, 1, b"hello") == 0
        server.call(server.bus.wait_events, 1)
        assert server.bus.events == [PostedMessage(4, 1, 1, b"hello")]
        assert server.call(server.transport.deliver, 1, 2, 1, b"answer")
        assert recorder.named("deliver") == [("deliver", 1, 2, 1, b"answer")]
        bell = server.call(server.transport.add_event_port, 17, 0)
        assert vmm.signal_event(17) == 0
        assert vmm.signal_event(17, 1) == HV_STATUS_INVALID_CONNECTION_ID
        assert os.eventfd_read(bell.fd) == 1
        os.eventfd_write(bell.fd, 0xFFFFFFFFFFFFFFFE)
        assert vmm.signal_event(17) == 0
        server.call(server.transport.remove_event_port, 17, 0)
        assert vmm.signal_event(17) == HV_STATUS_INVALID_CONNECTION_ID
        assert recorder.named("no port") == [("no port", 17, 0)]
        more = make_memfd()
        vmm.add_memory(Region(1 << 32, RAM_SIZE, more))
        vmm.remove_memory(1 << 32, RAM_SIZE)
        vmm.set_memory_table([Region(0, RAM_SIZE, more), Region(1 << 32, RAM_SIZE, more)])
        os.close(more)
        vmm.pause()
        assert vmm.state is State.PAUSED
        vmm.resume()
        vmm.reset()
        assert vmm.query("status") == {"kind": "status"}
        with pytest.raises(RefusedError) as caught:
            vmm.remove_memory(4096, 4096)
        assert caught.value.errno == errno.ENOENT
        vmm.goodbye()
        recorder.wait_for(lambda calls: any(call[0] == "closed" for call in calls))
        assert vmm.post_message(4, 1, 0, b"x") == HV_STATUS_INVALID_CONNECTION_ID
        with pytest.raises(AttachError):
            vmm.pause()
    assert vmm.fileno() == -1
    assert len(recorder.named("closed")) == 1


def test_blocking_calls_look_after_frames_while_nobody_else_does(tmp_path: Path) -> None:
    recorder = Recorder()
    with (
        ServerThread(tmp_path / "s", "seqpacket") as server,
        Vmm(tmp_path / "s", recorder, threaded=False) as vmm,
    ):
        server.call_sync(server.transport.report, "hello")
        vmm.pause()
        assert recorder.named("log") == [("log", "hello")]


def test_an_event_loop_can_look_after_it(tmp_path: Path, mode: str) -> None:
    recorder = Recorder()
    with (
        ServerThread(tmp_path / "s", mode) as server,
        Vmm(tmp_path / "s", recorder, threaded=False) as vmm,
    ):
        call = server.call_sync(server.transport.open_call, 0, 2, 5)
        server.call_sync(call.signal)
        poll = select.poll()
        poll.register(vmm.fileno(), select.POLLIN)
        while not recorder.named("flag"):
            assert poll.poll(PATIENCE * 1000)
            assert vmm.process()
        server.stop()
        while vmm.fileno() >= 0 and poll.poll(PATIENCE * 1000):
            if not vmm.process():
                break
        assert recorder.named("closed")
        assert not vmm.process()


def test_many_threads_share_an_attachment(tmp_path: Path) -> None:
    recorder = Recorder()
    statuses: list[int] = []
    with (
        ServerThread(tmp_path / "s", "seqpacket", query=lambda kind: {"kind": kind}) as server,
        Vmm(tmp_path / "s", recorder, threaded=False) as vmm,
    ):

        def work(number: int) -> None:
            for _ in range(20):
                while (status := vmm.post_message(4, 1, 0, b"x")) == HV_STATUS_INSUFFICIENT_BUFFERS:
                    # As the guest does; somebody's request below brings the credits.
                    time.sleep(LOOK)
                statuses.append(status)
                try:
                    assert vmm.query(f"q{number}") == {"kind": f"q{number}"}
                except RefusedError as error:
                    if error.errno != errno.EBUSY:
                        raise

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert statuses == [0] * 80
        server.call(server.bus.wait_events, 80)


@pytest.mark.parametrize("take", [False, True])
def test_call_eventfds_are_watched_for_the_vmm_or_given_to_it(
    tmp_path: Path, *, take: bool
) -> None:
    recorder = Recorder()
    recorder.take_call_fds = take
    with ServerThread(tmp_path / "s", "seqpacket") as server, Vmm(tmp_path / "s", recorder) as vmm:
        call = server.call_sync(server.transport.open_call, 0, 2, 5)
        recorder.wait_for(lambda calls: any(c[0] == "call" for c in calls))
        (seen,) = recorder.named("call")
        server.call_sync(call.signal)
        if take:
            assert select.select([seen[5]], [], [], PATIENCE)[0]
            assert os.eventfd_read(seen[5]) == 1
        else:
            recorder.wait_for(lambda calls: ("flag", 0, 2, 5) in calls)
        server.call_sync(call.signal)
        server.call_sync(call.retarget, 1)
        server.call_sync(call.signal)
        recorder.wait_for(lambda calls: sum(c[0] == "call" for c in calls) == 2)
        if not take:
            recorder.wait_for(lambda calls: ("flag", 1, 2, 5) in calls)
        server.call_sync(call.close)
        recorder.wait_for(lambda calls: sum(c[0] == "call" for c in calls) == 3)
        assert recorder.named("call")[2][1:] == (seen[1], 1, 2, 5, None)
        if take:
            for _, _, _, _, _, fd in recorder.named("call")[:2]:
                os.close(fd)
        vmm.pause()


def test_flags_travel_directly_when_the_vmm_allows_it(tmp_path: Path) -> None:
    recorder = Recorder()
    sint = make_eventfd()
    with ServerThread(tmp_path / "s", "seqpacket") as server:
        vmm = Vmm(tmp_path / "s", recorder)
        with vmm as attachment:
            attachment.set_sint_fd(1, sint)
            attachment.synic_state(1, 1, 0x3001, 0x4001, 0xF3)
            call = server.call_sync(server.transport.open_call, 1, 2, 10)
            server.call_sync(call.signal)
            assert os.eventfd_read(sint) == 1
            assert os.pread(vmm.ram, 2, 0x4000 + 512) == b"\0\4"
            assert recorder.named("flag") == []
    os.close(sint)


def test_events_can_be_signalled_by_message(tmp_path: Path) -> None:
    recorder = Recorder()
    with (
        ServerThread(tmp_path / "s", "seqpacket") as server,
        Vmm(tmp_path / "s", recorder, signal_by_message=True) as vmm,
    ):
        bell = server.call(server.transport.add_event_port, 17, 0)
        assert vmm.signal_event(17) == 0
        assert vmm.signal_event(18) == HV_STATUS_INVALID_CONNECTION_ID
        assert select.select([bell.fd], [], [], PATIENCE)[0]
        vmm.close()
        recorder.wait_for(lambda calls: bool(calls) and calls[-1][0] == "closed")
        assert vmm.signal_event(17) == HV_STATUS_INVALID_CONNECTION_ID


def test_a_reset_calls_deliveries_off(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.hold_deliveries = True
    with ServerThread(tmp_path / "s", "seqpacket") as server, Vmm(tmp_path / "s", recorder) as vmm:
        results = []

        def deliver() -> None:
            results.append(server.call(server.transport.deliver, 0, 2, 1, b"x"))

        thread = threading.Thread(target=deliver)
        thread.start()
        recorder.wait_for(lambda calls: any(c[0] == "deliver" for c in calls))
        (done,) = recorder.pending
        assert done.pending
        vmm.reset()
        assert not done.pending
        done()
        thread.join(PATIENCE)
        assert results == [False]
        assert isinstance(server.bus.events[-1], PartitionReset)


def test_the_vmm_can_come_back(tmp_path: Path) -> None:
    with ServerThread(tmp_path / "s", "seqpacket") as server:
        for life in range(1, 4):
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    vmm = Vmm(tmp_path / "s", Recorder())
                except RefusedError as error:
                    # The server is still cleaning up after us.
                    if error.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise
                else:
                    break
            with vmm as attachment:
                attachment.post_message(4, 1, 0, b"life")
                server.call(server.bus.wait_events, life)


def test_a_server_that_goes_is_noticed(tmp_path: Path) -> None:
    recorder = Recorder()
    with ServerThread(tmp_path / "s", "seqpacket") as server, Vmm(tmp_path / "s", recorder) as vmm:
        server.stop()
        recorder.wait_for(lambda calls: bool(calls) and calls[-1][0] == "closed")
        assert "goodbye" in recorder.calls[-1][1]
        with pytest.raises(AttachError, match="goodbye"):
            vmm.reset()


def test_posts_beyond_the_credits_are_for_the_guest_to_repeat(tmp_path: Path) -> None:
    gate = threading.Event()

    async def handler(transport: SocketTransport) -> None:
        await transport.add_message_port(4)
        async for event in transport.incoming():
            await trio.to_thread.run_sync(gate.wait)
            event.done()

    limits = ServerLimits(post_credits=4)
    with (
        ServerThread(tmp_path / "s", "seqpacket", handler=handler, limits=limits),
        Vmm(tmp_path / "s", Recorder()) as vmm,
    ):
        statuses = [vmm.post_message(4, 1, 0, b"x") for _ in range(10)]
        assert statuses[:4] == [0] * 4
        assert HV_STATUS_INSUFFICIENT_BUFFERS in statuses
        gate.set()
        until_in_thread(lambda: vmm.post_message(4, 1, 0, b"x") == 0)
        assert vmm.post_message(5, 1, 0, b"") == HV_STATUS_INVALID_CONNECTION_ID
        assert vmm.post_message(4, 0, 0, b"") == HV_STATUS_INVALID_PARAMETER
        assert vmm.post_message(4, 1 << 31, 0, b"") == HV_STATUS_INVALID_PARAMETER
        assert vmm.post_message(4, 1, 0, bytes(241)) == HV_STATUS_INVALID_PARAMETER


def test_operators_ask_and_command(tmp_path: Path, mode: str) -> None:
    big = {"x": "y" * 100_000}
    options: dict[str, Any] = {"query": lambda _: big, "command": lambda value: {"did": value}}
    with ServerThread(tmp_path / "s", mode, **options):
        assert query(tmp_path / "s", "all") == big
        assert command(tmp_path / "s", {"a": 1}) == {"did": {"a": 1}}
        with pytest.raises(RefusedError, match="EMSGSIZE"):
            query(tmp_path / "s", "")
        with Vmm(tmp_path / "s", Recorder()) as vmm:
            assert vmm.query("all") == big


def test_nobody_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="No such file"):
        query(tmp_path / "s", "all")
    with pytest.raises(AttachError, match="No such file"):
        Attachment.connect(tmp_path / "s", Recorder(), mode="stream")
    with pytest.raises(ConfigError, match="mode"):
        connect_socket(tmp_path / "s", "datagram")
