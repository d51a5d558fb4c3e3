"""The Python guest's rings and channels against a scripted host."""

from __future__ import annotations

import dataclasses
import struct
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given, strategies as st

from tests.support.fake_host import Machine, Ring, cancelled, echo, holding, message, offer
from vmbus.errors import LocalProtocolError
from vmbus.guest import (
    FREEBSD,
    HAIKU,
    LINUX_5_10,
    LINUX_6_1,
    MACOS,
    NETBSD,
    OPENBSD,
    UEFI,
    GuestPanic,
    boot,
)
from vmbus.guest.channel import Ids
from vmbus.guest.personality import TransactionIds
from vmbus.guest.ring import InRing, OutRing, Span


@asynccontextmanager
async def opened(personality=LINUX_6_1, *, pages=2, machine=None, **options):
    """A guest with one open channel, and the host's end of it."""
    machine = machine or Machine()
    machine.host.offers = [offer(1)]
    async with boot(machine, personality) as guest:
        (found,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(found, ring_pages=pages, **options)
        yield guest, channel, machine.host.channels[1]


async def test_linux_advertises_pending_send_size_in_both_rings_and_masks_while_reading():
    async with opened() as (_, channel, theirs):
        assert theirs.incoming.words[16] == theirs.outgoing.words[16] == 1
        masks = []
        channel.on_packet = lambda packet: masks.append(theirs.outgoing.words[2])
        theirs.send(6, b"")
        await trio.testing.wait_all_tasks_blocked()
        assert masks == [1]
        assert theirs.outgoing.words[2] == 0


async def test_macos_never_masks_and_counts_its_signals():
    async with opened(MACOS) as (_, channel, theirs):
        assert theirs.incoming.words[16] == theirs.outgoing.words[16] == 0
        masks = []
        channel.on_packet = lambda packet: masks.append(theirs.outgoing.words[2])
        theirs.send(6, b"")
        await channel.request(b"")
        await channel.request(b"")
        assert masks == [0]
        assert theirs.incoming.control.cast("Q")[511] == channel.signals == 2


async def test_uefi_advertises_in_its_outgoing_ring_only():
    async with opened(UEFI) as (_, _channel, theirs):
        assert (theirs.incoming.words[16], theirs.outgoing.words[16]) == (1, 0)


async def test_the_host_is_signalled_only_if_the_ring_was_empty_and_not_masked():
    async with opened() as (_, channel, theirs):
        with holding(theirs):
            for _ in range(3):
                await channel.send(b"x" * 8)
            assert channel.signals == 1
            assert not channel.all_read
        assert channel.all_read
        theirs.incoming.words[2] = 1
        await channel.send(b"masked")
        assert channel.signals == 1


async def test_memory_form_signals_work_too():
    machine = Machine()
    async with opened(FREEBSD, machine=machine) as (_, channel, _theirs):
        await channel.request(b"ping")
    control, gpa, _ = machine.hypercalls[-1]
    assert control == 0x5D
    assert gpa % 8 == 0


async def test_a_failing_signal_crashes_the_guest():
    machine = Machine()
    with pytest.raises(GuestPanic, match="HvSignalEvent"):
        async with opened(machine=machine) as (_, channel, _theirs):
            machine.signal_status = 18
            await channel.request(b"ping")


async def test_freed_space_is_signalled_by_linux_and_not_by_openbsd():
    """Checklist row 29."""
    for personality, expected in ((LINUX_6_1, 1), (OPENBSD, 0)):
        machine = Machine()
        machine.host.offers = [offer(1, monitor_allocated=True)]
        async with boot(machine, dataclasses.replace(personality, uses_monitor=False)) as guest:
            (found,) = await guest.connection.connect()
            channel = await guest.connection.open_channel(found, ring_pages=2)
            theirs = machine.host.channels[1]
            theirs.mute = True
            while theirs.outgoing.room > 1000:
                theirs.send(6, bytes(400))
            theirs.outgoing.words[3] = 2000
            machine.set_flag(1)
            assert len(await channel.receive_batch()) > 5
            await trio.testing.wait_all_tasks_blocked()
            assert channel.signals == expected


async def test_packets_that_arrive_while_unmasking_are_read_as_well():
    async with opened() as (_, channel, theirs):
        late = [b"second..", b"third..."]

        def got(packet) -> None:
            if late:
                theirs.send(6, late.pop(0))

        channel.on_packet = got
        theirs.send(6, b"first...")
        await trio.testing.wait_all_tasks_blocked()
        assert not late
        assert channel.interrupts == 1
        assert not channel.has_packets


@pytest.mark.parametrize("contiguous", [True, False])
async def test_thousands_of_packets_wrap_around_both_rings(contiguous):
    """Checklist row 10."""
    async with opened(pages=3, contiguous=contiguous) as (_, channel, _theirs):
        for number in range(2000):
            payload = bytes([number & 0xFF]) * (number % 61 * 8)
            reply = await channel.request(payload)
            assert reply.payload == payload
            assert reply.transaction_id == 1


async def test_transaction_ids_follow_the_personality():
    for style, expected in (
        (TransactionIds.COUNTER, [1, 2, 3]),
        (TransactionIds.TAG, [1, 2, 1]),
        (TransactionIds.POINTER, [0xFFFFF80004200000, 0xFFFFF80004200180, 0xFFFFF80004200000]),
        (TransactionIds.HIGH_INDEX, [1 << 32, 2 << 32, 1 << 32]),
        (TransactionIds.INDEX, [0, 1, 0]),
    ):
        ids = Ids(style)
        first, second = ids.take(), ids.take()
        ids.release(first)
        assert [first, second, ids.take()] == expected


@pytest.mark.parametrize("identity", [0, 0xFFFFFFFFFFFFFFFD])
async def test_special_transaction_ids_are_used_as_they_are(identity):
    """Checklist row 12."""
    async with opened() as (_, channel, theirs):
        reply = await channel.request(b"", transaction_id=identity)
        assert reply.transaction_id == identity
        theirs.host.on_packet = lambda channel, packet: None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: channel.request(b"", transaction_id=identity))
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(LocalProtocolError, match="in flight"):
                await channel.request(b"", transaction_id=identity)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("tids", [[77], [1, 1]])
