"""The numbers of docs/reference/vmbus-user.md, asked for as the text has them.

Nothing of the implementation is used but the server itself: frames are packed from the tables.
"""

from __future__ import annotations

import array
import errno
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from tests.support.attach import Bus, make_eventfd, make_memfd, running_server
from tests.support.house import ROOT
from tests.support.patience import LOOK, PATIENCE
from vmbus.attach.server import ServerLimits

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")

TEXT = (ROOT / "docs/reference/vmbus-user.md").read_text()
MIB = 1 << 20


class Reply(NamedTuple):
    kind: int
    flags: int
    seq: int
    payload: bytes

    @property
    def errno(self) -> int:
        assert self.flags == 3, self
        (code,) = struct.unpack_from("<i", self.payload)
        assert 1 <= code <= 4095
        assert len(self.payload) <= 4 + 512
        text = self.payload[4:].decode()
        assert not any(ord(char) < 0x20 or ord(char) == 0x7F for char in text)
        return int(code)


class Peer:
    """Speaks frames as the tables of the text have them."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(os.fspath(path))
        self.sock.setblocking(False)
        self.seq = 0

    def send(
        self, kind: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0
    ) -> None:
        self.seq += not flags
        head = struct.pack("<HHIIHH", kind, flags, self.seq, len(payload), len(fds), 0)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([head + payload], rights)

    async def receive(self) -> Reply | None:
        with trio.fail_after(PATIENCE):
            while True:
                try:
                    data = self.sock.recv(40000)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self.sock)
                    continue
                if not data:
                    return None
                kind, flags, seq, length, nfds, reserved = struct.unpack_from("<HHIIHH", data)
                assert (length, nfds, reserved) == (len(data) - 16, 0, 0)
                return Reply(kind, flags, seq, data[16:])

    async def ask(self, kind: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> Reply:
        self.send(kind, payload, fds)
        while True:
            reply = await self.receive()
            assert reply is not None
            if reply.flags == 0:
                self.sock.send(struct.pack("<HHIIHH", reply.kind, 1, reply.seq, 0, 0, 0))
                continue
            assert (reply.kind, reply.seq) == (kind, self.seq)
            return reply

    async def refusal(self, kind: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        return (await self.ask(kind, payload, fds)).errno

    async def granted(self, kind: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        reply = await self.ask(kind, payload, fds)
        assert reply.flags == 1, reply
        return reply.payload


def hello(
    *,
    low: int = 1,
    high: int = 1,
    features: int = 3,
    vps: int = 4,
    role: int = 0,
    name: bytes = b"x",
) -> bytes:
    head = struct.pack("<IHHQIHH", 0x55424D56, low, high, features, vps, role, len(name))
    return head + name


def vm_info(*, vps: int = 2, page: int = 4096, flags: int = 0) -> bytes:
    return struct.pack("<II16sQII", vps, page, bytes(16), 0, flags, 0)


def region(gpa: int, size: int = MIB, *, offset: int = 0, flags: int = 0, index: int = 0) -> bytes:
    return struct.pack("<QQQII", gpa, size, offset, flags, index)


def table(*regions: bytes) -> bytes:
    return struct.pack("<II", len(regions), 0) + b"".join(regions)


@pytest.fixture
def ram() -> Iterator[int]:
    fd = make_memfd(2 * MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def doorbell() -> Iterator[int]:
    fd = make_eventfd()
    yield fd
    os.close(fd)


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "s"


async def described(peer: Peer) -> None:
    await peer.granted(0x01, hello())
    await peer.granted(0x05, vm_info())


async def attached(peer: Peer, ram: int) -> None:
    await described(peer)
    await peer.granted(0x02, table(region(0)), (ram,))


# -- 11: every errno once, with its number ---------------------------------------------------------


def test_the_table_has_each_errno_once_with_linux_number() -> None:
    section = TEXT.split("## 11. ")[1].split("## 12. ")[0]
    rows = re.findall(r"^\| (\d+) \| (E\w+) \|", section, re.MULTILINE)
    assert len({name for _, name in rows}) == len(rows) > 15
    for number, name in rows:
        assert getattr(errno, name) == int(number), name
    used = set(re.findall(r"`(E[A-Z0-9]+)`", TEXT)) - {"EPROTOTYPE", "ECONNREFUSED"}
    assert used <= {name for _, name in rows}
    # And wherever one is named with its number, it is that one.
    for name, number in re.findall(r"`(E[A-Z0-9]+)` \((\d+)\)", TEXT):
        assert getattr(errno, name) == int(number), name


# -- 3: the order of checks ------------------------------------------------------------------------


async def test_of_several_mistakes_the_first_in_the_list_is_refused(
    address: Path, ram: int, doorbell: int
) -> None:
    async with running_server(address, Bus()) as path:
        peer = Peer(path)
        # 1 type before state; 2 role and state before descriptors.
        assert await peer.refusal(0x0D, b"x", (doorbell,)) == 38
        assert await peer.refusal(0x08) == 71
        assert await peer.refusal(0x13, b"x", (doorbell,)) == 1
        await peer.granted(0x01, hello(features=0))
        assert await peer.refusal(0x13, b"x", (doorbell,)) == 1
        assert await peer.refusal(0x0B, b"x", (doorbell,)) == 71
        # 3 descriptors before length; 5 length before values; 6 values before what they name.
        assert await peer.refusal(0x05, b"x", (doorbell,)) == 22
        assert await peer.refusal(0x05, vm_info(page=1)[:-1]) == 90
        assert await peer.refusal(0x05, vm_info(vps=9, page=1)) == 22
        assert await peer.refusal(0x05, vm_info(vps=9, flags=1)) == 95
        assert await peer.refusal(0x05, vm_info(vps=9)) == 22
        await peer.granted(0x05, vm_info())
        # 3 descriptors before 4 feature before 5 length.
        assert await peer.refusal(0x07, b"x") == 22
        assert await peer.refusal(0x07, b"x", (doorbell,)) == 71
        # 6 before 7 before 9 before 10 before 11.
        both = table(region(0, 1), region(0, index=9))
        assert await peer.refusal(0x02, both, (doorbell,)) == 22
        overlap = table(region(0), region(4096, index=9))
        assert await peer.refusal(0x02, overlap, (doorbell,)) == 17
        assert await peer.refusal(0x02, table(region(0, index=9)), (doorbell,)) == 22
        assert await peer.refusal(0x02, table(region(0, 1 << 41)), (doorbell,)) == 22
        assert await peer.refusal(0x02, table(region(0, 1 << 41)), (ram,)) == 22
        peer.sock.close()


# -- 1, 5.1: places --------------------------------------------------------------------------------


async def test_the_sixty_fifth_hello_is_answered_with_eagain(address: Path) -> None:
    async with running_server(address, Bus()) as path:
        peers = []
        for number in range(65):
            peer = Peer(path)
            peers.append(peer)
            request = hello(name=b"%d" % number)
            if number < 64:
                await peer.granted(0x01, request)
            else:
                assert await peer.refusal(0x01, request) == 11
        peers[7].sock.close()
        with trio.fail_after(PATIENCE):
            while (await peers[64].ask(0x01, hello())).flags != 1:
                await trio.sleep(LOOK)
        for peer in peers:
            peer.sock.close()


async def test_of_more_than_32_silent_connections_the_oldest_is_closed(address: Path) -> None:
    async with running_server(address, Bus()) as path:
        # One after the other: the listener's queue keeps no order of its own.
        peers = []
        for _ in range(33):
            peers.append(Peer(path))
            await trio.testing.wait_all_tasks_blocked()
        assert await peers[0].receive() is None
        for number, peer in enumerate(peers[1:]):
            await peer.granted(0x01, hello(name=b"%d" % number))
        for peer in peers:
            peer.sock.close()


def test_the_times_and_limits_are_those_of_the_text() -> None:
    limits = ServerLimits()
    assert limits.hello_timeout == 10
    assert "says no HELLO in 10 s" in TEXT
    assert limits.idle_timeout == 60
    assert "asks for nothing in 60 s" in TEXT
    assert (limits.max_connections, limits.max_silent) == (64, 32)
    assert (limits.max_regions, limits.max_memory_bytes) == (512, 1 << 40)
    assert "at most 512 regions\n(`ENOSPC`) of 2^40 bytes together (`ENOMEM`)" in TEXT
    assert (limits.write_timeout, limits.reply_timeout, limits.drain_timeout) == (10, 10, 10)
    assert limits.outstanding_requests == 4096
    assert limits.max_vps == 2048


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (hello(low=2, high=3), 93),
        (hello(low=2, high=1), 22),
        (hello(vps=2049), 7),
        (hello(vps=0), 22),
        (hello(role=2), 22),
        (hello(name=b"x" * 256), 90),
        (hello(name=b"\x1b"), 22),
        (hello(name=b"\x7f"), 22),
        (hello(name=b"\xff"), 22),
        (hello()[:-1], 90),
        (b"VMBX" + hello()[4:], 22),
    ],
)
async def test_a_hello_is_refused_with_its_errno(address: Path, request_: bytes, code: int) -> None:
    async with running_server(address, Bus()) as path:
        peer = Peer(path)
        assert await peer.refusal(0x01, request_) == code
        await peer.granted(0x01, hello(vps=2048, name=b"x" * 255))
        peer.sock.close()


async def test_hello_is_answered_with_the_numbers_of_the_text(address: Path) -> None:
    async with running_server(address, Bus()) as path:
        peer = Peer(path)
        answer = await peer.granted(0x01, hello(high=9, features=0xFFFF))
        magic, version, fds, features, payload, credits_, _ = struct.unpack_from("<IHHQIHH", answer)
        assert (magic, version, fds, features, payload) == (0x55424D56, 1, 64, 7, 32768)
        assert credits_ >= 1
        peer.sock.close()


# -- 5.2 to 5.4: memory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "code"),
    [
        (region(1), 22),
        (region(0, 0), 22),
        (region(0, 4097), 22),
        (region(0, offset=1), 22),
        (region((1 << 52) - MIB + 4096), 22),
        (region(0, flags=2), 22),
        (region(0, index=1), 22),
        (region(1 << 30, 2 * MIB, offset=4096), 22),
        (region(MIB // 2), 17),
        (region(1 << 30)[:-1], 90),
    ],
)
async def test_a_region_is_refused_with_its_errno(
    address: Path, ram: int, one: bytes, code: int
) -> None:
    async with running_server(address, Bus()) as path:
        peer = Peer(path)
        await attached(peer, ram)
        assert await peer.refusal(0x03, one, (ram,)) == code
        await peer.granted(0x03, region((1 << 52) - MIB), (ram,))
        assert await peer.refusal(0x04, struct.pack("<QQ", 1 << 40, MIB)) == 2
        await peer.granted(0x04, struct.pack("<QQ", (1 << 52) - MIB, MIB))
        peer.sock.close()


async def test_the_513th_region_is_one_too_many(address: Path, ram: int) -> None:
    async with running_server(address, Bus()) as path:
        peer = Peer(path)
        await described(peer)
        full = [region(number << 21) for number in range(64)]
        assert await peer.refusal(0x02, table(*full, region(1 << 40)), (ram,)) == 22
        await peer.granted(0x02, table(*full), (ram,))
        for number in range(64, 512):
            await peer.granted(0x03, region(number << 21), (ram,))
        assert await peer.refusal(0x03, region(1 << 40), (ram,)) == 28
        peer.sock.close()


async def test_a_memfd_of_huge_pages_is_as_good_as_any(address: Path, ram: int) -> None:
    import fcntl

    free = (Path("/sys/kernel/mm/hugepages/hugepages-2048kB") / "free_hugepages").read_text()
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    os.ftruncate(fd, 2 * MIB)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    async with running_server(address, Bus()) as path:
        peer = Peer(path)
        await attached(peer, ram)
        reply = await peer.ask(0x03, region(1 << 30, 2 * MIB), (fd,))
        # Pages are reserved when it is mapped.
        assert reply.flags == 1 if int(free) else reply.errno == 12
        peer.sock.close()
    os.close(fd)


# -- 5.6, 5.7, 5.12 --------------------------------------------------------------------------------


async def test_what_names_a_vp_or_a_sint_that_is_not_there_is_refused(
    address: Path, ram: int, doorbell: int
) -> None:
    async with running_server(address, Bus()) as path:
        peer = Peer(path)
        await described(peer)
        state = struct.pack("<IIQQQQ", 2, 0, 1, 0, 0, 0)
        assert await peer.refusal(0x06, state) == 22
        assert await peer.refusal(0x07, struct.pack("<II", 2, 2), (doorbell,)) == 22
        assert await peer.refusal(0x07, struct.pack("<II", 0, 3), (doorbell,)) == 22
        assert await peer.refusal(0x07, struct.pack("<II", 0, 2), (ram,)) == 22
        await peer.granted(0x07, struct.pack("<II", 1, 2), (doorbell,))
        assert await peer.refusal(0x0F, b"") == 90
        assert await peer.refusal(0x0F, b"x" * 65) == 90
        assert await peer.refusal(0x0F, b"x" * 64) == 38
        peer.sock.close()
