"""The guest's side of two rings, for tests: small, page by page, and checking the host.

Written from the rules of the rings alone and shares nothing with the package under test.

* Control page words: write index at byte 0, read index 4, interrupt mask 8, pending send size 12,
  feature bits 64. Data follows in pages; indices are byte offsets into it, multiples of 8.
* A packet is {type u16, data offset / 8 u16, length / 8 u16, flags u16, id u64}, a body, and 8
  bytes {0 u32, index where the packet began u32}.
* The writer leaves at least one byte free. It signals if the ring was empty before and the
  reader's mask is 0.
* The reader signals if the writer waits for room and the free space has just passed what it waits
  for, strictly: Linux compares with "more than".

As a program it is the guest of the two-process test; see :class:`Guest`.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import struct
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

PAGE = 4096
IN_BAND, COMPLETION = 6, 11
WANTS_COMPLETION = 1
HEAD = struct.Struct("<HHHHQ")
TAIL = struct.Struct("<II")
WRITE, READ, MASK, PENDING, FEATURES = 0, 1, 2, 3, 16


class PeerError(AssertionError):
    """The other side did something that no reader or writer of a ring may do."""


class Got(NamedTuple):
    """One packet as the guest sees it."""

    kind: int
    flags: int
    ident: int
    header: bytes
    payload: bytes


_mutex = threading.Lock()


def barrier() -> None:
    """Order stores before loads: a lock is a locked instruction on x86-64."""
    with _mutex:
        pass


def packet(kind: int, payload: bytes, ident: int = 0, flags: int = 0) -> bytes:
    """Return a packet without its trailer."""
    length = 2 + (len(payload) + 7) // 8
    return HEAD.pack(kind, 2, length, flags, ident) + payload + bytes(-len(payload) % 8)


class PeerRing:
    """One ring as a control page and a list of data pages."""

    def __init__(self, pages: Sequence[memoryview]) -> None:
        self.control = pages[0].cast("I")
        self.pages = pages[1:]
        self.size = len(self.pages) * PAGE

    def copy_out(self, offset: int, length: int) -> bytes:
        data = b""
        while len(data) < length:
            page, start = divmod((offset + len(data)) % self.size, PAGE)
            data += self.pages[page][start : start + length - len(data)]
        return data

    def copy_in(self, offset: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            page, start = divmod((offset + done) % self.size, PAGE)
            piece = data[done : done + PAGE - start]
            self.pages[page][start : start + len(piece)] = piece
            done += len(piece)

    def index(self, word: int) -> int:
        """Read an index of the other side; it has to be possible."""
        value = self.control[word]
        if value % 8 or value >= self.size:
            raise PeerError(f"torn or impossible index {value:#x} in a ring of {self.size:#x}")
        return value

    def release(self) -> None:
        self.control.release()
        for page in self.pages:
            page.release()


class PeerWriter:
    """The guest writes here."""

    def __init__(self, ring: PeerRing) -> None:
        self.ring = ring
        self.position = ring.control[WRITE]

    def free(self) -> int:
        """Bytes free, of which one has to stay free."""
        return self.ring.size - (self.position - self.ring.index(READ)) % self.ring.size

    def put(self, packets: Sequence[bytes]) -> tuple[int, bool]:
        """Write what fits; return how many packets that were, and whether to signal."""
        before = self.position
        room = self.free()
        data = b""
        count = 0
        for each in packets:
            if len(data) + len(each) + 8 >= room:
                break
            data += each + TAIL.pack(0, (before + len(data)) % self.ring.size)
            count += 1
        if not count:
            return 0, False
        self.ring.copy_in(before, data)
        self.position = (before + len(data)) % self.ring.size
        self.ring.control[WRITE] = self.position
        barrier()
        if self.ring.control[MASK]:
            return count, False
        return count, self.ring.index(READ) == before

    def ask_for_room(self, size: int) -> bool:
        """Ask to be signalled when more than ``size`` bytes are free; True if they are now."""
        self.ring.control[PENDING] = size
        barrier()
        return self.free() > size

    def ask_no_more(self) -> None:
        self.ring.control[PENDING] = 0


class PeerReader:
    """The guest reads here."""

    def __init__(self, ring: PeerRing) -> None:
        self.ring = ring
        self.position = ring.control[READ]

    def has_data(self) -> bool:
        return self.ring.index(WRITE) != self.position

    def take(self, limit: int = 1 << 30) -> list[Got]:
        """Read up to ``limit`` packets without saying so; see :meth:`done`."""
        ring = self.ring
        there = (ring.index(WRITE) - self.position) % ring.size
        found: list[Got] = []
        while there and len(found) < limit:
            if there < 24:
                raise PeerError(f"{there} bytes cannot be a packet")
            kind, offset, length, flags, ident = HEAD.unpack(ring.copy_out(self.position, 16))
            size = length * 8
            if not 2 <= offset <= length or size + 8 > there:
                raise PeerError(f"packet of {size} bytes, offset {offset * 8}, {there} are there")
            body = ring.copy_out((self.position + 16) % ring.size, size - 16)
            zero, start = TAIL.unpack(ring.copy_out((self.position + size) % ring.size, 8))
            if (zero, start) != (0, self.position):
                raise PeerError(f"trailer says {start:#x}, packet began at {self.position:#x}")
            split = offset * 8 - 16
            found.append(Got(kind, flags, ident, body[:split], body[split:]))
            self.position = (self.position + size + 8) % ring.size
            there -= size + 8
        return found

    def done(self) -> bool:
        """Give back the room of what was taken; return whether to signal a waiting writer."""
        ring = self.ring
        old = ring.control[READ]
        taken = (self.position - old) % ring.size
        ring.control[READ] = self.position
        barrier()
        if not ring.control[FEATURES] & 1:
            return False
        wanted = ring.control[PENDING]
        free = ring.size - (ring.index(WRITE) - self.position) % ring.size
        return wanted != 0 and free > wanted >= free - taken

    def mask(self) -> None:
        self.ring.control[MASK] = 1

    def unmask(self) -> bool:
        """Want signals again; True if there is something to read already."""
        self.ring.control[MASK] = 0
        barrier()
        return self.has_data()


# -- the guest of the two-process test -------------------------------------------------------------


def payload_for(number: int, rng: random.Random, longest: int) -> bytes:
    """Return a payload that tells whether it is whole: number, length, CRC, filling."""
    size = rng.randrange(longest - 11)
    filling = rng.randbytes(size)
    return struct.pack("<IHHI", number, size, 0, zlib.crc32(filling, number)) + filling


def check_payload(payload: bytes) -> int:
    """Return the number of a payload. Raises PeerError if a byte of it is wrong."""
    number: int
    number, size, _zero, crc = struct.unpack_from("<IHHI", payload)
    filling = payload[12 : 12 + size]
    if len(filling) != size or zlib.crc32(filling, number) != crc:
        raise PeerError(f"payload of packet {number} is damaged")
    if any(payload[12 + size :]):
        raise PeerError(f"padding of packet {number} is not zero")
    return number


class Sleeper:
    """Sleeps on an eventfd, and tells a missing signal from a slow peer.

    ``stuck()`` says whether there is work that the other side should have signalled. If it says so
    at the end of two waits in a row, of ``patience`` seconds each, with nothing moving in between,
    a wake-up was lost: at the first one the other side may have been about to signal.
    """

    def __init__(self, fd: int, patience: float, peer_lives: Callable[[], bool]) -> None:
        self.fd = fd
        self.patience = patience
        self.peer_lives = peer_lives
        self.sleeps = 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def sleep(self, stuck: Callable[[], bool], state: Callable[[], object]) -> None:
        self.sleeps += 1
        suspicion = None
        while not self._poll.poll(self.patience * 1000):
            now = state() if stuck() else None
            if now is not None and now == suspicion:
                raise PeerError(f"lost wake-up: asleep beside work, {now}")
            suspicion = now
            if not self.peer_lives():
                raise PeerError("the other process is gone")
        os.eventfd_read(self.fd)


def views_of(mapping: mmap.mmap, first: int, count: int) -> list[memoryview]:
    whole = memoryview(mapping)
    return [whole[n * PAGE : (n + 1) * PAGE] for n in range(first, first + count)]


class Guest:
    """Sends ``packets`` packets in bursts; those that ask for it have to be answered, in order.

    In some bursts only the last packet asks: nothing but the signal for room then wakes a guest
    whose burst is longer than the ring.

    Args:
        options: ``memory``, ``bell`` and ``host_bell`` are descriptors; ``out_pages`` and
            ``in_pages`` the sizes of the rings, control pages included; ``longest`` the longest
            payload in bytes; ``patience`` seconds; ``seed``.
    """

    def __init__(self, options: dict[str, int]) -> None:
        self.rng = random.Random(options["seed"])
        self.mapping = mmap.mmap(options["memory"], 0)
        pages = options["out_pages"]
        self.writer = PeerWriter(PeerRing(views_of(self.mapping, 0, pages)))
        self.reader = PeerReader(PeerRing(views_of(self.mapping, pages, options["in_pages"])))
        parent = os.getppid()
        self.sleeper = Sleeper(options["bell"], options["patience"], lambda: os.getppid() == parent)
        self.host_bell = options["host_bell"]
        self.total = options["packets"]
        self.longest = options["longest"]
        self.pending: deque[bytes] = deque()
        self.expected: deque[int] = deque()
        self.sent = self.answered = self.signals = self.blocked = self.wanted = 0
        self.threshold = 0

    def run(self) -> dict[str, int]:
        self.reader.mask()
        while self.sent < self.total or self.expected:
            if not self.send() + self.receive():
                self.rest()
        return {
            "sent": self.sent,
            "answered": self.answered,
            "signals": self.signals,
            "sleeps": self.sleeper.sleeps,
            "blocked": self.blocked,
        }

    def signal(self) -> None:
        self.signals += 1
        os.eventfd_write(self.host_bell, 1)

    def send(self) -> int:
        rng = self.rng
        if not self.pending and len(self.expected) <= self.threshold:
            burst = min(rng.choice((1, 1, 2, 7, 40, 300)), self.total - self.sent)
            every = rng.choice((1, 1, 3, burst or 1))
            for left in reversed(range(burst)):
                flags = 0 if left % every else WANTS_COMPLETION
                if flags:
                    self.expected.append(self.sent)
                payload = payload_for(self.sent, rng, self.longest)
                self.pending.append(packet(IN_BAND, payload, self.sent, flags))
                self.sent += 1
            self.threshold = rng.choice((0, 0, 5, 100))
        count, signal = self.writer.put(tuple(self.pending))
        for _ in range(count):
            self.pending.popleft()
        if signal:
            self.signal()
        return count

    def receive(self) -> int:
        got = self.reader.take(self.rng.choice((1, 10, 1000)))
        for each in got:
            number = self.expected.popleft() if self.expected else -1
            if each.kind != COMPLETION or each.ident != number or each.flags:
                raise PeerError(f"expected the completion of {number}, got {each}")
            if check_payload(each.payload) != number:
                raise PeerError(f"completion {number} has the payload of another")
            self.answered += 1
        if got and self.reader.done():
            self.signal()
        return len(got)

    def rest(self) -> None:
        """Sleep, unless something comes while we say so."""
        if not self.reader.unmask():
            self.wanted = len(self.pending[0]) + 8 if self.pending else 0
            if not self.wanted or not self.writer.ask_for_room(self.wanted):
                self.blocked += bool(self.wanted)
                self.sleeper.sleep(self.is_stuck, self.state)
            self.writer.ask_no_more()
        self.reader.mask()

    def is_stuck(self) -> bool:
        return self.reader.has_data() or bool(self.wanted and self.writer.free() > self.wanted)

    def state(self) -> object:
        return self.sent, self.answered, self.writer.free(), self.reader.ring.control[WRITE]


if __name__ == "__main__":
    print(json.dumps(Guest(json.loads(sys.argv[1])).run()))
