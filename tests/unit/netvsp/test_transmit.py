"""From the guest to the network: sections, pages, batches, and what goes wrong with them."""

from __future__ import annotations

import random
import struct

import pytest

from netvsp.control import MAX_PACKETS
from netvsp.endpoint import Offloads
from netvsp.link import AdapterConfig
from netvsp.messages import _MEMO, COPIED, MAX_MESSAGE
from netvsp.session import SECTION_SIZE
from netvsp.wire import nvsp, ppi, rndis
from tests.support.net_frames import SHAPES, Shape, packet, pieces_of, uncut, without_sum
from tests.support.net_guest import MAC, PEER, Network, message_of, plain_frame, running
from vmbus.memory import PAGE_SIZE
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import GPA_DIRECT, RANGES_HEADER, build_packet

GOOD, BAD = nvsp.SUCCESS, nvsp.INVALID_RNDIS_PACKET
ALL = Offloads(checksum=True, tcp_segments=True, udp_segments=True, vlan=True)


def frame(size: int, seed: int = 0) -> bytes:
    return plain_frame(14) + random.Random(seed).randbytes(size - 14)


def information(items: dict[int, int]) -> bytes:
    return b"".join(ppi.build_item(kind, value) for kind, value in items.items())


def aligned(message: bytes) -> bytes:
    """A message that is followed by another one: linux pads it, and counts that."""
    size = len(message) + 7 & ~7
    return struct.pack("<II", 1, size) + message[8:].ljust(size - 8, b"\0")


def cut(data: bytes, *lengths: int) -> list[bytes]:
    pieces = []
    for length in lengths:
        pieces.append(data[:length])
        data = data[length:]
    return [*pieces, data]


# -- where messages are ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [14, 60, 1514])
async def test_a_message_is_in_a_section(size):
    network = Network()
    async with running(network) as (guest, adapter):
        for index in (0, 1, 9):
            message = message_of(frame(size, index))
            await guest.exchange(guest.section(index, message, number=index))
            assert guest.take_completions() == [(index, GOOD)]
        assert network.bytes() == [frame(size, index) for index in (0, 1, 9)]
        assert adapter.statistics.transmit.total_bytes == 3 * size


async def test_several_messages_are_in_a_section():
    """linux: netvsc_copy_to_send_buf aligns all but the last."""
    network = Network()
    async with running(network) as (guest, _adapter):
        frames = [frame(60 + number, number) for number in range(MAX_PACKETS)]
        messages = [aligned(message_of(each)) for each in frames[:-1]]
        data = b"".join(messages) + message_of(frames[-1])
        await guest.exchange(guest.section(3, data, number=7))
        assert guest.take_completions() == [(7, GOOD)]
        assert network.bytes() == frames
        assert network.calls == [MAX_PACKETS], "in one call"


async def test_more_messages_than_were_agreed_on_are_refused():
    network = Network()
    async with running(network) as (guest, _adapter):
        data = aligned(message_of(plain_frame(16))) * (MAX_PACKETS + 1)
        await guest.exchange(guest.section(0, data, number=7))
        # In pieces, of which the last message is in pages, and in one that is not copied.
        last = aligned(message_of(plain_frame(16)))
        far = [(0, last[:10]), (0, last[10:] + bytes(COPIED))]
        await guest.exchange(
            guest.pages(far, section=(0, data[: -len(last)]), number=8),
            guest.pages([(0, data), (0, bytes(COPIED))], number=9),
        )
        assert guest.take_completions() == [(7, BAD), (8, BAD), (9, BAD)]
        assert network.frames == []


@pytest.mark.parametrize("size", [60, 1514, COPIED - 44, COPIED - 43, 9000])
@pytest.mark.parametrize("offset", [0, 1, 4000, 4095])
async def test_a_message_is_in_pages(size, offset):
    network = Network()
    async with running(network, mtu=9000) as (guest, _adapter):
        await guest.exchange(guest.pages([(offset, message_of(frame(size)))], number=1))
        header, data = cut(message_of(frame(size)), 44)
        await guest.exchange(guest.pages([(offset, header), (offset, data)], number=2))
        assert guest.take_completions() == [(1, GOOD), (2, GOOD)]
        assert network.bytes() == [frame(size)] * 2


