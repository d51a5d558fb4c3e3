"""The network driver fed arbitrary bytes: it takes them, or its guest crashes in an orderly way."""

from __future__ import annotations

import contextlib
import struct
from typing import NamedTuple, NoReturn, cast

import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from netvsp.guest import HABITS, Counters
from netvsp.guest.events import Events
from netvsp.guest.messages import check_header, check_indication, check_items, check_packet
from netvsp.guest.receiving import Expecting, Receiver
from netvsp.guest.replies import (
    check_answer,
    check_offloads,
    check_query_reply,
    check_receive_section,
    check_scaling,
    check_send_section,
)
from netvsp.guest.shared import SharedBuffer
from netvsp.wire import ndis, nvsp, ppi, rndis
from vmbus.guest import GuestChannel, GuestPanic, Incoming
from vmbus.wire.packets import (
    COMPLETION,
    IN_BAND,
    TRANSFER_PAGES,
    build_transfer_pages,
    parse_descriptor_untrusted,
)

habits = st.sampled_from(list(HABITS.values()))
words = st.integers(0, 0xFFFF_FFFF)
small = st.integers(0, 200) | words
some_bytes = st.binary(max_size=200)
ITEMS = [ppi.CHECKSUM, ppi.VLAN, ppi.HASH_VALUE, ppi.LARGE_SEND]


def panic(reason: str) -> NoReturn:
    raise GuestPanic("any", reason)


