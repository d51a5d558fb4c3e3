"""Message slots and event flags, host to guest."""

from __future__ import annotations

import json
import threading

import pytest

import vmbus.synic.model
from tests.support.synic import SIMP, VECTOR, Guest, Partition
from vmbus.errors import BudgetError, ConfigError, LocalProtocolError
from vmbus.memory import full_fence
from vmbus.synic import Delivery, MessageQueue
from vmbus.wire.synic import HvStatus, Msr


def running() -> tuple[Partition, Guest]:
    partition = Partition(2)
    return partition, Guest(partition.synic).enable()


def test_a_message_lands_in_its_slot_and_interrupts():
    partition, guest = running()
    assert partition.synic.deliver_message(0, 2, 1, b"offer") is Delivery.DELIVERED
    assert guest.slot() == (1, False, 0, b"offer")
    assert partition.interrupts == [(0, VECTOR)]
    assert guest.slot(1).message_type == guest.slot(3).message_type == 0


@pytest.mark.parametrize("sint", [0, 15])
def test_every_sint_has_its_own_slot(sint):
    partition, guest = running()
    partition.synic.write_msr(0, Msr.SINT0 + sint, 0x40 + sint)
    assert partition.synic.deliver_message(0, sint, 0xFFFF_FFFF, bytes(240)) is Delivery.DELIVERED
    assert guest.slot(sint) == (0xFFFF_FFFF, False, 0, bytes(240))
    assert partition.interrupts == [(0, 0x40 + sint)]


def test_a_taken_slot_keeps_its_message_and_gets_the_pending_flag():
    """Checklist row 2: the flag makes the guest write EOM."""
    partition, guest = running()
    synic = partition.synic
    synic.deliver_message(0, 2, 1, b"first")
    assert not synic.poll(0, 2)
    assert synic.deliver_message(0, 2, 1, b"second") is Delivery.BUSY
    assert guest.slot() == (1, True, 0, b"first")
    assert partition.interrupts == [(0, VECTOR)]
    assert guest.receive()
    assert partition.freed == [0]
    assert synic.poll(0, 2)
    assert synic.deliver_message(0, 2, 1, b"second") is Delivery.DELIVERED
    assert guest.slot() == (1, False, 0, b"second")


def test_a_guest_that_nobody_waits_for_writes_no_eom():
    partition, guest = running()
    partition.synic.deliver_message(0, 2, 1, b"only")
    assert guest.receive()
    assert partition.freed == []


def test_a_slot_freed_just_before_the_pending_flag_is_set_is_not_missed(monkeypatch):
    """Checklist row 2: the guest has not seen the flag and will not write EOM."""
    partition, guest = running()
    partition.synic.deliver_message(0, 2, 1, b"first")

    def guest_frees_at_the_same_moment() -> None:
        full_fence()
        guest.memory.page(SIMP >> 12).cast("I")[2 * 64] = 0

    monkeypatch.setattr(vmbus.synic.model, "full_fence", guest_frees_at_the_same_moment)
    assert partition.synic.deliver_message(0, 2, 1, b"second") is Delivery.DELIVERED
    assert guest.slot() == (1, False, 0, b"second")
    assert partition.interrupts == [(0, VECTOR)] * 2


def test_a_slot_freed_just_after_the_look_is_reported_by_eom():
    """Checklist row 2: now the guest sees the flag."""
    partition, guest = running()
    partition.synic.deliver_message(0, 2, 1, b"first")
    assert partition.synic.deliver_message(0, 2, 1, b"second") is Delivery.BUSY
    assert guest.free()
    assert partition.synic.poll(0, 2)


def off(partition: Partition, msr: Msr) -> None:
    partition.synic.write_msr(0, msr, 0)


@pytest.mark.parametrize("msr", [Msr.SCONTROL, Msr.SIMP])
def test_messages_are_dropped_while_synic_or_page_are_off(msr):
    partition, guest = running()
    off(partition, msr)
    assert partition.synic.deliver_message(0, 2, 1, b"lost") is Delivery.DROPPED
    assert partition.synic.poll(0, 2)
    assert guest.slot().message_type == 0
    assert partition.interrupts == []


@pytest.mark.parametrize(("vp", "sint"), [(-1, 2), (2, 2), (1 << 32, 2), (0, -1), (0, 16)])
def test_messages_to_what_does_not_exist_are_dropped(vp, sint):
    partition, _ = running()
    assert partition.synic.deliver_message(vp, sint, 1, b"lost") is Delivery.DROPPED
    assert partition.synic.poll(vp, sint)


