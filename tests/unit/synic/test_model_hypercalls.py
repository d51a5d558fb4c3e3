"""HvPostMessage and HvSignalEvent, as a guest calls them."""

from __future__ import annotations

import pytest

from tests.support.synic import INPUT, PAGES, Guest, Partition
from vmbus.wire import synic as wire
from vmbus.wire.synic import HvStatus

POST = 0x5C
SIGNAL = 0x5D
FAST = 1 << 16
END = PAGES * 4096


class Ports:
    """Ports that write down what they get."""

    def __init__(self, status: HvStatus = HvStatus.SUCCESS) -> None:
        self.status = status
        self.posts: list[tuple[int, int, int, bytes]] = []
        self.signals: list[tuple[int, int]] = []

    def post_message(self, connection_id: int, message_type: int, vp: int, payload: bytes):
        self.posts.append((connection_id, message_type, vp, payload))
        return self.status

    def signal_event(self, connection_id: int, flag: int):
        self.signals.append((connection_id, flag))
        return self.status


def attached(status: HvStatus = HvStatus.SUCCESS) -> tuple[Partition, Ports]:
    partition = Partition(2)
    partition.synic.ports = ports = Ports(status)
    return partition, ports


def test_messages_of_every_length_arrive_with_the_vp_that_posted():
    partition, ports = attached()
    guest = Guest(partition.synic, 1)
    for length in (0, 1, 239, 240):
        assert guest.post(4, bytes(range(length)), message_type=7) == 0
        assert ports.posts.pop() == (4, 7, 1, bytes(range(length)))


@pytest.mark.parametrize("fast", [True, False])
def test_events_are_signalled_in_both_forms(fast):
    """Checklist row 30: Linux uses registers, FreeBSD memory."""
    partition, ports = attached()
    assert Guest(partition.synic).signal(0x2003, 5, fast=fast) == 0
    assert ports.signals == [(0x2003, 5)]


@pytest.mark.parametrize("connection_id", [1, 4])
def test_control_messages_can_be_posted_to_both_connections(connection_id):
    """Checklist row 30."""
    partition, ports = attached()
    assert Guest(partition.synic).post(connection_id, b"contact") == 0
    assert ports.posts == [(connection_id, 1, 0, b"contact")]


@pytest.mark.parametrize(
    "status",
    [
        HvStatus.INSUFFICIENT_MEMORY,
        HvStatus.INVALID_PORT_ID,
        HvStatus.INVALID_CONNECTION_ID,
        HvStatus.INSUFFICIENT_BUFFERS,
        HvStatus.INVALID_SYNIC_STATE,
    ],
)
def test_the_status_of_the_port_is_that_of_the_call(status):
    partition, _ = attached(status)
    guest = Guest(partition.synic)
    assert guest.post(1, b"x") == status
    assert guest.signal(1) == status


def test_a_partition_without_a_host_has_no_connections():
    guest = Guest(Partition().synic)
    assert guest.post(1, b"x") == 0x12
    assert guest.signal(16) == 0x12


@pytest.mark.parametrize("code", [0, 1, 0x5B, 0x5E, 0x8001, 0xFFFF])
def test_unknown_calls_are_answered_with_invalid_hypercall_code(code):
    partition, _ = attached()
    assert partition.synic.hypercall(0, code, INPUT) == 2
    assert partition.synic.hypercall(0, code | FAST, INPUT) == 2


@pytest.mark.parametrize("code", [POST, SIGNAL, SIGNAL | FAST])
@pytest.mark.parametrize("bit", [17, 26, 27, 31, 32, 43, 44, 47, 48, 59, 60, 63])
def test_simple_calls_have_no_other_bits_in_their_control_word(code, bit):
    """Neither repetitions, nor a variable header, nor reserved bits."""
    partition, ports = attached()
    partition.memory.write(INPUT, wire.build_post_message(1, 1, b"x"))
    assert partition.synic.hypercall(0, code | 1 << bit, INPUT) == 3
    assert ports.posts == []
    assert ports.signals == []


def test_messages_cannot_be_posted_in_registers():
    partition, ports = attached()
    assert partition.synic.hypercall(0, POST | FAST, INPUT) == 3
    assert ports.posts == []


@pytest.mark.parametrize(
    ("code", "gpa"),
    [
        (POST, INPUT + 4),
        (POST, INPUT + 1),
        (POST, 4096 - 248),
        (POST, END - 128),
        (POST, END),
        (POST, 0xFFFF_FFFF_FFFF_FF00),
        (SIGNAL, INPUT + 4),
        (SIGNAL, END),
        (SIGNAL, 0xFFFF_FFFF_FFFF_FFF8),
    ],
)
def test_inputs_are_aligned_inside_one_page_and_memory(code, gpa):
    partition, ports = attached()
    assert partition.synic.hypercall(0, code, gpa) == 4
    assert ports.posts == []
    assert ports.signals == []


def test_inputs_may_end_with_their_page():
    partition, ports = attached()
    partition.memory.write(END - 256, wire.build_post_message(1, 1, b"x"))
    assert partition.synic.hypercall(0, POST, END - 256) == 0
    partition.memory.write(END - 8, wire.build_signal_event(9))
    assert partition.synic.hypercall(0, SIGNAL, END - 8) == 0
    assert (len(ports.posts), ports.signals) == (1, [(9, 0)])


@pytest.mark.parametrize(("offset", "value"), [(12, 241), (12, 0xFFFF_FFFF), (8, 0), (8, 1 << 31)])
def test_messages_with_impossible_headers_are_invalid_parameters(offset, value):
    partition, ports = attached()
    data = bytearray(wire.build_post_message(1, 1, b"x"))
    data[offset : offset + 4] = value.to_bytes(4, "little")
    partition.memory.write(INPUT, bytes(data))
    assert partition.synic.hypercall(0, POST, INPUT) == 5
    assert ports.posts == []
