"""The layouts of vmbus.wire.synic, declared a second time in construct."""

from __future__ import annotations

import construct as c
from hypothesis import given, strategies as st

from vmbus.errors import GuestProtocolError
from vmbus.wire import synic as wire

MESSAGE = c.Struct(
    "message_type" / c.Int32ul,
    "size" / c.Int8ul,
    "flags" / c.BitStruct(c.Padding(7), "pending" / c.Flag),
    c.Padding(2),
    "sender" / c.Int64ul,
    "payload" / c.Bytes(c.this.size),
    c.Padding(240 - c.this.size),
)
POST_MESSAGE = c.Struct(
    "connection_id" / c.Int32ul,
    c.Padding(4),
    "message_type" / c.Int32ul,
    "size" / c.Int32ul,
    "payload" / c.Bytes(c.this.size),
    c.Padding(240 - c.this.size),
)
SIGNAL_EVENT = c.Struct("connection_id" / c.Int32ul, "flag" / c.Int16ul, c.Padding(2))
HYPERCALL_INPUT = c.BitStruct(
    "reserved_60" / c.BitsInteger(4),
    "rep_start" / c.BitsInteger(12),
    "reserved_44" / c.BitsInteger(4),
    "rep_count" / c.BitsInteger(12),
    "nested" / c.Flag,
    "reserved_27" / c.BitsInteger(4),
    "variable_header" / c.BitsInteger(10),
    "fast" / c.Flag,
    "code" / c.BitsInteger(16),
)
SINT = c.BitStruct(
    c.Padding(13),
    "polling" / c.Flag,
    "auto_eoi" / c.Flag,
    "masked" / c.Flag,
    c.Padding(8),
    "vector" / c.BitsInteger(8),
)

u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, (1 << 64) - 1)
payloads = st.binary(max_size=240)


@given(u32, payloads, st.booleans(), u64)
def test_both_declarations_of_a_message_agree(message_type, payload, pending, sender):
    data = wire.build_message(message_type, payload, pending=pending, sender=sender)
    fields = {
        "message_type": message_type,
        "size": len(payload),
        "flags": {"pending": pending},
        "sender": sender,
        "payload": payload,
    }
    assert data == MESSAGE.build(fields)
    assert len(data) == wire.MESSAGE_SIZE
    found = wire.parse_message_slot_untrusted(data)
    assert found == (message_type, pending, sender, payload)


@given(st.binary(min_size=256, max_size=256))
def test_both_parsers_of_a_message_agree_on_any_slot(data):
    if data[4] > 240:
        return
    twin = MESSAGE.parse(data)
    found = wire.parse_message_slot_untrusted(data)
    assert found == (twin.message_type, twin.flags.pending, twin.sender, twin.payload)


@given(u32, st.integers(1, 0x7FFF_FFFF), payloads)
def test_both_declarations_of_a_posted_message_agree(connection_id, message_type, payload):
    data = wire.build_post_message(connection_id, message_type, payload)
    fields = {
        "connection_id": connection_id,
        "message_type": message_type,
        "size": len(payload),
        "payload": payload,
    }
    assert data == POST_MESSAGE.build(fields)
    assert wire.parse_post_message_untrusted(data) == (connection_id, message_type, payload)


@given(u32, u16)
def test_both_declarations_of_a_signalled_event_agree(connection_id, flag):
    data = wire.build_signal_event(connection_id, flag)
    assert data == SIGNAL_EVENT.build({"connection_id": connection_id, "flag": flag})
    assert wire.parse_signal_event_untrusted(data) == (connection_id, flag)


@given(u64)
def test_both_declarations_of_a_hypercall_input_agree(value):
    twin = HYPERCALL_INPUT.parse(value.to_bytes(8, "big"))
    if twin.reserved_60 or twin.reserved_44 or twin.nested or twin.reserved_27:
        try:
            wire.parse_hypercall_input_untrusted(value)
        except GuestProtocolError:
            return
        raise AssertionError("reserved bits were accepted")
    found = wire.parse_hypercall_input_untrusted(value)
    assert found == (twin.code, twin.fast, twin.variable_header, twin.rep_count, twin.rep_start)


@given(u32)
def test_both_declarations_of_a_sint_register_agree(value):
    twin = SINT.parse(value.to_bytes(4, "big"))
    assert value & wire.SINT_VECTOR == twin.vector
    assert bool(value & wire.SINT_MASKED) == twin.masked
    assert bool(value & wire.SINT_AUTO_EOI) == twin.auto_eoi
    assert bool(value & wire.SINT_POLLING) == twin.polling


def test_the_sim_page_is_an_array_of_sixteen_messages():
    page = c.Array(16, c.Bytes(256)).parse(bytes(range(256)) * 16)
    data = bytes(range(256)) * 16
    assert [data[wire.message_slot(sint)] for sint in range(16)] == list(page)


@given(st.integers(0, 15), st.integers(0, 2047))
def test_an_event_flag_is_a_bit_of_a_little_endian_number_of_2048_bits(sint, flag):
    page = bytearray(4096)
    byte, mask = wire.event_flag_position(sint, flag)
    page[byte] |= mask
    words = c.Array(16, c.BytesInteger(256, swapped=True)).parse(bytes(page))
    assert list(words) == [1 << flag if index == sint else 0 for index in range(16)]