def test_pages_in_memory_that_is_gone_are_off():
    partition, _ = running()
    partition.memory.remove_region(0, 16 * 4096)
    assert partition.synic.deliver_message(0, 2, 1, b"lost") is Delivery.DROPPED
    assert partition.synic.set_flag(0, 2, 1) == HvStatus.INVALID_SYNIC_STATE


@pytest.mark.parametrize(
    ("message_type", "payload"), [(0, b""), (-1, b""), (1 << 32, b""), (1, bytes(241))]
)
def test_messages_that_no_slot_can_hold_are_the_callers_fault(message_type, payload):
    partition, _ = running()
    with pytest.raises(LocalProtocolError):
        partition.synic.deliver_message(0, 2, message_type, payload)


def test_a_message_for_a_masked_sint_interrupts_on_unmasking():
    partition, guest = running()
    partition.synic.write_msr(0, Msr.SINT2, 0x10000)
    assert partition.synic.deliver_message(0, 2, 1, b"patience") is Delivery.DELIVERED
    assert guest.slot().payload == b"patience"
    partition.synic.write_msr(0, Msr.SINT2, 0x10000 | VECTOR)
    partition.synic.write_msr(0, Msr.SINT0 + 3, VECTOR)
    assert partition.interrupts == []
    partition.synic.write_msr(0, Msr.SINT2, VECTOR)
    assert partition.interrupts == [(0, VECTOR)]
    partition.synic.write_msr(0, Msr.SINT2, VECTOR)
    assert partition.interrupts == [(0, VECTOR)]


def test_an_interrupt_is_not_owed_any_more_when_the_page_is_a_new_one():
    partition, _ = running()
    partition.synic.write_msr(0, Msr.SINT2, 0x10000)
    partition.synic.deliver_message(0, 2, 1, b"old")
    partition.synic.write_msr(0, Msr.SIMP, 0)
    partition.synic.write_msr(0, Msr.SIMP, SIMP | 1)
    partition.synic.write_msr(0, Msr.SINT2, VECTOR)
    assert partition.interrupts == []


def test_a_polled_sint_gets_messages_and_flags_but_no_interrupts():
    partition, guest = running()
    polled = 1 << 18 | 1 << 16
    partition.synic.write_msr(0, Msr.SINT2, polled)
    assert partition.synic.deliver_message(0, 2, 1, b"polled") is Delivery.DELIVERED
    assert partition.synic.set_flag(0, 2, 9) == HvStatus.SUCCESS
    assert guest.slot().payload == b"polled"
    assert guest.flags() == {9}
    partition.synic.write_msr(0, Msr.SINT2, VECTOR)
    assert partition.interrupts == []


def test_polling_takes_the_place_of_an_interrupt_that_is_owed():
    partition, _ = running()
    partition.synic.write_msr(0, Msr.SINT2, 0x10000)
    partition.synic.deliver_message(0, 2, 1, b"masked")
    partition.synic.write_msr(0, Msr.SINT2, 1 << 18 | 1 << 16)
    partition.synic.write_msr(0, Msr.SINT2, VECTOR)
    assert partition.interrupts == []


@pytest.mark.parametrize("flag", [0, 1, 7, 8, 2047])
def test_a_flag_is_set_in_the_words_of_its_sint(flag):
    partition, guest = running()
    assert partition.synic.set_flag(0, 2, flag) == HvStatus.SUCCESS
    assert guest.flags(1) == guest.flags(3) == set()
    assert guest.flags(2) == {flag}
    assert partition.interrupts == [(0, VECTOR)]


def test_every_flag_interrupts_even_if_it_was_set():
    """The old value may be one that the guest clears at this very moment."""
    partition, guest = running()
    for flag in (3, 3, 5):
        partition.synic.set_flag(0, 2, flag)
    assert partition.interrupts == [(0, VECTOR)] * 3
    assert guest.flags() == {3, 5}


@pytest.mark.parametrize(
    ("vp", "sint", "flag", "status"),
    [
        (-1, 2, 0, HvStatus.INVALID_VP_INDEX),
        (2, 2, 0, HvStatus.INVALID_VP_INDEX),
        (0, -1, 0, HvStatus.INVALID_PARAMETER),
        (0, 16, 0, HvStatus.INVALID_PARAMETER),
        (0, 2, -1, HvStatus.INVALID_PARAMETER),
        (0, 2, 2048, HvStatus.INVALID_PARAMETER),
        (1, 2, 0, HvStatus.INVALID_SYNIC_STATE),
        (0, 3, 0, HvStatus.INVALID_SYNIC_STATE),
    ],
)
def test_flags_that_cannot_be_set_have_a_status(vp, sint, flag, status):
    partition, _ = running()
    before = partition.memory.read(0, 16 * 4096)
    assert partition.synic.set_flag(vp, sint, flag) == status
    assert partition.memory.read(0, 16 * 4096) == before
    assert partition.interrupts == []


