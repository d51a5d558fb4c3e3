"""The golden transcripts of ``vmbus-user``, played byte for byte against server and client.

The same text stands in ``docs/reference/vmbus-user-transcripts.md``. A transcript is a text file: a
line that starts with ``>`` (towards the server) or ``<`` (from the server) begins a frame and may
name the descriptors that go along; the indented lines after it are its bytes; ``#`` starts a
comment.
"""

from __future__ import annotations

import os
import queue
import re
import socket
import threading
import uuid
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.attach import (
    RAM_SIZE,
    RawVmm,
    Recorder,
    control,
    make_eventfd,
    make_memfd,
    running_server,
    send_raw,
)
from tests.support.house import ROOT
from tests.support.patience import PATIENCE
from vmbus.attach.client import Attachment
from vmbus.attach.client.attachment import Feature, Region
from vmbus.attach.client.operator import command, query
from vmbus.attach.protocol.framing import (
    ASYNC,
    ERROR,
    HEADER,
    HEADER_SIZE,
    REPLY,
    FrameReader,
    receive,
)
from vmbus.attach.protocol.messages import MESSAGES, Direction
from vmbus.attach.protocol.to_vmm import ErrorReply
from vmbus.attach.server.transport import SocketTransport
from vmbus.errors import VMBusError
from vmbus.partition.events import PartitionPaused, PartitionReset, PostedMessage

FOLDER = ROOT / "tests" / "reference" / "vmbus_user_transcripts"
PAGE = ROOT / "docs" / "reference" / "vmbus-user-transcripts.md"
VM_ID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")

INITIATE_CONTACT = bytes.fromhex(
    "0e00000000000000 0300050000000000 0200000000000000 0000000000000000"
)
VERSION_RESPONSE = bytes.fromhex("0f00000000000000 0100000001000000 0400000000000000")


class Entry(NamedTuple):
    to_server: bool
    fds: tuple[str, ...]
    data: bytes
    line: int


def parse(path: Path) -> list[Entry]:
    entries: list[Entry] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        content = line.split("#")[0].rstrip()
        if not content:
            continue
        if content[0] in "<>":
            fds = tuple(re.findall(r"\+(\w+)", content))
            entries.append(Entry(content[0] == ">", fds, b"", number))
        else:
            last = entries[-1]
            entries[-1] = last._replace(data=last.data + bytes.fromhex(content))
    return entries


async def scripted_bus(transport: SocketTransport) -> None:
    """Do one of everything, in an order that depends on nothing but the guest."""
    await transport.add_message_port(1)
    await transport.add_message_port(4)
    calls = []
    async for event in transport.incoming():
        if isinstance(event, PostedMessage):
            event.done()
            if not await transport.deliver(event.vp, 2, 1, VERSION_RESPONSE):
                continue
            await transport.add_event_port(0x11, 0)
            calls.append(transport.open_call(1, 2, 1))
            calls[-1].signal()
        elif isinstance(event, PartitionReset):
            for call in calls:
                call.close()
            await transport.remove_event_port(0x11, 0)
            event.done()
        else:
            if isinstance(event, PartitionPaused):
                transport.report("the VM is paused")
            event.done()


def answer_query(kind: str) -> dict[str, object]:
    if kind != "status":
        raise VMBusError(f"there is no kind {kind}")
    return {"guests": 1}


def answer_command(value: dict[str, object]) -> dict[str, object]:
    return {"done": value["do"]}


async def play_against_server(path: Path, tmp_path: Path) -> None:
    entries = parse(path)
    made: list[int] = []
    async with running_server(
        tmp_path / "socket", scripted_bus, query=answer_query, command=answer_command
    ) as address:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(os.fspath(control(address) if "operator" in path.name else address))
        vmm = RawVmm(sock)
        for entry in entries:
            if entry.to_server:
                fds = tuple(make_memfd() if n == "memfd" else make_eventfd() for n in entry.fds)
                made.extend(fds)
                await vmm.send_bytes(entry.data, fds)
            else:
                frame = await vmm.receive()
                assert frame is not None, f"line {entry.line}: the server closed the connection"
                header = HEADER.pack(
                    frame.kind, frame.flags, frame.seq, len(frame.payload), len(frame.fds), 0
                )
                assert (header + frame.payload).hex(" ") == entry.data.hex(" "), entry.line
                assert len(frame.fds) == len(entry.fds)
                frame.close()
        vmm.close()
    for fd in made:
        os.close(fd)


TRANSCRIPTS = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
async def test_the_server_plays_its_part_of_the_transcript(path: Path, tmp_path: Path) -> None:
    await play_against_server(path, tmp_path)


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_every_frame_of_the_transcript_survives_decoding_and_encoding(path: Path) -> None:
    for entry in parse(path):
        kind, flags, _, length, nfds, reserved = HEADER.unpack_from(entry.data)
        payload = entry.data[HEADER_SIZE:]
        assert (len(payload), len(entry.fds), reserved) == (length, nfds, 0)
        if flags & ERROR:
            assert ErrorReply.decode_untrusted(payload).encode() == payload
            continue
        spec = MESSAGES.get(kind)
        if spec is None or path.stem == "refusals":
            continue
        assert spec.is_async == bool(flags & ASYNC)
        if spec.direction is not Direction.BOTH:
            assert (spec.direction is Direction.TO_SERVER) == (
                entry.to_server != bool(flags & REPLY)
            )
        shape = spec.reply if flags & REPLY else spec.request
        assert shape is not None
        assert shape.decode_untrusted(payload).encode() == payload


