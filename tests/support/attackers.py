"""VMMs and guests that do their worst, each in a thread, for tests and benchmarks of neighbours."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from tests.support.attach import HELLO, INFO, RAM_SIZE, TABLE, make_memfd
from tests.support.house import ROOT
from tests.support.patience import LOOK, PATIENCE
from vmbus.attach.protocol.framing import pack_frame
from vmbus.attach.protocol.limits import Role
from vmbus.attach.protocol.messages import Number
from vmbus.attach.protocol.to_server import Hello, MemoryRegion

HIGH = 1 << 40


class Attack:
    """What is going on.

    Args:
        path: The socket for VMMs.
        step: One round of the attack.
    """

    def __init__(self, path: str, step: Callable[[Attack], None]) -> None:
        self.path = path
        self.rounds = 0
        """How often it was done; it goes on growing."""
        self.open = contextlib.ExitStack()
        """What the attacker keeps."""
        self.kept: list[socket.socket] = []
        self._step = step
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attacker")

    @contextlib.contextmanager
    def under_way(self) -> Iterator[Attack]:
        """Attack for the length of the block."""
        with self.open:
            self._thread.start()
            try:
                yield self
            finally:
                self._over.set()
                self._thread.join()
                for sock in self.kept:
                    sock.close()

    def _run(self) -> None:
        while not self._over.is_set():
            # The server hangs up on those who behave like that.
            with contextlib.suppress(OSError):
                self._step(self)
            self.rounds += 1
            self._over.wait(LOOK)

    def is_beyond(self, rounds: int) -> bool:
        """Whether it has gone on since."""
        return self.rounds > rounds

    def connect(self, keep: int = 8) -> socket.socket:
        """Come as a VMM; of the connections, the last few stay."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kept.append(sock)
        while len(self.kept) > keep:
            self.kept.pop(0).close()
        sock.settimeout(PATIENCE)
        sock.connect(self.path)
        return sock


