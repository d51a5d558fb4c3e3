"""Length and range checks of vmbus.wire.synic; layouts are proven in tests/reference."""

from __future__ import annotations

import pytest

from vmbus.errors import GuestProtocolError
from vmbus.wire import synic as wire
from vmbus.wire.synic import Msr


@pytest.mark.parametrize("length", [0, 255, 257])
def test_a_posted_message_has_256_bytes_of_input(length):
    with pytest.raises(GuestProtocolError) as caught:
        wire.parse_post_message_untrusted(bytes(length))
    assert caught.value.field == "input"


def test_a_posted_message_has_at_most_240_bytes_of_payload():
    data = bytearray(wire.build_post_message(1, 1, bytes(240)))
    data[12] = 241
    with pytest.raises(GuestProtocolError) as caught:
        wire.parse_post_message_untrusted(bytes(data))
    assert caught.value.field == "payload_size"


@pytest.mark.parametrize("message_type", [0, 0x8000_0000, 0x8000_0010, 0xFFFF_FFFF])
def test_a_guest_cannot_post_messages_of_the_hypervisor(message_type):
    with pytest.raises(GuestProtocolError) as caught:
        wire.parse_post_message_untrusted(wire.build_post_message(1, message_type, b""))
    assert caught.value.field == "message_type"


def test_reserved_bytes_of_inputs_may_hold_anything():
    data = bytearray(wire.build_post_message(4, 1, b"abc"))
    data[4:8] = b"\xff" * 4
    assert wire.parse_post_message_untrusted(bytes(data)) == (4, 1, b"abc")
    data = bytearray(wire.build_signal_event(0x2003, 5))
    data[6:8] = b"\xff" * 2
    assert wire.parse_signal_event_untrusted(bytes(data)) == (0x2003, 5)


@pytest.mark.parametrize("length", [0, 7, 9])
def test_a_signalled_event_has_eight_bytes_of_input(length):
    with pytest.raises(GuestProtocolError):
        wire.parse_signal_event_untrusted(bytes(length))


@pytest.mark.parametrize("length", [0, 255, 257])
def test_a_slot_has_256_bytes(length):
    with pytest.raises(GuestProtocolError):
        wire.parse_message_slot_untrusted(bytes(length))


def test_a_slot_holds_at_most_240_bytes():
    data = bytearray(wire.build_message(1, bytes(240)))
    data[4] = 241
    with pytest.raises(GuestProtocolError):
        wire.parse_message_slot_untrusted(bytes(data))


@pytest.mark.parametrize("build", [lambda p: wire.build_message(1, p),
                                   lambda p: wire.build_post_message(1, 1, p)])  # fmt: skip
def test_longer_payloads_cannot_be_built(build):
    build(bytes(240))
    with pytest.raises(ValueError, match="241"):
        build(bytes(241))


@pytest.mark.parametrize("bit", [*range(27, 32), *range(44, 48), *range(60, 65)])
def test_reserved_bits_of_a_hypercall_must_be_zero(bit):
    with pytest.raises(GuestProtocolError):
        wire.parse_hypercall_input_untrusted(0x5C | 1 << bit)


def test_a_hypercall_input_is_built_from_code_and_form():
    assert wire.build_hypercall_input(0x5D) == 0x5D
    assert wire.build_hypercall_input(0x5D, fast=True) == 0x1005D


def test_msr_numbers_are_those_guests_use():
    # As in guests' own sources: drivers/hv/hv.c, sys/dev/hyperv/vmbus/hyperv_reg.h.
    named = {int(msr): msr.name for msr in Msr}
    assert named[0x4000_0083] == "SIMP"
    assert named[0x4000_0092] == "SINT2"
    assert named[0x4000_0090 + 15] == "SINT15"
    assert named[0x4000_00B0 + 7] == "STIMER3_COUNT"
    assert named[0x4000_0100 + 4] == "CRASH_P4"


def test_the_vendor_and_interface_read_as_text():
    assert wire.VENDOR_MICROSOFT.decode() == "Microsoft Hv"
    assert wire.INTERFACE_HV1 == 0x31237648