async def test_a_completion_of_nothing_crashes_the_guest(tids):
    """Checklist row 12."""
    with pytest.raises(GuestPanic, match="not in flight"):
        async with opened() as (_, channel, theirs):

            def answer(channel, packet) -> None:
                for tid in tids:
                    channel.send(11, b"", tid)

            theirs.host.on_packet = answer
            await channel.request(b"")
            await trio.sleep_forever()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({0: 4096}, "write index 4096"),
        ({0: 4}, "write index 4"),
        ({0: 16}, "too few"),
    ],
)
async def test_a_corrupt_index_crashes_the_guest(words, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with opened() as (guest, _, theirs):
            for index, value in words.items():
                theirs.outgoing.words[index] = value
            guest.machine.set_flag(1)
            await trio.sleep_forever()


@pytest.mark.parametrize(
    ("descriptor", "reason"),
    [
        ((6, 1, 4, 0, 0), "data_offset8 1"),
        ((6, 5, 4, 0, 0), "data_offset8 5"),
        ((6, 2, 1, 0, 0), "length8 1"),
        ((6, 2, 100, 0, 0), "length8 100"),
    ],
)
async def test_a_packet_that_does_not_add_up_crashes_the_guest(descriptor, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with opened(UEFI) as (guest, _, theirs):
            theirs.outgoing.put(0, struct.pack("<HHHHQ", *descriptor))
            theirs.outgoing.words[0] = 40
            guest.machine.set_flag(1)
            await trio.sleep_forever()


async def test_a_packet_larger_than_the_drivers_buffer_crashes_the_guest():
    """Checklist row 11."""
    with pytest.raises(GuestPanic, match=r"in-band packet of 96 bytes; .* room for 80"):
        async with opened(max_packet=80) as (_, _channel, theirs):
            theirs.send(6, bytes(80))
            await trio.sleep_forever()


@pytest.mark.parametrize(
    ("personality", "becomes"),
    [(LINUX_6_1, "takes the rest for the next packet"), (NETBSD, "in the ring for ever")],
    ids=str,
)
async def test_a_packet_of_more_than_a_page_is_too_much_for_some(personality, becomes):
    """Checklist row 11."""
    with pytest.raises(GuestPanic, match=f"4104 bytes; .* room for 4096: .*{becomes}"):
        async with opened(personality, pages=4) as (_, _channel, theirs):
            theirs.send(6, bytes(4088))
            await trio.sleep_forever()


@pytest.mark.parametrize("personality", [LINUX_5_10, FREEBSD, MACOS, UEFI], ids=str)
async def test_a_packet_of_more_than_a_page_is_read_by_others(personality):
    async with opened(personality, pages=4) as (_, channel, theirs):
        theirs.send(6, bytes(4088))
        (packet,) = await channel.receive_batch()
        assert len(packet.data) == 4104


@pytest.mark.parametrize("read_index", [4096, 12, 2048])
async def test_a_read_index_gone_astray_crashes_the_guest(read_index):
    with pytest.raises(GuestPanic, match=r"read index|read past"):
        async with opened() as (_, channel, theirs):
            theirs.serving = False
            await channel.send(bytes(16))
            theirs.incoming.words[1] = read_index
            await channel.send(bytes(16))


@pytest.mark.parametrize("personality", [LINUX_6_1, UEFI, MACOS], ids=str)
async def test_a_full_ring_delays_requests_but_loses_none(personality):
    async with opened(personality) as (guest, channel, theirs):
        done = []

        async def one(number: int) -> None:
            payload = b"%08d" % number * 25
            assert (await channel.request(payload)).payload == payload
            done.append(number)

        async with trio.open_nursery() as nursery:
            with holding(theirs):
                for number in range(100):
                    nursery.start_soon(one, number)
                while channel.outstanding < 100:
                    await trio.lowlevel.checkpoint()
                assert not done
                wanted = theirs.incoming.words[3]
                assert wanted == (16 + 200 + 8 if personality is UEFI else 0)
            if personality is not LINUX_6_1:
                nursery.start_soon(keep_signalling, guest.machine, done)
        assert sorted(done) == list(range(100))
        assert theirs.incoming.words[3] == 0
        if personality is MACOS:
            assert channel.signals > 50


async def fill(channel, theirs) -> None:
    """Leave room for no further packet of 200 bytes."""
    while theirs.incoming.room > 300:
        await channel.send(bytes(200))


async def keep_signalling(machine: Machine, done: list[int]) -> None:
    """Be the host that looks for room itself, and interrupts a guest that waits for it."""
    while len(done) < 100:
        machine.set_flag(1)
        await trio.sleep(0)
        machine.host.drain_all()


async def test_a_cancelled_request_gives_its_memory_back_when_the_host_is_done():
    async with opened() as (_, channel, theirs):
        released = []

        def release() -> None:
            released.append(True)

        theirs.host.on_packet = lambda channel, packet: None
        await cancelled(channel.request, b"", release=release)
        assert not released
        assert channel.outstanding == 1
        echo(theirs, theirs.received[-1])
        await trio.testing.wait_all_tasks_blocked()
        assert released == [True]
        assert channel.outstanding == 0
        # Without somebody who cares it is just taken.
        await cancelled(channel.request, b"")
        echo(theirs, theirs.received[-1])
        await trio.testing.wait_all_tasks_blocked()
        assert channel.outstanding == 0


async def test_a_request_cancelled_before_it_is_sent_is_taken_back_at_once():
    async with opened() as (_, channel, theirs):
        released = []
        with holding(theirs):
            await fill(channel, theirs)
            before = channel.outstanding
            for release in (None, lambda: released.append(True)):
                await cancelled(channel.request, bytes(300), release=release)
            assert channel.outstanding == before
            assert released == [True]


async def test_a_reply_that_arrives_with_the_cancellation_gives_the_memory_back():
    machine = Machine()
    async with opened(machine=machine) as (_, channel, _theirs):
        released = []
        ordinary = machine.hypercall

        async def slow(vp, control, rdx, r8):
            status = await ordinary(vp, control, rdx, r8)
            await trio.sleep_forever() if control & 0xFFFF == 0x5D else None
            return status

        setattr(machine, "hypercall", slow)  # noqa: B010  # mypy forbids the plain form
        for release in (lambda: released.append(True), None):
            await cancelled(channel.request, b"", release=release)
        setattr(machine, "hypercall", ordinary)  # noqa: B010
        assert released == [True]
        assert channel.outstanding == 0


async def test_closing_ends_requests_receivers_and_blocked_senders():
    async with opened() as (guest, channel, theirs):
        theirs.host.on_packet = lambda channel, packet: None
        ended = []

        async def ends(call, *arguments) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await call(*arguments)
            ended.append(call)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends, channel.request, b"")
            nursery.start_soon(ends, channel.receive_batch)
            await trio.testing.wait_all_tasks_blocked()
            theirs.serving = False
            await fill(channel, theirs)
            nursery.start_soon(ends, channel.send, bytes(1000))
            nursery.start_soon(guest.connection.close_channel, channel)
        assert len(ended) == 3
        await ends(channel.send, b"")
        assert not channel.has_packets
        assert channel.interrupted() is False


async def test_the_guest_completes_packets_of_the_host():
    async with opened() as (_, channel, theirs):
        theirs.send(6, b"question", 0xABCD, 1)
        (packet,) = await channel.receive_batch()
        await channel.complete(packet, b"answer..")
        kind, _, _, flags, tid = struct.unpack_from("<HHHHQ", theirs.received[-1])
        assert (kind, flags, tid) == (11, 0, 0xABCD)
        assert theirs.received[-1][16:] == b"answer.."
        assert repr(channel) == "<GuestChannel 1.0>"


async def test_a_channel_closed_by_one_of_its_own_packets_stops_reading():
    async with opened() as (_, channel, theirs):
        channel.on_packet = lambda packet: channel.end(trio.ClosedResourceError("closed"))
        theirs.send(6, b"last....")
        await trio.testing.wait_all_tasks_blocked()
        channel.end(trio.BrokenResourceError("too late to count"))
        with pytest.raises(trio.ClosedResourceError):
            await channel.receive_batch()


async def test_haiku_reads_no_less_than_the_host_writes():
    async with opened(HAIKU) as (_, channel, _theirs):
        assert (await channel.request(b"h" * 504)).payload == b"h" * 504


def panics(reason: str):
    raise AssertionError(reason)


@pytest.mark.slow
@given(
    data=st.data(),
    chunks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
)
def test_what_one_side_writes_the_other_reads_whatever_the_pages(data, chunks):
    control = memoryview(bytearray(4096))
    pages = [memoryview(bytearray(4096 * count)) for count in chunks]
    span = Span(pages)
    single = [page[n : n + 4096] for page in pages for n in range(0, len(page), 4096)]
    theirs = Ring([control, *single])
    out = OutRing(control, span, LINUX_6_1, panics)
    for _ in range(20):
        sizes = data.draw(st.lists(st.integers(2, 200), min_size=1, max_size=5))
        written = []
        for size in sizes:
            packet = struct.pack("<HHHHQ", 6, 2, size, 0, size) + bytes([size]) * (size * 8 - 16)
            if out.append(packet):
                written.append(packet)
        assert theirs.read_packet() is None
        assert out.commit() == bool(written)
        assert not out.commit()
        read = []
        while (packet := theirs.read_packet()) is not None:
            read.append(packet)
        assert read == written
    # And the other way round, in the same memory.
    control[:128] = bytes(128)
    incoming = InRing(control, span, LINUX_6_1, panics, max_packet=4096)
    for size in data.draw(st.lists(st.integers(2, 200), max_size=30)):
        packet = struct.pack("<HHHHQ", 6, 2, size, 0, size) + bytes([size]) * (size * 8 - 16)
        theirs.write_packet(packet)
        ((got,), signal) = incoming.read_batch()
        assert got.data == packet
        assert not signal
        assert incoming.empty
    assert incoming.read_batch() == ([], False)


async def test_an_unrelated_open_result_is_not_taken_for_a_channel():
    machine = Machine()
    machine.host.handlers["OPENCHANNEL"] = lambda item: machine.host.send(message(6, 9, 9, 0))
    with pytest.raises(GuestPanic, match="was due"):
        async with opened(FREEBSD, machine=machine):
            pass