@pytest.mark.parametrize("msr", [Msr.SCONTROL, Msr.SIEFP])
def test_no_flag_is_set_while_synic_or_page_are_off(msr):
    partition, guest = running()
    off(partition, msr)
    assert partition.synic.set_flag(0, 2, 1) == HvStatus.INVALID_SYNIC_STATE
    assert guest.flags() == set()


def test_no_flag_is_set_for_a_masked_sint():
    """Its page may belong to somebody else already: UEFI masks, and leaves."""
    partition, guest = running()
    partition.synic.write_msr(0, Msr.SINT2, 0x10000)
    assert partition.synic.set_flag(0, 2, 1) == HvStatus.INVALID_SYNIC_STATE
    assert guest.flags() == set()


def test_a_saved_state_comes_back_elsewhere():
    first, guest = running()
    first.synic.write_msr(0, Msr.GUEST_OS_ID, 77)
    first.synic.write_msr(0, Msr.HYPERCALL, 0x4001)
    first.synic.write_msr(1, Msr.STIMER0_CONFIG, 5)
    first.synic.write_msr(0, Msr.CRASH_P0, 3)
    first.synic.write_msr(0, Msr.SINT2, 0x10000)
    first.synic.deliver_message(0, 2, 1, b"waiting")
    state = json.loads(json.dumps(first.synic.state()))

    second = Partition(2)
    second.memory.write(0, first.memory.read(0, 16 * 4096))
    second.synic.load(state)
    assert second.synic.state() == state
    assert second.synic.read_msr(0, Msr.HYPERCALL) == 0x4001
    assert Guest(second.synic).slot().payload == b"waiting"
    second.synic.write_msr(0, Msr.SINT2, VECTOR)
    assert second.interrupts == [(0, VECTOR)]
    assert guest.slot().payload == b"waiting"


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"guest_os_id": -1},
        {"hypercall": "1"},
        {"tsc_invariant": None},
        {"crash": [0] * 4},
        {"crash": [0] * 4 + [1 << 64]},
        {"vps": 3},
        {"vps": []},
        {"vps": [1]},
        {"vps": [{}]},
        {"vps": [{"sints": [0] * 15}]},
    ],
)
def test_states_of_something_else_are_refused_and_change_nothing(change):
    partition = Partition()
    state = partition.synic.state()
    damaged = {**state, "guest_os_id": 9, **change}
    if change.get("vps") == [{"sints": [0] * 15}]:
        damaged["vps"] = [{**state["vps"][0], "sints": [0] * 15}]
    with pytest.raises(ConfigError):
        partition.synic.load(damaged)
    assert partition.synic.state() == state


# ------------------------------------------------------------------------------------- queue


class Outcomes(list[tuple[int, Delivery]]):
    """What became of numbered messages."""

    def of(self, number: int):
        return lambda outcome: self.append((number, outcome))


def queued() -> tuple[Partition, Guest, MessageQueue, Outcomes]:
    partition, guest = running()
    queue = MessageQueue(partition.synic, limit=4)
    partition.synic.slot_free = queue.retry
    return partition, guest, queue, Outcomes()


def test_queued_messages_arrive_in_order_one_per_eom():
    """Checklist row 2."""
    _, guest, queue, outcomes = queued()
    for number in range(4):
        queue.put(0, 2, 1, bytes([number]), outcomes.of(number))
    assert len(queue) == 3
    received = []
    while message := guest.receive():
        received.append(message.payload)
    assert received == [bytes([number]) for number in range(4)]
    assert outcomes == [(number, Delivery.DELIVERED) for number in range(4)]
    assert len(queue) == 0


def test_polling_finds_slots_that_were_freed_without_eom():
    _, guest, queue, outcomes = queued()
    queue.put(0, 2, 1, b"a", outcomes.of(0))
    queue.put(0, 2, 1, b"b", outcomes.of(1))
    assert queue.poll()
    guest.free()
    assert not queue.poll()
    assert guest.slot().payload == b"b"