@pytest.mark.parametrize("size", [300, 1514, 9000])
async def test_headers_may_be_in_several_pages(size):
    """Each byte of a header may be the last of its page."""
    network = Network()
    async with running(network, mtu=9000) as (guest, _adapter):
        message = message_of(frame(size), ppi.build_item(ppi.HASH_VALUE, 0x1234))
        places = list(range(1, 100, 3))
        for place in places:
            first, second, third = cut(message, place, 5)
            pieces = [(PAGE_SIZE - place, first), (100, second), (0, third)]
            await guest.exchange(guest.pages(pieces))
        assert network.bytes() == [frame(size)] * len(places)
        assert {each.flow for each in network.frames} == {0x1234}


async def test_a_message_is_in_32_ranges_some_of_them_empty():
    """linux: MAX_PAGE_BUFFER_COUNT; a fragment of a socket buffer may have no bytes."""
    network = Network()
    async with running(network, mtu=9000) as (guest, _adapter):
        for size in (1514, 9000):
            header, data = cut(message_of(frame(size)), 44)
            pieces = [(123, header)]
            for number in range(31):
                some = b"" if number % 5 == 0 else data[: size // 24 + 1]
                data = data[len(some) :]
                pieces.append((number * 60 if some else 0, some))
            assert len(pieces) == 32
            assert not data
            await guest.exchange(guest.pages(pieces, number=size))
        assert guest.take_completions() == [(1514, GOOD), (9000, GOOD)]
        assert network.bytes() == [frame(1514), frame(9000)]


async def test_an_empty_range_may_have_a_page_of_its_own():
    """Its offset says so."""
    network = Network()
    async with running(network) as (guest, _adapter):
        message = message_of(frame(200))
        guest.write(guest.data_pfns, 0, message)
        pfn = guest.data_pfns[0]
        ranges = build_range(0, 7, [pfn]) + build_range(len(message), 0, [pfn])
        packet_ = build_packet(
            GPA_DIRECT,
            nvsp.build_rndis_packet(nvsp.CHANNEL_DATA),
            transaction_id=1,
            flags=1,
            header=RANGES_HEADER.pack(0, 2) + ranges,
        )
        await guest.exchange(packet_)
        assert guest.take_completions() == [(1, GOOD)]
        assert network.bytes() == [frame(200)]


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("size", [60, 1514, 5000])
async def test_a_header_is_in_a_section_and_its_frame_in_pages(before, size):
    """linux: cp_partial, behind messages that are there as a whole."""
    network = Network()
    async with running(network, mtu=9000) as (guest, _adapter):
        frames = [frame(100 + number, number) for number in range(before)]
        header, data = cut(message_of(frame(size, 99)), 44)
        whole = b"".join(aligned(message_of(each)) for each in frames) + header
        middle = size // 2
        pieces = [(1000, data[:middle]), (0, data[middle:])]
        await guest.exchange(guest.pages(pieces, section=(2, whole), number=5))
        assert guest.take_completions() == [(5, GOOD)]
        assert network.bytes() == [*frames, frame(size, 99)]


# -- wrong ones ------------------------------------------------------------------------------------


def header(length: int, data: int = 36, size: int = 60, info: int = 0, info_size: int = 0) -> bytes:
    return struct.pack("<11I", 1, length, data, size, 0, 0, 0, info, info_size, 0, 0)


MESSAGE = message_of(plain_frame(60))
WRONG = {
    "empty": b"",
    "short": MESSAGE[:43],
    "cut-off": MESSAGE[:-1],
    "no-length": header(0) + bytes(60),
    "length-of-a-header-less-one": header(43, size=0) + bytes(60),
    "length-beyond-the-end": header(105) + bytes(60),
    "huge-length": header(0xFFFFFFFF) + bytes(60),
    "data-in-the-header": header(104, data=35) + bytes(60),
    "data-beyond-the-end": header(104, size=61) + bytes(60),
    "huge-data": header(104, size=0xFFFFFFFF) + bytes(60),
    "huge-offset": header(104, data=0xFFFFFFFF) + bytes(60),
    "information-beyond-the-end": header(104, info=90, info_size=16) + bytes(60),
    "bad-information": message_of(plain_frame(60), bytes(16)),
    "another-type": rndis.build_id_message(rndis.KEEPALIVE, 1).ljust(104, b"\0"),
    "junk-behind-it": MESSAGE + bytes(8),
    "a-bad-second-one": MESSAGE + header(104, size=61) + bytes(60),
}


@pytest.mark.parametrize("message", WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_message_is_refused_wherever_it_is(message):
    network = Network()
    async with running(network) as (guest, adapter):
        packets = [guest.section(0, message, number=1), guest.pages([(9, message)], number=2)]
        half = len(message) // 2
        packets.append(guest.pages([(0, message[half:])], section=(1, message[:half]), number=3))
        # Not copied as a whole: another message goes before it, and is long.
        first = message_of(plain_frame(COPIED))
        for place in (20, 44, half):
            pieces = [(0, first[:44]), (5, first[44:] + message[:place]), (0, message[place:])]
            packets.append(guest.pages(pieces, number=4 + place))
            await guest.exchange(packets.pop())
        await guest.exchange(*packets)
        found = guest.take_completions()
        # An empty message in pages is no message at all; behind a good one it is nothing.
        wanted = GOOD if not message else BAD
        assert [status for _number, status in found] == [wanted] * 3 + [BAD] * 3
        assert network.frames == []
        assert adapter.statistics.transmit.errors == len(guest.host.complaints)


@pytest.mark.parametrize(
    ("data_offset", "info_offset", "says"),
    [(520, 36, "a frame at byte 528"), (60, 600, "information at byte 608")],
)
async def test_headers_that_are_far_away_are_refused(data_offset, info_offset, says):
    """Of a long message its first bytes are copied, and everything has to be there."""
    async with running(mtu=9000) as (guest, _adapter):
        message = header(9000, data_offset, 8000, info_offset, 16).ljust(9000, b"\0")
        await guest.exchange(guest.pages([(0, message[:44]), (0, message[44:])], number=1))
        assert guest.take_completions() == [(1, BAD)]
        assert says in guest.host.complaints[0]


@pytest.mark.parametrize(
    ("section", "length", "says"),
    [
        (10, 104, "there are 10 of 6144 bytes"),
        (0xFFFFFFFE, 104, "there are 10"),
        (0, SECTION_SIZE + 1, "6145 bytes in section 0"),
        (0, 0xFFFFFFFF, "in section 0"),
    ],
)
async def test_a_section_that_is_not_there_is_refused(section, length, says):
    async with running() as (guest, _adapter):
        payload = nvsp.build_rndis_packet(nvsp.CHANNEL_DATA, section, length)
        await guest.exchange(guest.in_band(payload, number=1))
        assert guest.take_completions() == [(1, BAD)]
        assert says in guest.host.complaints[0]


async def test_neither_section_nor_pages_is_refused():
    async with running() as (guest, _adapter):
        await guest.exchange(guest.in_band(nvsp.build_rndis_packet(nvsp.CHANNEL_DATA), number=1))
        assert guest.take_completions() == [(1, BAD)]


@pytest.mark.parametrize(
    ("count", "ranges"),
    [
        (0, b""),
        (1, b""),
        (1, build_range(104, 4096, [5])),
        (1, build_range(104, 0, [])),
        (1, build_range(104, 0, [1 << 40])),
        (1, build_range(0xFFFFFFFF, 0, [5])),
        (65, build_range(0, 0, []) * 65),
        (0xFFFFFFFF, build_range(104, 0, [5])),
    ],
)
async def test_pages_that_are_not_there_are_refused(count, ranges):
    async with running() as (guest, _adapter):
        packet_ = build_packet(
            GPA_DIRECT,
            nvsp.build_rndis_packet(nvsp.CHANNEL_DATA),
            transaction_id=1,
            flags=1,
            header=RANGES_HEADER.pack(0, count) + ranges,
        )
        await guest.exchange(packet_)
        assert guest.take_completions() == [(1, BAD)]
        assert guest.host.complaints


async def test_a_message_that_is_longer_than_any_frame_is_refused():
    """A packet has room for 65 000 pages, which may all be the same."""
    async with running() as (guest, _adapter):
        for size in (MAX_MESSAGE + 1, 200 * PAGE_SIZE):
            pfns = [guest.data_pfns[0]] * (-(-size // PAGE_SIZE))
            packet_ = build_packet(
                GPA_DIRECT,
                nvsp.build_rndis_packet(nvsp.CHANNEL_DATA),
                transaction_id=1,
                flags=1,
                header=RANGES_HEADER.pack(0, 1) + build_range(size, 0, pfns),
            )
            await guest.exchange(packet_)
            assert guest.take_completions() == [(1, BAD)]
            assert f"more than {MAX_MESSAGE} bytes" in guest.host.complaints.pop()


async def test_one_bad_packet_does_not_hold_up_the_others():
    network = Network()
    async with running(network) as (guest, _adapter):
        packets = [
            guest.section(number, WRONG["cut-off"] if number % 2 else MESSAGE, number=number)
            for number in range(6)
        ]
        await guest.exchange(*packets)
        assert sorted(guest.take_completions()) == [
            (number, BAD if number % 2 else GOOD) for number in range(6)
        ]
        assert len(network.frames) == 3


async def test_a_packet_that_wants_no_completion_gets_none():
    network = Network()
    async with running(network) as (guest, _adapter):
        await guest.exchange(
            guest.section(0, MESSAGE, flags=0), guest.section(1, WRONG["short"], flags=0)
        )
        assert guest.completions == []
        assert len(network.frames) == 1


async def test_information_is_remembered_but_not_without_end():
    """A guest can make 60 KiB of it, and another list for each frame."""
    async with running() as (guest, adapter):
        session = adapter._session
        assert session is not None
        reader = session._senders[guest.channel].messages
        padding = struct.pack("<III", 5000, 77, 12).ljust(5000, b"\0")
        await guest.exchange(guest.pages([(0, message_of(plain_frame(60), padding))], number=1))
        assert guest.take_completions() == [(1, GOOD)]
        assert reader.memo == {}
        for number in range(_MEMO + 3):
            item = ppi.build_item(ppi.HASH_VALUE, number)
            reader.frames_untrusted([message_of(plain_frame(60), item)])
        assert len(reader.memo) == 3


# -- what frames become ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offloads", [Offloads(), ALL], ids=["software", "all"])
async def test_sums_are_filled_in_unless_the_endpoint_does(shape, offloads):
    network = Network(offloads)
    async with running(network) as (guest, adapter):
        left, items = without_sum(shape, packet(shape, bytes(range(250))))
        message = message_of(left, information(items))
        await guest.exchange(guest.section(0, message), guest.pages([(0, message)]))
        inside = shape._replace(vlan="none" if shape.vlan == "none" else "inside")
        whole = packet(inside, bytes(range(250)))
        for sent in network.frames:
            assert sent.offload is not None
            assert (sent.offload.flags == 1) == offloads.checksum
            assert sent.tci == (shape.tci if offloads.vlan else None)
            if not offloads.checksum:
                assert sent.tobytes() == whole
            else:
                assert sent.tobytes() == left
        assert len(network.frames) == 2
        assert adapter.statistics.transmit.checksums == 2


@pytest.mark.parametrize("shape", [each for each in SHAPES if each.protocol == "tcp"], ids=str)
@pytest.mark.parametrize("offloads", [Offloads(), Offloads(checksum=True), ALL],
                         ids=["software", "checksum", "all"])  # fmt: skip
async def test_segments_are_cut_unless_the_endpoint_does(shape, offloads):
    network = Network(offloads)
    async with running(network) as (guest, adapter):
        payload = random.Random(1).randbytes(20000)
        left, items = uncut(shape, packet(shape, payload), 1400)
        message = message_of(left, information(items))
        await guest.exchange(guest.pages([(100, message[:5000]), (0, message[5000:])], number=1))
        assert guest.take_completions() == [(1, GOOD)]
        assert adapter.statistics.transmit.segments == 1
        if offloads.tcp_segments:
            (sent,) = network.frames
            assert sent.offload is not None
            assert sent.offload.gso_size == 1400
            assert len(sent) == len(left)
            return
        inside = shape._replace(vlan="none" if shape.vlan == "none" else "inside")
        wanted = list(pieces_of(inside, payload, 1400))
        if offloads.checksum:
            assert [len(each) for each in network.frames] == [len(each) for each in wanted]
            assert all(each.offload and each.offload.flags == 1 for each in network.frames)
        else:
            assert network.bytes() == wanted


@pytest.mark.parametrize("offloads", [Offloads(), ALL], ids=["software", "all"])
async def test_nothing_goes_out_that_is_longer_than_was_agreed_on(offloads):
    """Neither with a sum that is left to us, nor in pieces."""
    network = Network(offloads, mtu=1500)
    async with running(network) as (guest, adapter):
        shape = Shape(4, "tcp", "none")
        for size in (1460, 1461):
            left, items = without_sum(shape, packet(shape, bytes(size)))
            await guest.exchange(guest.section(0, message_of(left, information(items))))
        assert [len(each) for each in network.frames] == [1514]
        for mss in (1460, 1461):
            left, items = uncut(shape, packet(shape, bytes(4000)), mss)
            await guest.exchange(guest.section(0, message_of(left, information(items))))
        assert adapter.statistics.transmit.dropped["too long"] == 2
        assert adapter.statistics.transmit.segments == 1
        longest = PEER + MAC + b"\x81\0\0\5" + plain_frame(1514)[12:]
        await guest.exchange(guest.section(0, message_of(longest)))
        await guest.exchange(guest.section(0, message_of(longest + b"x")))
        assert adapter.statistics.transmit.dropped["too long"] == 3


async def test_an_address_that_is_not_its_own_does_not_go_out():
    frames = {
        "own": plain_frame(60),
        "spoofed": plain_frame(60, source=PEER),
        "short": plain_frame(60)[:13],
        "none": b"",
    }
    for allow in (False, True):
        network = Network()
        async with running(network, config=AdapterConfig(allow_spoofing=allow)) as (guest, adapter):
            for number, each in enumerate(frames.values()):
                await guest.exchange(guest.section(number, message_of(each), number=number))
            assert guest.take_completions() == [(number, GOOD) for number in range(4)]
            dropped = dict(adapter.statistics.transmit.dropped)
            if allow:
                assert network.bytes() == [frames["own"], frames["spoofed"]]
                assert dropped == {"short": 2}
            else:
                assert network.bytes() == [frames["own"]]
                assert dropped == {"spoofed": 1, "short": 2}


async def test_frames_are_dropped_while_the_cable_is_out():
    network = Network()
    async with running(network) as (guest, adapter):
        adapter.set_link(up=False)
        await guest.exchange(guest.section(0, MESSAGE, number=1))
        adapter.set_link(up=True)
        await guest.exchange(guest.section(0, MESSAGE, number=2))
        assert guest.take_completions() == [(1, GOOD), (2, GOOD)]
        assert len(network.frames) == 1
        assert adapter.statistics.transmit.dropped == {"link down": 1}


def tagged(tci: int) -> bytes:
    return PEER + MAC + b"\x81\x00" + tci.to_bytes(2, "big") + b"\x88\xb5" + bytes(60)


UNTAGGED = PEER + MAC + b"\x88\xb5" + bytes(60)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("config", "sent"),
    [
        ({}, {None: None, 0x0000: 0x0000, 0xA005: 0xA005, 0x0006: 0x0006}),
        ({"vlan": 5}, {None: 5, 0x0000: 5, 0xA000: 0xA005}),
        ({"trunk": frozenset({5})}, {0xA005: 0xA005}),
        ({"trunk": frozenset({0, 6})}, {None: None, 0x0000: 0x0000, 0xA000: 0xA000,
                                       0x0006: 0x0006}),
    ],
)  # fmt: skip
async def test_frames_stay_in_their_vlan(config, sent, beside):
    for tci in (None, 0x0000, 0xA000, 0xA005, 0x0006):
        network = Network()
        async with running(network, config=AdapterConfig(**config)) as (guest, adapter):
            if tci is None:
                message = message_of(UNTAGGED)
            elif beside:
                item = ppi.build_item(ppi.VLAN, ppi.pack_vlan(ppi.vlan_of_tci(tci)))
                message = message_of(UNTAGGED, item)
            else:
                message = message_of(tagged(tci))
            await guest.exchange(guest.section(0, message, number=1))
            assert guest.take_completions() == [(1, GOOD)]
            if tci in sent or not config:
                got = sent.get(tci, tci)
                assert network.bytes() == [UNTAGGED if got is None else tagged(got)]
            else:
                assert network.frames == []
                assert adapter.statistics.transmit.dropped == {"vlan": 1}