def test_the_transcripts_show_every_message() -> None:
    shown = {
        (HEADER.unpack_from(entry.data)[0], bool(HEADER.unpack_from(entry.data)[1] & REPLY))
        for path in TRANSCRIPTS
        for entry in parse(path)
    }
    for number, spec in MESSAGES.items():
        assert (number, False) in shown, spec.name
        assert spec.is_async or (number, True) in shown, spec.name


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_page_prints_the_transcript(path: Path) -> None:
    assert f"```text\n{path.read_text()}```" in PAGE.read_text()


class FakeServer(threading.Thread):
    """Plays the server's part of a transcript and compares what the client sends."""

    def __init__(self, path: Path, sock: socket.socket) -> None:
        super().__init__()
        self._entries = parse(path)
        self._sock = sock
        self.result: queue.Queue[str] = queue.Queue()

    def run(self) -> None:
        self._sock.settimeout(PATIENCE)
        made: list[int] = []
        reader = FrameReader(stream=False)
        try:
            for entry in self._entries:
                if not entry.to_server:
                    fds = tuple(make_eventfd() for _ in entry.fds)
                    made.extend(fds)
                    send_raw(self._sock, entry.data, fds)
                    continue
                if not receive(self._sock, reader):
                    self.result.put(f"line {entry.line}: end of connection")
                    return
                frame = reader.next_frame()
                assert frame is not None
                nfds = len(frame.fds)
                frame.close()
                data = HEADER.pack(frame.kind, frame.flags, frame.seq, len(frame.payload), nfds, 0)
                if data + frame.payload != entry.data:
                    self.result.put(
                        f"line {entry.line}: {(data + frame.payload).hex(' ')}"
                        f" instead of {entry.data.hex(' ')}"
                    )
                    return
            self.result.put("")
        except OSError as error:
            self.result.put(f"{error}")
        finally:
            for fd in made:
                os.close(fd)
            self._sock.close()


def started(stem: str) -> tuple[FakeServer, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = FakeServer(FOLDER / f"{stem}.txt", theirs)
    server.start()
    return server, ours


def finished(server: FakeServer) -> None:
    assert server.result.get(timeout=PATIENCE) == ""
    server.join()


def begin(sock: socket.socket, recorder: Recorder, features: Feature) -> tuple[Attachment, int]:
    attachment = Attachment.connect(sock, recorder, name="example", max_vps=4, features=features)
    attachment.vm_info(2, vm_id=VM_ID, privileges=0x30_0000_0064)
    ram = make_memfd()
    return attachment, ram


def test_the_client_plays_its_part_of_the_first_guest() -> None:
    server, sock = started("guest")
    recorder = Recorder()
    attachment, ram = begin(sock, recorder, Feature(0))
    attachment.set_memory_table([Region(0, RAM_SIZE, ram)])
    assert attachment.post_message(4, 1, 0, INITIATE_CONTACT) == 0
    while not recorder.named("flag"):
        assert attachment.process()
    attachment.reset()
    attachment.goodbye()
    os.close(ram)
    finished(server)


def test_the_client_plays_its_part_of_the_signal_by_message() -> None:
    server, sock = started("lifecycle")
    recorder = Recorder()
    attachment, ram = begin(sock, recorder, Feature.LOG)
    attachment._signal_by_message = True
    attachment.set_memory_table([Region(0, RAM_SIZE, ram)])
    assert attachment.post_message(4, 1, 0, INITIATE_CONTACT) == 0
    while not recorder.named("flag"):
        assert attachment.process()
    assert attachment.signal_event(0x11) == 0
    attachment.pause()
    assert recorder.named("log") == [("log", "the VM is paused")]
    more = make_memfd()
    attachment.add_memory(Region(1 << 32, RAM_SIZE, more, read_only=True))
    attachment.remove_memory(1 << 32, RAM_SIZE)
    attachment.resume()
    assert attachment.query("status") == {"guests": 1}
    attachment.goodbye()
    os.close(ram)
    os.close(more)
    finished(server)


def test_the_client_plays_its_part_of_the_fast_tiers() -> None:
    server, sock = started("tiers")
    recorder = Recorder()
    attachment, ram = begin(sock, recorder, Feature.CALL_FD | Feature.DIRECT)
    attachment.set_memory_table([Region(0, RAM_SIZE, ram)])
    assert attachment.post_message(4, 1, 0, INITIATE_CONTACT) == 0
    while not recorder.named("call"):
        assert attachment.process()
    sint = make_eventfd()
    attachment.set_sint_fd(1, sint)
    attachment.synic_state(1, 1, 0x3001, 0x4001, 0xF3)
    attachment.reset()
    attachment.goodbye()
    os.close(ram)
    os.close(sint)
    finished(server)


def test_the_operator_plays_its_part() -> None:
    server, sock = started("operator_query")
    assert query(sock, "status") == {"guests": 1}
    finished(server)
    server, sock = started("operator_command")
    assert command(sock, {"do": "nothing"}) == {"done": "nothing"}
    finished(server)
