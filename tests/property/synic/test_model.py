"""Nothing a guest can write into registers or memory gets out of the SynIC model."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.synic import PAGES, Guest, Partition
from vmbus.errors import GuestProtocolError
from vmbus.synic import Delivery, Features, MessageQueue
from vmbus.synic.model import MsrError
from vmbus.wire import synic as wire
from vmbus.wire.synic import HvStatus, Msr

u64 = st.integers(0, (1 << 64) - 1)
END = PAGES * 4096
gpas = st.one_of(u64, st.integers(0, END + 4096), st.integers(0, END // 8).map(lambda n: n * 8))
controls = st.one_of(
    u64,
    st.sampled_from([0x5C, 0x5D, 0x1005D, 0x1005C]),
    st.builds(lambda code, bit: code | 1 << bit, st.sampled_from([0x5C, 0x5D]), st.integers(0, 63)),
)
msrs = st.one_of(
    st.sampled_from(list(Msr)).map(int),
    st.integers(Msr.SINT0, Msr.SINT15),
    st.integers(0x4000_0000, 0x4000_0120),
    st.integers(0, 0xFFFF_FFFF),
)
values = st.one_of(u64, gpas.map(lambda gpa: gpa | 1), st.integers(0, 0x7FFFF))
EVERYTHING = Features(
    reference_time=True, tsc_frequency=1, apic_frequency=1, invariant_tsc=True, timers=True
)


class Ports:
    """Ports that check what every port relies on."""

    def post_message(self, connection_id: int, message_type: int, vp: int, payload: bytes):
        assert 0 <= connection_id < 1 << 32
        assert 0 < message_type < 1 << 31
        assert vp == 0
        assert type(payload) is bytes
        assert len(payload) <= 240
        return HvStatus.SUCCESS

    def signal_event(self, connection_id: int, flag: int):
        assert 0 <= connection_id < 1 << 32
        assert 0 <= flag < 1 << 16
        return HvStatus.SUCCESS


PARTITION = Partition(1, features=EVERYTHING, clock=lambda: 0)
PARTITION.synic.ports = Ports()


@given(controls, gpas, u64, st.binary(max_size=300))
def test_a_hypercall_always_has_a_status(control, rdx, r8, content):
    if rdx + len(content) <= END:
        PARTITION.memory.write(rdx, content)
    status = PARTITION.synic.hypercall(0, control, rdx, r8)
    assert status in {0, 2, 3, 4, 5}
    assert status in HvStatus.__members__.values()


@given(st.lists(st.tuples(msrs, values), max_size=20))
def test_an_msr_access_succeeds_or_faults(accesses):
    synic = PARTITION.synic
    synic.reset()
    for index, value in accesses:
        try:
            synic.write_msr(0, index, value)
        except MsrError:
            pass
        else:
            synic.read_msr(0, index)
        with contextlib.suppress(MsrError):
            assert 0 <= synic.read_msr(0, index) < 1 << 64
    assert isinstance(synic.deliver_message(0, 2, 1, b"x"), Delivery)
    assert isinstance(synic.set_flag(0, 2, 5), HvStatus)
    synic.load(synic.state())


@given(st.lists(st.tuples(msrs, values), max_size=10))
def test_a_write_that_faults_changes_nothing(accesses):
    synic = PARTITION.synic
    for index, value in accesses:
        before = synic.state()
        try:
            synic.write_msr(0, index, value)
        except MsrError:
            assert synic.state() == before


@given(st.binary(max_size=4096), st.integers(0, 15), st.binary(max_size=240))
def test_a_message_page_of_garbage_delays_but_never_breaks(garbage, sint, payload):
    partition = PARTITION
    partition.synic.reset()
    guest = Guest(partition.synic).enable()
    partition.memory.write(guest.simp, garbage.ljust(4096, b"\0"))
    outcome = partition.synic.deliver_message(0, sint, 1, payload)
    taken = any(garbage[sint * 256 : sint * 256 + 4])
    assert outcome is (Delivery.BUSY if taken else Delivery.DELIVERED)
    if not taken:
        assert guest.slot(sint) == (1, False, 0, payload)


@pytest.mark.parametrize(
    "parse",
    [
        wire.parse_post_message_untrusted,
        wire.parse_signal_event_untrusted,
        wire.parse_message_slot_untrusted,
    ],
)
@given(data=st.one_of(st.binary(max_size=300), st.binary(min_size=256, max_size=256)))
def test_a_parser_lets_only_the_protocol_error_out(parse, data):
    try:
        found = parse(data)
    except GuestProtocolError:
        return
    assert len(getattr(found, "payload", b"")) <= 240


@given(st.integers(0, (1 << 80) - 1))
def test_the_control_word_parser_lets_only_the_protocol_error_out(value):
    try:
        found = wire.parse_hypercall_input_untrusted(value)
    except GuestProtocolError:
        return
    assert found.code == value & 0xFFFF


class OneSlot(RuleBasedStateMachine):
    """Checklist row 2: whatever guest and host do in turn, messages arrive in order, all of them.

    The guest may take a slot, or see the pending flag and write EOM much later, or never write it
    at all if it did not see the flag.
    """

    def __init__(self) -> None:
        super().__init__()
        self.partition = Partition()
        self.guest = Guest(self.partition.synic).enable()
        self.queue = MessageQueue(self.partition.synic, limit=1000)
        self.partition.synic.slot_free = self.queue.retry
        self.sent = 0
        self.received: list[int] = []
        self.owes_eom = False

    @rule()
    def host_sends(self) -> None:
        payload = self.sent.to_bytes(4, "little")
        self.queue.put(0, 2, 1, payload, lambda outcome: None)
        self.sent += 1

    @rule()
    def guest_takes_a_message(self) -> None:
        message = self.guest.slot()
        if message.message_type:
            self.received.append(int.from_bytes(message.payload, "little"))
            self.owes_eom |= self.guest.free()

    @rule()
    def guest_writes_eom_if_it_has_to(self) -> None:
        if self.owes_eom:
            self.owes_eom = False
            self.partition.synic.write_msr(0, Msr.EOM, 0)

    @rule(masked=st.booleans())
    def guest_masks_or_unmasks(self, masked: bool) -> None:
        self.partition.synic.write_msr(0, Msr.SINT2, 0xF3 | masked << 16)

    @invariant()
    def messages_are_in_order_and_none_is_stuck(self) -> None:
        assert self.received == list(range(len(self.received)))
        if not self.guest.slot().message_type and not self.owes_eom:
            assert len(self.queue) == 0

    def teardown(self) -> None:
        self.guest_writes_eom_if_it_has_to()
        while self.guest.slot().message_type:
            self.guest_takes_a_message()
            self.guest_writes_eom_if_it_has_to()
        assert self.received == list(range(self.sent))
        self.partition.memory.close()


OneSlot.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestOneSlot = OneSlot.TestCase
