"""Any message on the line of a switch, at either end, and between two switches."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Sequence

import trio
from hypothesis import example, given, settings, strategies as st

from netvsp.endpoint import EndpointError
from netvsp.endpoints.switch import SwitchLineEndpoint
from netvsp.frames.frame import (
    DATA_VALID,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    NEEDS_CHECKSUM,
    Frame,
    Offload,
)
from netvsp.frames.offload import complete, receive_value
from netvsp.shared.line import FrameLine, make_buffer
from netvsp.shared.messages import (
    HEADER,
    LONGEST,
    MAX_DATA,
    MAX_FRAMES,
    MAX_STATIONS,
    RECORD,
    Kind,
    check_offload_untrusted,
    frames_untrusted,
    info_untrusted,
    kind_untrusted,
    lost_untrusted,
    pack_frames,
    pack_info,
    pack_station,
    pack_stations,
    station_untrusted,
    stations_untrusted,
)
from netvsp.switch.switch import Crossing
from tests.support.switch import make_frame, station
from tests.support.switch_lines import Adapter, kept
from vmbus.errors import PeerProtocolError

U16 = st.integers(0, 0xFFFF)
ADDRESSES = st.binary(min_size=6, max_size=6) | st.integers(1, 5).map(station)
HEADS = st.builds(
    lambda ends, kind, rest: ends + kind + rest,
    st.binary(min_size=12, max_size=12),
    st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x81\x00", b"\x88\xb5"]),
    st.binary(max_size=200)
    | st.builds(
        lambda first, rest: first + rest,
        st.sampled_from([b"\x45", b"\x60", b"\0\5\x08\0\x45", b"\0\5\x86\xdd\x60"]),
        st.binary(max_size=200),
    ),
)
SMALL = st.integers(0, 80)
OFFLOADS = st.builds(
    Offload,
    st.integers(0, 255) | st.sampled_from([NEEDS_CHECKSUM, DATA_VALID]),
    st.integers(0, 255) | st.sampled_from([0, GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_TCPV4 | GSO_ECN]),
    SMALL | U16,
    SMALL | U16,
    SMALL | U16,
    st.sampled_from([6, 16]) | U16,
)
FRAMES = st.builds(
    Crossing,
    HEADS,
    st.none() | OFFLOADS,
    st.none() | U16,
    st.integers(0, 2**32 - 1),
    st.integers(0, 3),
)


def packed(frames: Sequence[Frame]) -> bytes:
    pieces, _ = pack_frames(frames)
    return b"".join(pieces)


MESSAGES = (
    st.binary(min_size=1, max_size=80)
    | st.builds(
        lambda kind, count, rest: HEADER.pack(kind, count) + rest,
        st.sampled_from(list(Kind)),
        st.integers(0, 3) | U16,
        st.binary(max_size=120),
    )
    | st.lists(FRAMES, min_size=1, max_size=4).map(packed)
    | st.builds(
        lambda frames, at, byte: packed(frames)[:at] + byte + packed(frames)[at + 1 :],
        st.lists(FRAMES, min_size=1, max_size=3),
        st.integers(0, 90),
        st.binary(min_size=1, max_size=1),
    )
    | ADDRESSES.map(pack_station)
    | st.lists(ADDRESSES, max_size=4).map(lambda some: pack_stations(Kind.ADD, some))
    | st.dictionaries(st.text(max_size=5), st.integers() | st.text(), max_size=3).map(pack_info)
)


@given(data=MESSAGES, joint=st.booleans())
@example(data=HEADER.pack(Kind.INFO, 0) + b"[" * 4000, joint=False)
def test_a_message_is_understood_or_refused(data, joint):
    with contextlib.suppress(PeerProtocolError):
        kind, count = kind_untrusted(data)
        match kind:
            case Kind.FRAMES:
                frames = frames_untrusted(memoryview(data), count, joint=joint)
                assert len(frames) == count
                size = HEADER.size + count * RECORD.size + sum(map(len, frames))
                assert size == len(data)
                assert all(14 <= len(frame) <= LONGEST for frame in frames)
                assert all(isinstance(frame, Crossing) == joint for frame in frames)
            case Kind.STATION:
                address = station_untrusted(data, count)
                assert address is None or (len(address) == 6 and not address[0] & 1)
            case Kind.ADD | Kind.REMOVE:
                assert len(stations_untrusted(data, count)) == count <= MAX_STATIONS
            case Kind.INFO:
                info = info_untrusted(data)
                assert isinstance(info, dict)
                assert lost_untrusted(info) >= 0
            case Kind.HELLO | Kind.PROOF:
                pass  # between switches, in the order of a greeting


@st.composite
def almost_segments(draw: st.DrawFn) -> tuple[bytes, Offload]:
    """Draw a segment that can be cut, or one that has something wrong with it."""
    kind = draw(st.sampled_from([GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_TCPV4 | GSO_ECN]))
    ipv6 = draw(st.booleans()) if kind == GSO_UDP else kind == GSO_TCPV6
    ends = bytes(12) + draw(st.sampled_from([b"", b"\x81\0\0\5"]))
    ends += b"\x86\xdd" if ipv6 else b"\x08\0"
    start = len(ends) + (40 if ipv6 else 20)
    end = start + (8 if kind == GSO_UDP else 20)
    size = draw(st.integers(40, 60))
    head = (ends + (b"\x60" if ipv6 else b"\x45")).ljust(end + draw(st.integers(0, 300)), b"\0")
    place = 6 if kind == GSO_UDP else 16
    fields = [NEEDS_CHECKSUM, kind, end, size, start, place]
    if draw(st.booleans()):
        at = draw(st.integers(0, 5))
        fields[at] = max(0, fields[at] + draw(st.integers(-30, 30)))
    return head, Offload(*fields)


@given(segment=st.tuples(HEADS, OFFLOADS) | almost_segments())
@example(
    # Nothing but headers.
    segment=(
        bytes(12) + b"\x08\x00\x45" + bytes(39),
        Offload(NEEDS_CHECKSUM, GSO_TCPV4, 54, 48, 34, 16),
    )
)
@example(
    # IPv6 by its first nibble, and headers that leave no room for those of IPv6.
    segment=(
        bytes(12) + b"\x08\x00\x60" + bytes(80),
        Offload(NEEDS_CHECKSUM, GSO_UDP, 42, 48, 34, 6),
    )
)
def test_what_is_left_to_do_can_be_done_or_is_refused(segment):
    """An adapter does it without looking any more."""
    head, offload = segment
    try:
        check_offload_untrusted(head, offload)
    except PeerProtocolError:
        return
    frame = Frame(head, (), offload)
    pieces = complete(frame)
    assert 1 <= len(pieces) <= 1 + len(head) // 48
    assert all(each.offload is None or not each.offload.gso_type for each in pieces)
    receive_value(frame)
    for other in (frame.tagged(), frame.untagged()):
        complete(other)


@given(frames=st.lists(FRAMES, min_size=1, max_size=80))
def test_what_was_said_is_heard(frames):
    good = []
    for frame in frames:
        offload = frame.offload
        if offload is not None:
            with contextlib.suppress(PeerProtocolError):
                check_offload_untrusted(frame.head, offload)
                if offload.flags or offload.gso_type:
                    good.append(frame)
        else:
            good.append(frame)
    if not good:
        return
    pieces, done = pack_frames(good)
    assert done == min(len(good), MAX_FRAMES)
    data = b"".join(pieces)
    kind, count = kind_untrusted(data)
    heard = frames_untrusted(memoryview(data), count, joint=True)
    for said, found in zip(good[:done], heard, strict=True):
        assert isinstance(found, Crossing)
        assert (found.head, found.offload, found.tci, found.flow, found.origin) == (
            said.head, said.offload, said.tci, said.flow, said.origin,
        )  # fmt: skip
    assert kind is Kind.FRAMES


@given(
    lengths=st.lists(
        st.sampled_from([14, 1514, 9000, 65_000, LONGEST, LONGEST + 1]), min_size=1, max_size=100
    ),
    pieces=st.sampled_from([1, 2, 40, 2000]),
)
def test_all_frames_get_into_messages_of_bounded_size(lengths, pieces):
    frames = []
    for length in lengths:
        body = memoryview(bytes(length - 14))
        step = max(1, len(body) // pieces)
        rest = [body[at : at + step] for at in range(0, len(body), step)]
        frames.append(Frame(make_frame(1, 2).head, rest))
    left, heard = frames, 0
    while left:
        message, done = pack_frames(left)
        assert done
        assert len(message) <= 1024
        data = b"".join(message)
        assert len(data) <= HEADER.size + MAX_FRAMES * RECORD.size + MAX_DATA
        if data:
            _, count = kind_untrusted(data)
            heard += len(frames_untrusted(memoryview(data), count))
        left = left[done:]
    assert heard == sum(length <= LONGEST for length in lengths)


@settings(deadline=None)
@given(messages=st.lists(MESSAGES, max_size=6))
def test_no_guest_harms_a_switch_or_its_neighbours(messages):
    async def main() -> None:
        async with kept() as keeper, trio.open_nursery() as nursery:
            one, other = await keeper.adapter(nursery, 1), await keeper.adapter(nursery, 2)
            line = keeper.line("hostile")
            for message in filter(None, messages):
                with contextlib.suppress(OSError):
                    line.sock.send(message)
            line.sock.close()
            frame = make_frame(1, 2, b"are you there?")
            assert one.endpoint.transmit(0, [frame]) == 1
            await other.until(frame.head)
            nursery.cancel_scope.cancel()

    trio.run(main)


@settings(deadline=None)
@given(messages=st.lists(MESSAGES, max_size=6))
def test_no_switch_harms_a_guest(messages):
    async def main() -> None:
        import socket

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        endpoint = SwitchLineEndpoint(FrameLine(ours, make_buffer()))
        adapter = Adapter(endpoint, station(1))
        for message in filter(None, messages):
            theirs.send(message)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(EndpointError):
            await endpoint.run(adapter)
        for frame in adapter.frames:
            complete(frame)
        assert isinstance(endpoint.snapshot(), dict)
        await endpoint.aclose()
        theirs.close()

    trio.run(main)


@settings(deadline=None, max_examples=40)
@given(
    messages=st.lists(
        MESSAGES
        | st.binary(min_size=24, max_size=24).map(lambda body: HEADER.pack(Kind.HELLO, 0) + body)
        | st.binary(min_size=32, max_size=32).map(lambda body: HEADER.pack(Kind.PROOF, 0) + body),
        max_size=4,
    ),
    knows=st.booleans(),
)
def test_no_stranger_and_no_other_switch_harms_one(messages, knows):
    """Whoever has no key is nobody; whoever has one and talks nonsense loses the connection."""

    async def main() -> None:
        import os
        import socket
        import tempfile

        with tempfile.TemporaryDirectory() as directory:
            async with kept(f"[join={directory}]") as keeper, trio.open_nursery() as nursery:
                one, other = await keeper.adapter(nursery, 1), await keeper.adapter(nursery, 2)
                (name,) = (each for each in os.listdir(directory) if len(each) == 4 + 16)
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
                sock.connect(os.path.join(directory, name))
                with contextlib.suppress(OSError):
                    if knows:
                        hello = os.urandom(24)
                        sock.send(HEADER.pack(Kind.HELLO, 0) + hello)
                        await trio.lowlevel.wait_readable(sock)
                        theirs = sock.recv(4096)[HEADER.size :]
                        with open(os.path.join(directory, "lan.key"), "rb") as file:
                            key = file.read()
                        proof = hmac.digest(key, b"clan\0" + hello + theirs, "sha256")
                        sock.send(HEADER.pack(Kind.PROOF, 0) + proof)
                    for message in filter(None, messages):
                        sock.send(message)
                frame = make_frame(1, 2, b"are you there?")
                assert one.endpoint.transmit(0, [frame]) == 1
                await other.until(frame.head)
                if not knows:
                    assert keeper.hub.describe()["joined"] == {
                        "directory": directory,
                        "with": [],
                    }
                sock.close()
                nursery.cancel_scope.cancel()

    trio.run(main)
