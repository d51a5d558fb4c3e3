"""A worker that a guest has taken over, and what it says to the supervisor."""

from __future__ import annotations

import logging
import os
import signal
import uuid

import pytest
import trio
import trio.testing

from tests.support.supervisor import FakeOwner, fake_worker
from tests.unit.supervisor.test_workers import hand_over
from vmbus.attach.server.admission import Names, Roll
from vmbus.supervisor import relay
from vmbus.supervisor.parcels import MAX_UNASKED, pack
from vmbus.supervisor.workers import MAX_FAULTS, describe_status


async def test_answers_to_claims_that_nobody_reads_are_not_waited_for():
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, ends):
        parcel = pack({"claim": str(uuid.UUID(int=1))})

        def flood() -> None:
            try:
                for _ in range(2_000):
                    os.write(ends.up, parcel * 100)
            except BrokenPipeError:
                return  # it was killed for that

        await trio.to_thread.run_sync(flood)
        await worker.gone.wait()
        assert owner.killed == [4711]


async def test_a_worker_that_is_gone_when_its_claim_is_answered_harms_nobody():
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, ends):
        os.close(ends.claims)
        try:
            ends.say(claim=str(uuid.UUID(int=1)))
            await worker.gone.wait()
            assert owner.killed
        finally:
            ends.claims = os.open("/dev/null", os.O_RDONLY)


async def test_one_admission_at_a_time_and_one_name_in_all():
    roll = Roll()
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, ends):
        hand_over(worker, Names(roll))
        ends.hear()
        os.write(ends.up, b"".join(pack({"ask": n, "admit": f"vm{n}"}) for n in range(5)))
        await trio.testing.wait_all_tasks_blocked()
        answers = [ends.hear() for _ in range(5)]
        assert sum("value" in each for each in answers) == 1
        ends.hang_up()
        await worker.gone.wait()
    for number in range(5):
        assert await roll.enter(f"vm{number}") == f"vm{number}"


@pytest.mark.parametrize("said", ["x" * 256, "\udc80", "é" * 128, "a\nb", "\x1b[2J"])
async def test_a_name_that_no_vmm_can_say_ends_the_worker(said):
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, ends):
        hand_over(worker, Names())
        ends.say(ask=1, admit=said)
        await worker.gone.wait()
        assert owner.killed


async def test_a_process_that_has_closed_its_line_or_given_its_name_back_ends():
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, ends):
        hand_over(worker)
        ends.say(ask=1, admit="vm")
        ends.say(left=True)
        await trio.testing.wait_all_tasks_blocked()
        assert owner.expected == [worker], "it has so long to end"
        ends.hang_up()
        await worker.gone.wait()
        assert owner.killed == [4711], "a line ends with its process"


async def test_long_messages_are_for_those_who_were_asked():
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, ends), trio.open_nursery() as nursery:
        got = []

        async def ask() -> None:
            got.append(await worker.ask({"query": "guests"}))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        long = {"answer": 1, "value": {"text": "x" * MAX_UNASKED}}
        await trio.to_thread.run_sync(lambda: os.write(ends.up, pack(long)))
        await trio.testing.wait_all_tasks_blocked()
        assert len(got[0]["text"]) == MAX_UNASKED
        await trio.to_thread.run_sync(lambda: os.write(ends.up, pack(long)))
        await worker.gone.wait()
        assert owner.killed


@pytest.mark.parametrize(
    "line", [{"text": "NESTED"}, "NESTED", {"text": "a", "error": "NESTED"}, {"text": 5}, 5]
)
async def test_lines_that_are_no_text_end_the_worker(line):
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, ends):
        for depth in (5, 900, 950, 970, 980, 990):
            data = pack({"log": line})[4:].replace(b'"NESTED"', b"[" * depth + b"]" * depth)
            try:
                os.write(ends.up, len(data).to_bytes(4, "little") + data)
            except BrokenPipeError:
                break
        await worker.gone.wait()
        assert owner.killed


async def test_counts_of_a_worker_are_counts():
    owner = FakeOwner()
    async with fake_worker(owner) as (worker, ends):
        ends.say(attached=True)
        ends.say(attached=True)
        ends.say(ended={"attached": True, "failed": False, "faults": -5})
        await trio.testing.wait_all_tasks_blocked()
        assert (owner.attached, worker.faults) == (1, 0)
        ends.say(ended={"attached": True, "failed": False, "faults": 10**4000})
        await trio.testing.wait_all_tasks_blocked()
        assert worker.faults == MAX_FAULTS


def test_a_line_is_one_line_and_makes_no_loggers_without_end(caplog):
    relay.replay_untrusted(
        {"logger": "vmbus", "level": 40, "text": "a\nERROR forged\x1b[2J\r\u2028é"}
    )
    assert caplog.records[-1].getMessage() == "a\\nERROR forged\\x1b[2J\\r\\u2028é"
    relay.replay_untrusted(
        {"logger": "vmbus", "level": 40, "text": "a", "traceback": "Traceback\nERROR forged"}
    )
    assert caplog.records[-1].getMessage() == "a\n  Traceback\n  ERROR forged"
    before = len(logging.root.manager.loggerDict)
    for number in range(1000):
        relay.replay_untrusted({"logger": f"x{number}.a.b.c.d", "level": 40, "text": "t"})
    assert len(logging.root.manager.loggerDict) - before <= 1000
    assert caplog.records[-1].name == "vmbus"


@pytest.mark.parametrize("number", range(1, signal.SIGRTMAX + 1))
def test_every_signal_has_a_name(number):
    assert describe_status(number).startswith("was killed by ")
