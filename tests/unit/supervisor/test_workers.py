"""A worker as the supervisor sees it: what it asks, what it is asked, and its end."""

from __future__ import annotations

import errno
import logging
import os
import socket
import uuid

import pytest
import trio
import trio.testing

from tests.support.supervisor import FakeOwner, fake_worker
from vmbus.attach.server.admission import Names, Peer, Roll
from vmbus.errors import ConfigError
from vmbus.supervisor.parcels import MAX_UP
from vmbus.supervisor.workers import Gone, describe_status

ME = Peer(os.getpid(), os.getuid(), os.getgid())


def hand_over(worker, admission=None):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        worker.serve(theirs, ME, admission or Names(), 1)


async def test_a_connection_goes_down_and_a_name_comes_back():
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, ends):
        ends.say(ready=True)
        await worker.ready.wait()
        hand_over(worker)
        assert ends.hear() == {"serve": True}
        ends.say(ask=1, admit="vm")
        await trio.testing.wait_all_tasks_blocked()
        assert ends.hear() == {"answer": 1, "value": {"name": "vm", "shared": []}}
        assert (worker.name, worker.label) == ("vm", "vm")
        ends.say(ask=2, admit="another")
        await trio.testing.wait_all_tasks_blocked()
        assert ends.hear()["error"] == "HELLO: it has been answered"
        ends.say(attached=True)
        ends.say(ended={"attached": True, "failed": False, "faults": 3})
        ends.hang_up()
        await worker.gone.wait()
        assert worker.attached
        assert (worker.failed, worker.faults) == (False, 3)
        assert owner.gone == [worker]
        assert owner.killed == [4711], "no process outlives its line"


async def test_names_and_ids_go_back_when_a_worker_says_so_or_ends():
    roll = Roll()
    for ending in ("left", "end"):
        async with fake_worker(FakeOwner()) as (worker, ends):
            hand_over(worker, Names(roll))
            ends.hear()
            ends.say(ask=1, admit="vm")
            await trio.testing.wait_all_tasks_blocked()
            assert ends.hear()["value"]["name"] == "vm"
            ends.say(claim=str(uuid.UUID(int=7)))
            await trio.testing.wait_all_tasks_blocked()
            assert os.read(ends.claims, 1) == b"y"
            ends.say(claim="nonsense")
            await trio.testing.wait_all_tasks_blocked()
            assert os.read(ends.claims, 1) == b"n"
            if ending == "left":
                ends.say(leaving=True)
                ends.say(left=True)
                await trio.testing.wait_all_tasks_blocked()
                assert await roll.enter("vm") == "vm"
                roll.leave("vm")
    assert await roll.enter("vm") == "vm"


async def test_a_full_server_says_so():
    async with fake_worker(FakeOwner(full="this server is full")) as (worker, ends):
        hand_over(worker)
        ends.hear()
        ends.say(ask=1, admit="vm")
        await trio.testing.wait_all_tasks_blocked()
        assert ends.hear() == {
            "answer": 1, "error": "HELLO: this server is full", "errno": errno.EAGAIN
        }  # fmt: skip
        assert worker.name is None


async def test_questions_and_their_answers():
    async with fake_worker(FakeOwner()) as (worker, ends):
        answers: list[object] = []

        async def ask(**what):
            try:
                answers.append(await worker.ask(what))
            except (ConfigError, OSError, Gone) as error:
                answers.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask(query="guests"))
            await trio.testing.wait_all_tasks_blocked()
            assert ends.hear() == {"ask": 1, "query": "guests"}
            ends.say(answer=99, value={"nobody": "asked"})
            ends.say(answer=1, value={"a": 1})
        assert answers == [{"a": 1}]
        for number, said in enumerate(
            ({"error": "no", "errno": errno.EINVAL}, {"error": "io", "errno": errno.EIO}, {}), 2
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: ask(command={}))
                await trio.testing.wait_all_tasks_blocked()
                ends.hear()
                if said:
                    ends.say(answer=number, **said)
                else:
                    ends.hang_up()
        assert isinstance(answers[1], ConfigError)
        assert isinstance(answers[2], OSError)
        assert isinstance(answers[3], Gone)
        with pytest.raises(Gone):
            worker.send({})


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x02\0\0\0[]", b'\x07\0\0\0{"a":1}'])
async def test_a_worker_that_talks_nonsense_is_killed(data, caplog):
    assert int.from_bytes(b"\xff\xff\xff\xff", "little") > MAX_UP
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, ends):
        os.write(ends.up, data)
        await worker.gone.wait()
        assert owner.killed == [4711]
    assert "worker 4711: killed, for it sent" in caplog.text


@pytest.mark.parametrize(
    ("level", "said", "most"), [(logging.WARNING, 1000, 300), (logging.DEBUG, 40_000, 30_000)]
)
async def test_a_worker_cannot_fill_the_log(caplog, autojump_clock, level, said, most):
    caplog.set_level(logging.DEBUG)
    async with fake_worker(FakeOwner()) as (worker, ends):
        for number in range(said):
            ends.say(log={"logger": "vmbus", "level": level, "text": f"line {number}"})
            if number % 100 == 0:
                await trio.testing.wait_all_tasks_blocked()
        ends.hang_up()
        await worker.gone.wait()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == ["line 0", "line 1"]
    assert len(lines) < most
    assert lines[-1].endswith("lines of its log were left out")


async def test_who_debugs_sees_each_control_message_of_a_driver_that_comes_and_goes(caplog):
    caplog.set_level(logging.DEBUG)
    async with fake_worker(FakeOwner()) as (worker, ends):
        for number in range(5000):
            ends.say(log={"logger": "vmbus", "level": logging.DEBUG, "text": f"line {number}"})
            if number % 100 == 0:
                await trio.testing.wait_all_tasks_blocked()
        ends.hang_up()
        await worker.gone.wait()
    assert [record.getMessage() for record in caplog.records] == [f"line {n}" for n in range(5000)]


async def test_a_gap_in_a_workers_log_is_said_where_it_is(caplog, autojump_clock):
    async with fake_worker(FakeOwner()) as (worker, ends):
        for number in range(250):
            ends.say(log={"logger": "vmbus", "level": logging.WARNING, "text": f"line {number}"})
        await trio.sleep(1)
        ends.say(log={"logger": "vmbus", "level": logging.WARNING, "text": "afterwards"})
        ends.hang_up()
        await worker.gone.wait()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[-2].endswith("50 lines of its log were left out")
    assert lines[-1] == "afterwards"


async def test_a_worker_that_does_not_read_is_killed_rather_than_waited_for():
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, _):
        with pytest.raises(Gone):
            for _ in range(10_000):
                worker.send({"ask": "x" * 1000})
        worker.stop()
        assert owner.killed == [4711]


def test_how_a_process_ended():
    assert describe_status(0) == ""
    assert describe_status(3 << 8) == "ended with exit code 3"
    assert describe_status(9) == "was killed by SIGKILL"