def test_slots_do_not_wait_for_each_other():
    partition, guest, queue, outcomes = queued()
    other = Guest(partition.synic, 1, base=0x8000).enable()
    queue.put(0, 2, 1, b"a", outcomes.of(0))
    queue.put(0, 2, 1, b"b", outcomes.of(1))
    queue.put(1, 2, 1, b"c", outcomes.of(2))
    assert other.slot().payload == b"c"
    queue.retry(1)
    assert [number for number, _ in outcomes] == [0, 2]
    assert guest.receive()
    assert [number for number, _ in outcomes] == [0, 2, 1]


def test_a_queue_is_bounded():
    _, _, queue, outcomes = queued()
    for number in range(5):
        queue.put(0, 2, 1, b"", outcomes.of(number))
    with pytest.raises(BudgetError):
        queue.put(0, 2, 1, b"", outcomes.of(9))
    assert outcomes == [(0, Delivery.DELIVERED)]


def test_messages_that_cannot_arrive_are_dropped_at_once():
    partition, _, queue, outcomes = queued()
    queue.put(5, 2, 1, b"", outcomes.of(0))
    queue.put(0, 16, 1, b"", outcomes.of(1))
    queue.put(1, 2, 1, b"", outcomes.of(2))
    assert outcomes == [(number, Delivery.DROPPED) for number in range(3)]
    with pytest.raises(LocalProtocolError):
        queue.put(0, 2, 0, b"", outcomes.of(3))
    assert len(queue) == 0
    assert partition.interrupts == []


def test_cancelled_messages_are_reported_as_dropped():
    _, guest, queue, outcomes = queued()
    for number in range(3):
        queue.put(0, 2, 1, bytes([number]), outcomes.of(number))
    queue.cancel()
    assert outcomes == [(0, Delivery.DELIVERED), (1, Delivery.DROPPED), (2, Delivery.DROPPED)]
    assert guest.receive()
    assert guest.receive() is None


def test_a_guest_may_take_messages_inside_the_interrupt_callback():
    partition = Partition()
    received: list[bytes] = []
    guest = Guest(partition.synic)

    def interrupt(_vp: int, _vector: int) -> None:
        while message := guest.receive():
            received.append(message.payload)

    partition.synic._interrupt = interrupt
    guest.enable()
    queue = MessageQueue(partition.synic)
    partition.synic.slot_free = queue.retry
    outcomes = Outcomes()
    for number in range(3):
        queue.put(0, 2, 1, bytes([number]), outcomes.of(number))
    assert received == [b"\0", b"\1", b"\2"]
    assert [number for number, _ in outcomes] == [0, 1, 2]


def test_an_eom_during_a_failed_attempt_makes_the_queue_look_again(monkeypatch):
    """The EOM comes from the VP's thread while another is between its look and its return."""
    partition, guest, queue, outcomes = queued()
    queue.put(0, 2, 1, b"a", outcomes.of(0))
    deliver = partition.synic.deliver_message

    def slow(*args):
        outcome = deliver(*args)
        if outcome is Delivery.BUSY:
            assert guest.receive()
        return outcome

    monkeypatch.setattr(partition.synic, "deliver_message", slow)
    queue.put(0, 2, 1, b"b", outcomes.of(1))
    assert guest.slot().payload == b"b"
    assert outcomes == [(0, Delivery.DELIVERED), (1, Delivery.DELIVERED)]


def test_a_message_cancelled_while_it_is_delivered_is_told_once(monkeypatch):
    partition, _, queue, outcomes = queued()
    deliver = partition.synic.deliver_message

    def cancelled(*args):
        queue.cancel()
        return deliver(*args)

    monkeypatch.setattr(partition.synic, "deliver_message", cancelled)
    queue.put(0, 2, 1, b"a", outcomes.of(0))
    assert outcomes == [(0, Delivery.DROPPED)]


def test_messages_cross_threads_in_order_and_complete():
    """Checklist row 2, with guest and host really at the same time."""
    partition = Partition()
    pending = threading.Semaphore(0)
    partition.synic._interrupt = lambda vp, vector: pending.release()
    guest = Guest(partition.synic).enable()
    queue = MessageQueue(partition.synic, limit=1000)
    partition.synic.slot_free = queue.retry
    received: list[int] = []

    def run_guest() -> None:
        while len(received) < 1000:
            pending.acquire()
            while message := guest.receive():
                received.append(int.from_bytes(message.payload, "little"))

    thread = threading.Thread(target=run_guest)
    thread.start()
    outcomes = Outcomes()
    for number in range(1000):
        queue.put(0, 2, 1, number.to_bytes(2, "little"), outcomes.of(number))
    thread.join()
    assert received == list(range(1000))
    assert outcomes == [(number, Delivery.DELIVERED) for number in range(1000)]