def send(sock: socket.socket, kind: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([pack_frame(kind, 0, 1, payload, len(fds))], rights)


def lingering(attack: Attack) -> None:
    """Sockets whose closing takes seconds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        attack.open.enter_context(listener.accept()[0])
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 2))
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(bytes(1 << 16))
    client.setblocking(True)
    try:
        send(attack.connect(), Number.HELLO, HELLO.encode(), [client.fileno()])
    finally:
        # The last close is to be the server's.
        os.close(client.detach())


def strange(attack: Attack) -> None:
    """Pipes, directories and sockets where memory should be."""
    read, write = os.pipe()
    folder = os.open("/", os.O_PATH)
    try:
        sock = attack.connect()
        send(sock, Number.HELLO, HELLO.encode())
        for fd in (read, write, folder, sock.fileno()):
            send(sock, Number.SET_MEM_TABLE, TABLE.encode(), [fd])
    finally:
        for fd in (read, write, folder):
            os.close(fd)


def attached(attack: Attack) -> socket.socket:
    """A VMM whose memory is known."""
    sock = attack.connect()
    send(sock, Number.HELLO, HELLO.encode())
    send(sock, Number.VM_INFO, INFO.encode())
    fd = make_memfd()
    try:
        send(sock, Number.SET_MEM_TABLE, TABLE.encode(), [fd])
    finally:
        os.close(fd)
    return sock


def _regions(attack: Attack, size: int, count: int) -> None:
    sock = attached(attack)
    fd = make_memfd(size)
    try:
        for index in range(count):
            region = MemoryRegion(HIGH + index * size, size, 0, 0, 0)
            send(sock, Number.ADD_MEM, region.encode(), [fd])
    finally:
        os.close(fd)


def sparse(attack: Attack) -> None:
    """Memory by the terabyte."""
    _regions(attack, 1 << 40, 64)


def endless_memory(attack: Attack) -> None:
    """Regions without end."""
    _regions(attack, RAM_SIZE, 3000)


def silent(attack: Attack) -> None:
    """Many who say nothing."""
    attack.connect(keep=100)


def storm(attack: Attack) -> None:
    """Many who come and go."""
    for _ in range(20):
        attack.connect(keep=0)


def tiny(attack: Attack) -> None:
    """Frames of nothing, many, and no answer is read."""
    sock = attack.connect()
    send(sock, Number.HELLO, HELLO.encode())
    sock.setblocking(False)
    for _ in range(20_000):
        send(sock, Number.QUERY)


def noise(attack: Attack) -> None:
    """Whatever makes a line in a log."""
    for payload in (b"", b"x" * 100, Hello(1, 1, 0, 1, Role.OPERATOR, "me").encode()):
        sock = attack.connect()
        for _ in range(100):
            send(sock, Number.HELLO, payload)


def silent_file(path: str, attack: Attack) -> None:
    """A file where memory should be, of a file system that does not answer the server."""
    sock = attack.connect()
    fd = os.open(path, os.O_RDWR)
    try:
        send(sock, Number.HELLO, HELLO.encode())
        send(sock, Number.VM_INFO, INFO.encode())
        send(sock, Number.SET_MEM_TABLE, TABLE.encode(), [fd])
    finally:
        os.close(fd)


WORST: dict[str, Callable[[Attack], None]] = {
    "a VMM whose sockets linger": lingering,
    "a VMM with strange descriptors": strange,
    "a VMM with sparse terabytes": sparse,
    "a VMM that adds memory without end": endless_memory,
    "silent connections": silent,
    "a storm of connections": storm,
    "a VMM with tiny frames": tiny,
    "a VMM that fills the log": noise,
}
"""Attackers by what they are."""


GUEST = """
import dataclasses, os, sys
import trio
from storvsp.guest import attach, scan
from storvsp.guest.habits import LINUX
from storvsp.wire import DATA_IN, build_srb
from vmbus.attach.client.machine import attach_machine
from vmbus.guest import LINUX_6_1, boot
from vmbus.partition.soft_machine import SoftMachine
from vmbus.wire.gpa import build_range
from vmbus.wire.packets import GPA_DIRECT

path, name, what = sys.argv[1:]
made, make = [], os.eventfd
os.eventfd = lambda *what: made.append(make(*what)) or made[-1]

def fill():
    # Full counters that nobody reads, and O_NONBLOCK, which both ends share, is gone.
    os.eventfd_read = lambda _: 1
    for fd in made:
        try:
            os.write(fd, ((1 << 64) - 2).to_bytes(8, "little"))
        except BlockingIOError:
            os.read(fd, 8)
            os.write(fd, ((1 << 64) - 2).to_bytes(8, "little"))
        os.set_blocking(fd, True)

async def greedy(disk):
    while True:
        await disk.read(0, 2048)

async def lists(channel):
    # 65 000 pages, no two of them neighbours, for 2 MiB and for more than there may be; the command
    # moves none of it, since some of the pages are this guest's own.
    pfns = [2 * index % 16000 for index in range(65_000)]
    size = 65_000 * 4096
    header = bytes(4) + (1).to_bytes(4, "little") + build_range(size, 0, pfns)
    while True:
        for length in (2 << 20, size):
            srb = build_srb(bytes(6), data_in=DATA_IN, transfer_length=length)
            await channel.request(srb, kind=GPA_DIRECT, header=header)

async def main():
    machine = SoftMachine([(0, 128 << 20)])
    async with attach_machine(machine, path, name=name), boot(machine, LINUX_6_1) as guest:
        (offer, *_) = await guest.connection.connect()
        habits = dataclasses.replace(LINUX, ring_pages=270) if what == "lists" else LINUX
        adapter = await attach(guest, offer, habits=habits, sub_channels=15)
        disks = await scan(adapter)
        print("ready", flush=True)
        async with trio.open_nursery() as nursery:
            if what == "full":
                fill()
            if what == "lists":
                for channel in adapter.channels:
                    nursery.start_soon(lists, channel)
            for _ in range(64 if what in ("greedy", "full") else 0):
                nursery.start_soon(greedy, disks[0])
            await trio.sleep_forever()

trio.run(main)
"""


@contextlib.contextmanager
def guest_process(path: str, name: str, what: str) -> Iterator[subprocess.Popen[str]]:
    """A guest in a process of its own: ``greedy``, ``idle``, with the longest ``lists`` of pages on
    16 channels, or with eventfds that are ``full`` and wait."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'devices'}"}
    with subprocess.Popen(
        [sys.executable, "-c", GUEST, path, name, what],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
