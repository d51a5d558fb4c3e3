"""Arbitrary bytes, frames and descriptors: only clean refusals, no leak, and others are served."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import construct as c
import pytest
import trio
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.support.attach import RAM_SIZE, Bus, RawVmm, make_eventfd, make_memfd, running_server
from tests.support.leaks import count_fds
from tests.support.patience import SOON
from vmbus.attach.client.operator import read_json_reply_untrusted
from vmbus.attach.protocol.framing import ASYNC, HEADER, REPLY, FrameReader, pack_frame
from vmbus.attach.protocol.layout import Layout
from vmbus.attach.protocol.limits import ALL_FEATURES
from vmbus.attach.protocol.messages import MESSAGES, Number
from vmbus.attach.protocol.to_server import (
    Goodbye,
    Hello,
    MemoryRegion,
    PostMessage,
    RemMem,
    Reset,
    SetMemTable,
    SetSintFd,
    SignalEvent,
    SynicState,
    VmInfo,
    decode_post_untrusted,
)
from vmbus.attach.protocol.to_vmm import ErrorReply
from vmbus.attach.server import ServerLimits
from vmbus.errors import PeerProtocolError

SHAPES = sorted(
    {spec.request for spec in MESSAGES.values()}
    | {spec.reply for spec in MESSAGES.values() if spec.reply is not None}
    | {ErrorReply},
    key=lambda shape: shape.__name__,
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@given(data=st.data())
def test_arbitrary_payloads_raise_only_the_protocol_error(shape: Any, data: Any) -> None:
    layout = getattr(shape, "LAYOUT", Layout())
    payload = data.draw(
        st.one_of(
            st.binary(max_size=400),
            st.binary(min_size=layout.size, max_size=layout.size),
            st.builds(
                lambda numbers: b"".join(
                    (n % (1 << 8 * f.size)).to_bytes(f.size, "little")
                    for n, f in zip(numbers, layout.fields, strict=True)
                ),
                st.tuples(
                    *(st.sampled_from([0, 1, 2, 4096, 1 << 31, -1, -4096]) for _ in layout.fields)
                ),
            ),
        )
    )
    try:
        message = shape.decode_untrusted(payload)
    except PeerProtocolError:
        return
    assert shape.decode_untrusted(message.encode()) == message


@given(payload=st.binary(max_size=300))
def test_arbitrary_posts_raise_only_the_protocol_error(payload: bytes) -> None:
    try:
        connection_id, message_type, vp, body = decode_post_untrusted(payload)
    except PeerProtocolError:
        return
    assert PostMessage(connection_id, message_type, vp, body).encode() == payload


@given(payload=st.binary(max_size=50))
def test_arbitrary_json_replies_raise_only_the_protocol_error(payload: bytes) -> None:
    reader = FrameReader(stream=False)
    reader.feed_untrusted(pack_frame(Number.QUERY, REPLY, 1, payload))
    frame = reader.next_frame()
    assert frame is not None
    try:
        value = read_json_reply_untrusted(frame)
    except PeerProtocolError:
        return
    assert isinstance(value, dict)


HEADERS = st.builds(
    HEADER.pack,
    st.integers(0, 0x90),
    st.sampled_from([0, 0, 0, REPLY, ASYNC, 3, 2, 7, 0xFFFF]),
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from([0, 1, 3, 20, 32768, 32769, 0xFFFFFFFF]),
    st.sampled_from([0, 0, 0, 1, 2, 64, 65, 0xFFFF]),
    st.sampled_from([0, 0, 0, 0, 1]),
)
CHUNKS = st.lists(
    st.tuples(
        st.one_of(
            st.binary(min_size=1, max_size=60),
            st.builds(bytes.__add__, HEADERS, st.binary(max_size=30)),
        ),
        st.integers(0, 4),
        st.sampled_from([0, 0, 0, 0, socket.MSG_TRUNC, socket.MSG_CTRUNC]),
    ),
    max_size=12,
)


@given(chunks=CHUNKS, stream=st.booleans(), close=st.booleans())
def test_the_frame_reader_closes_every_descriptor_once(
    chunks: list[tuple[bytes, int, int]], *, stream: bool, close: bool
) -> None:
    before = count_fds(collect=True)
    reader = FrameReader(stream=stream)
    for data, fds, flags in chunks:
        reader.feed_untrusted(data, [make_eventfd() for _ in range(fds)], flags)
        try:
            while not close and (frame := reader.next_frame()) is not None:
                frame.close()
        except PeerProtocolError:
            continue
    reader.close()
    assert count_fds() == before


@given(
    frames=st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=40)), max_size=6),
    cuts=st.lists(st.integers(1, 30), max_size=30),
)
def test_a_stream_gives_the_same_frames_however_it_is_cut(
    frames: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    data = b"".join(pack_frame(kind, 0, 1, payload) for kind, payload in frames)
    reader = FrameReader(stream=True)
    got = []
    for cut in [*cuts, len(data)]:
        reader.feed_untrusted(data[:cut])
        data = data[cut:]
        while (frame := reader.next_frame()) is not None:
            got.append((frame.kind, frame.payload))
    assert got == frames
    assert reader.at_boundary()


# -- layouts declared twice ----------------------------------------------------------------------

_INTEGERS: dict[int, Any] = {2: c.Int16ul, 4: c.Int32ul, 8: c.Int64ul, 16: c.Bytes(16)}


def twin(layout: Layout) -> Any:
    return c.Struct(*(c.Renamed(_INTEGERS[f.size], newname=f.name) for f in layout.fields))


@pytest.mark.parametrize(
    "message",
    [
        Hello(1, 2, 3, 4, 1, ""),
        RemMem(1, 2),
        VmInfo(1, 4096, bytes(range(16)), 5, 0),
        SynicState(1, 2, 3, 4, 5),
        SetSintFd(9, 2),
        SignalEvent(5, 6),
        Reset(2),
        MemoryRegion(4096, 8192, 12288, 1, 3),
    ],
    ids=lambda message: type(message).__name__,
)
def test_layouts_agree_with_their_declarative_twins(message: Any) -> None:
    shape = twin(message.LAYOUT)
    parsed = shape.parse(message.encode())
    assert shape.build(parsed) == message.encode()
    for field in message.LAYOUT.fields:
        expected = 0 if field.name == "reserved" else getattr(message, field.name)
        assert parsed[field.name] == expected


# -- the whole server ----------------------------------------------------------------------------

REGION = MemoryRegion(0, RAM_SIZE, 0, 0, 0)
SENSIBLE = {
    Number.HELLO: Hello(1, 1, ALL_FEATURES, 4, 0, "x").encode(),
    Number.VM_INFO: VmInfo(2, 4096, bytes(16), 0, 0).encode(),
    Number.SET_MEM_TABLE: SetMemTable((REGION,)).encode(),
    Number.ADD_MEM: MemoryRegion(1 << 32, RAM_SIZE, 0, 0, 0).encode(),
    Number.REM_MEM: RemMem(0, RAM_SIZE).encode(),
    Number.SYNIC_STATE: SynicState(0, 1, 0, 0x4001, 0xF3).encode(),
    Number.SET_SINT_FD: SetSintFd(0, 2).encode(),
    Number.POST_MESSAGE: PostMessage(4, 1, 0, b"x").encode(),
    Number.SIGNAL_EVENT: SignalEvent(17, 0).encode(),
    Number.RESET: Reset(0).encode(),
    Number.PAUSE: b"",
    Number.RESUME: b"",
    Number.QUERY: b"status",
    Number.GOODBYE: Goodbye(0).encode(),
}
NATURAL_FDS = {Number.SET_MEM_TABLE: "m", Number.ADD_MEM: "m", Number.SET_SINT_FD: "e"}

OPERATIONS = st.lists(
    st.one_of(
        # A legal message, perhaps at the wrong moment.
        st.sampled_from(list(SENSIBLE)).map(
            lambda n: (n, SENSIBLE[n], NATURAL_FDS.get(n, ""), None)
        ),
        # One with a bit flipped, cut, or with other descriptors.
        st.builds(
            lambda n, at, bit, cut, fds: (n, mutate(SENSIBLE[n], at, bit, cut), fds, None),
            st.sampled_from(list(SENSIBLE)),
            st.integers(0, 100),
            st.integers(0, 7),
            st.integers(-3, 0),
            st.text("mepur", max_size=3),
        ),
        # Anything with a good header.
        st.tuples(
            st.integers(0, 0xFF),
            st.binary(max_size=64),
            st.text("mepur", max_size=3),
            st.sampled_from([None, 0, REPLY, ASYNC, 3]),
        ),
    ),
    max_size=14,
)


def mutate(payload: bytes, at: int, bit: int, cut: int) -> bytes:
    data = bytearray(payload)
    if data:
        data[at % len(data)] ^= 1 << bit
    return bytes(data[: len(data) + cut])


def make_fd(letter: str) -> int:
    if letter == "m":
        return make_memfd()
    if letter == "e":
        return make_eventfd()
    if letter == "u":
        return make_memfd(seal=False)
    if letter == "r":
        return os.open("/dev/null", os.O_RDONLY)
    ours, theirs = os.pipe()
    os.close(theirs)
    return ours


async def drain(vmm: RawVmm, *, answer: bool) -> bool:
    """Read what the server says until it is quiet; False at the end of the connection."""
    while True:
        try:
            frame = await read_now(vmm)
        except EOFError:
            return False
        if frame is None:
            return True
        if answer and frame.flags == 0:
            await vmm.answer(frame)
        frame.close()


async def read_now(vmm: RawVmm) -> Any:
    from vmbus.attach.protocol.framing import receive

    # Let the server's tasks run dry first; they share this loop.
    await trio.testing.wait_all_tasks_blocked()
    frame = vmm.reader.next_frame()
    while frame is None:
        try:
            if not receive(vmm.sock, vmm.reader):
                raise EOFError
        except BlockingIOError:
            return None
        except ConnectionResetError:
            raise EOFError from None
        frame = vmm.reader.next_frame()
    return frame


async def play(path: Path, operations: list[Any], mode: str) -> None:
    bus = Bus()
    limits = ServerLimits(drain_timeout=SOON, handler_grace=SOON, post_credits=4)
    async with running_server(path, bus, mode=mode, limits=limits, query=lambda _: {}) as address:
        kind = socket.SOCK_STREAM if mode == "stream" else socket.SOCK_SEQPACKET
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.connect(os.fspath(address))
        vmm = RawVmm(sock)
        try:
            for number, payload, letters, flags in operations:
                spec = MESSAGES.get(number)
                usual = ASYNC if spec is not None and spec.is_async else 0
                fds = tuple(make_fd(letter) for letter in letters)
                try:
                    await vmm.send(
                        number, payload, fds=fds, flags=usual if flags is None else flags
                    )
                except (BrokenPipeError, ConnectionResetError):
                    break
                finally:
                    for fd in fds:
                        os.close(fd)
                if not await drain(vmm, answer=True):
                    break
        finally:
            vmm.close()
        # Somebody else is served all the same.
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.connect(os.fspath(address))
        other = RawVmm(sock)
        await other.attach(info=VmInfo(1, 4096, bytes(16), 0, 0))
        await other.ok(Number.GOODBYE, Goodbye(0).encode())
        other.close()


@pytest.mark.parametrize("mode", ["seqpacket", "stream"])
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(operations=OPERATIONS)
def test_the_server_survives_any_vmm_and_leaks_nothing(
    tmp_path: Path, mode: str, operations: list[Any]
) -> None:
    before = count_fds(collect=True)
    trio.run(play, tmp_path / "s", operations, mode)
    assert count_fds() == before


BOOT = [
    (Number.HELLO, SENSIBLE[Number.HELLO], "", None),
    (Number.VM_INFO, SENSIBLE[Number.VM_INFO], "", None),
    (Number.SET_MEM_TABLE, SENSIBLE[Number.SET_MEM_TABLE], "m", None),
]


@pytest.mark.parametrize("mode", ["seqpacket", "stream"])
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(operations=OPERATIONS)
def test_the_server_survives_any_attached_vmm_and_leaks_nothing(
    tmp_path: Path, mode: str, operations: list[Any]
) -> None:
    before = count_fds(collect=True)
    trio.run(play, tmp_path / "s", BOOT + operations, mode)
    assert count_fds() == before