def packed(*values: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    """Words, and bytes behind them."""
    return st.tuples(st.tuples(*values), some_bytes).map(
        lambda pair: struct.pack(f"<{len(values)}I", *pair[0]) + pair[1]
    )


answers = st.one_of(
    packed(st.sampled_from(sorted(nvsp.MESSAGE_NAMES)), *[small] * 6), st.binary(max_size=300)
)
items = st.lists(
    st.builds(ppi.build_item, st.sampled_from(ITEMS) | words, words)
    | packed(st.integers(0, 24), words, st.integers(0, 16)),
    max_size=4,
).map(b"".join)
kinds = st.sampled_from([1, 7, rndis.QUERY | rndis.COMPLETE, rndis.SET | rndis.COMPLETE]) | words
messages = st.one_of(
    some_bytes,
    packed(kinds, *[st.integers(0, 80) | words] * 10),
    st.builds(
        lambda size, found: rndis.build_packet_header(size, found) + bytes(size),
        st.integers(14, 300),
        items,
    ),
    st.builds(rndis.build_indication, words, some_bytes),
    st.builds(rndis.build_query_reply, words, words, some_bytes),
)


@given(st.data(), answers, habits)
def test_any_answer_to_an_nvsp_message(data, payload, driver):
    kind = data.draw(
        st.sampled_from(
            [
                nvsp.INIT_COMPLETE,
                nvsp.SEND_RECEIVE_BUFFER_COMPLETE,
                nvsp.SEND_SEND_BUFFER_COMPLETE,
                nvsp.SUBCHANNEL,
                nvsp.SEND_RNDIS_PACKET_COMPLETE,
            ]
        )
    )
    packet = Incoming(COMPLETION, 0, 1, 16, bytes(16) + payload)
    try:
        answer = check_answer(packet, kind, driver, panic)
        assert int.from_bytes(answer[:4], "little") == kind
        if kind == nvsp.SEND_RECEIVE_BUFFER_COMPLETE:
            section = check_receive_section(answer, 1 << 16, driver, panic)
            if section.status == nvsp.SUCCESS:
                assert 0 < section.sub_alloc_size * section.sub_alloc_count <= 1 << 16
        elif kind == nvsp.SEND_SEND_BUFFER_COMPLETE:
            status, size = check_send_section(answer, 1 << 16, driver, panic)
            assert status != nvsp.SUCCESS or 0 < size <= 1 << 16
    except GuestPanic:
        pass


@given(messages)
def test_any_rndis_message(whole):
    try:
        kind, length = check_header(whole, panic)
        message = whole[:length]
        if kind == rndis.PACKET:
            found = check_packet(message, panic)
            assert found.data in message
        elif kind == rndis.INDICATE_STATUS:
            assert check_indication(message, panic).buffer in message
    except GuestPanic:
        pass


@given(items)
def test_any_list_of_items(information):
    try:
        found = check_items(information, panic)
    except GuestPanic:
        return
    # What the driver takes, the format's own reader takes, too, and finds the same in it.
    assert ppi.parse_items_untrusted(information) == found


@given(messages, small, habits)
def test_any_answer_to_a_query(message, room, driver):
    try:
        reply = check_query_reply(message, 0x00010106, room, driver, panic)
    except GuestPanic:
        return
    assert reply.buffer in message
    assert len(reply.buffer) <= room


headers = st.tuples(
    st.sampled_from([0xA7, 0x88, 0x89]) | st.integers(0, 255), st.integers(0, 4), small, some_bytes
).map(lambda parts: struct.pack("<BBH", parts[0], parts[1], parts[2] & 0xFFFF) + parts[3])


@given(headers | some_bytes, st.integers(1, 3))
def test_any_capabilities(data, revision):
    for check in (
        lambda: check_offloads(data, revision, panic),
        lambda: check_scaling(data, panic),
    ):
        with contextlib.suppress(GuestPanic):
            check()
    asked = ndis.build_offload_capabilities(ndis.OffloadCapabilities(), revision)
    assert check_offloads(asked, revision, panic) == ndis.OffloadCapabilities()


@given(
    packed(st.sampled_from([4 + 100, 128, 134, 135]) | words, st.just(16) | small, small),
    st.sampled_from(nvsp.VERSIONS),
    habits,
    st.sampled_from([0, 0, 1]),
    st.integers(1, 8),
)
def test_any_notice(payload, version, driver, flags, queues):
    events = Events(driver, panic)
    events.agreed(version, driver.capabilities_of(version))
    packet = Incoming(IN_BAND, flags, 0, 16, bytes(16) + payload)
    try:
        table = events.notice(packet, channel=0, queues=queues, asking=False)
    except GuestPanic:
        return
    assert len(table) in (0, 16)
    assert all(number < queues for number in table)


class Memory:
    """A receive buffer."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= len(self.data)
        return self.data[offset : offset + length]


SIZE, COUNT = 512, 8
RIGHT = nvsp.build_rndis_packet(nvsp.CHANNEL_DATA)


class Transfer(NamedTuple):
    """A packet with frames, and what stands in the sections of the buffer from the first on."""

    ranges: list[tuple[int, int]]
    contents: list[bytes]
    identity: int
    flags: int = 1
    payload: bytes = RIGHT
    right_set: bool = True


def transfer(contents: list[bytes], identity: int) -> Transfer:
    """A packet as it should be."""
    places = [(len(each), index * SIZE) for index, each in enumerate(contents)]
    return Transfer(places, contents, identity)


information = st.sampled_from(
    [
        *[b""] * 12,
        ppi.build_item(ppi.CHECKSUM, ppi.RX_TCP_SUCCEEDED),
        ppi.build_item(ppi.HASH_VALUE, 99),
        *(ppi.build_packet_id(flags, 0) for flags in range(8)),
    ]
)
frames = st.builds(
    lambda size, found: rndis.build_packet_header(size, found) + bytes(size),
    st.integers(14, 300),
    information,
)
good = st.builds(transfer, st.lists(frames, min_size=1, max_size=4), st.integers(0, COUNT - 1))
wild = st.builds(
    Transfer,
    st.lists(
        st.tuples(st.integers(12, 400) | small, st.integers(0, 9).map(lambda n: n * SIZE) | small),
        max_size=4,
    ),
    st.lists(messages.map(lambda each: each[:SIZE]), min_size=4, max_size=4),
    st.integers(0, COUNT) | words,
    st.sampled_from([1, 1, 1, 0]),
    st.sampled_from([RIGHT] * 3 + [bytes(40), b""]),
    st.booleans(),
)
transfers = st.sampled_from([good] * 5 + [wild]).flatmap(lambda chosen: chosen)
expectations = st.sampled_from([Expecting.FRAMES] * 5 + list(Expecting))


@settings(max_examples=200)
@given(st.lists(transfers, max_size=6), habits, expectations, st.booleans())
def test_any_packets_in_the_receive_buffer(packets, driver, expecting, coalesces):
    """Each one that the driver takes is completed once."""

    async def receive() -> None:
        completed: list[int] = []

        class Channel:
            async def send(self, payload, *, transaction_id, kind):
                assert kind == COMPLETION
                completed.append(transaction_id)

        channels = {0: cast("GuestChannel", Channel())}
        counters = Counters()
        receiver = Receiver(driver, panic, counters, channels, lambda message, channel: None)
        receiver.section = nvsp.ReceiveSection(1, 1, 0, SIZE, COUNT, SIZE * COUNT)
        receiver.expecting = expecting
        receiver.coalesces = coalesces
        taken = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receiver.run)
            for each in packets:
                sections = [content.ljust(SIZE, b"\0") for content in each.contents]
                memory = Memory(b"".join(sections).ljust(SIZE * COUNT, b"\0"))
                receiver.buffer = cast("SharedBuffer", memory)
                data = build_transfer_pages(
                    each.payload,
                    each.ranges,
                    set_id=driver.receive_id if each.right_set else 7,
                    transaction_id=each.identity,
                    flags=each.flags,
                )
                _kind, offset, *_rest = parse_descriptor_untrusted(data)
                try:
                    receiver.packet(
                        0, Incoming(TRANSFER_PAGES, each.flags, each.identity, offset, data)
                    )
                except GuestPanic:
                    break  # the guest has crashed
                taken.append(each.identity)
                while receiver.frames:
                    frame = await receiver.receive()
                    assert 14 <= len(frame.data) <= 65553
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert completed == taken
        assert counters.completed == len(taken)

    trio.run(receive)
