"""Two processes, one pair of rings, real sleeping: no wake-up is lost and no index is torn.

The other process (tests/support/ring_peer.py) is the guest; this one is the host. Either side
sleeps on an eventfd whenever it has nothing to do, and is woken by nothing but the signals that the
rules ask for. Every payload carries a checksum, every index is checked by whoever reads it, and a
side that would sleep beside work says so and fails.

``VMBUS_STRESS=N`` adds a run of N million packets per shape.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections import deque

import pytest

from tests.support.house import ROOT
from tests.support.patience import PATIENCE
from tests.support.ring_peer import Sleeper, check_payload
from vmbus.memory import PAGE_SIZE, GuestMemory, create_memfd
from vmbus.ring import RingMemory, RingReader, RingWriter, completion
from vmbus.wire.packets import IN_BAND

ASLEEP = PATIENCE / 4
"""Seconds of sleep beside work, twice in a row, that count as a lost wake-up."""
MILLIONS = int(os.environ.get("VMBUS_STRESS", "0"))
REPOSITORY = ROOT

# Pages of the incoming and the outgoing ring with their control pages, and the longest payload.
SHAPES = {
    "small": (2, 2, 60),
    "narrow out": (9, 2, 200),
    "narrow in": (2, 9, 200),
    "large": (65, 65, 1500),
    "packets as long as the ring": (3, 3, 8000),
}


class Host:
    """Answers each packet that asks for it with its own payload."""

    def __init__(self, memory: GuestMemory, in_pages: int, out_pages: int) -> None:
        self.reader = RingReader(RingMemory(memory, range(in_pages)))
        self.writer = RingWriter(RingMemory(memory, range(in_pages, in_pages + out_pages)))
        self.bell = os.eventfd(0, os.EFD_CLOEXEC)
        self.guest_bell = os.eventfd(0, os.EFD_CLOEXEC)
        self.guest: subprocess.Popen[str] | None = None
        self.sleeper = Sleeper(self.bell, ASLEEP, self.guest_lives)
        self.queue: deque[bytes] = deque()
        self.rng = random.Random(1)
        self.served = 0
        self.wanted = 0

    def run(self, total: int) -> None:
        while self.served < total or self.queue:
            if not self.read() + self.write():
                self.rest()

    def read(self) -> int:
        # A device may bound what it has in hand; the ring then stays full for a while.
        if len(self.queue) > 400:
            return 0
        packets = self.reader.read_batch_untrusted(self.rng.choice((1, 16, 256)))
        for packet in packets:
            assert (packet.kind, packet.transaction_id) == (IN_BAND, self.served)
            assert check_payload(packet.payload) == self.served
            self.served += 1
            if packet.wants_completion:
                self.queue.append(completion(packet.transaction_id, packet.payload))
        if self.reader.commit():
            os.eventfd_write(self.guest_bell, 1)
        return len(packets)

    def write(self) -> int:
        count, signal = self.writer.write_batch_untrusted(tuple(self.queue))
        for _ in range(count):
            self.queue.popleft()
        if signal:
            os.eventfd_write(self.guest_bell, 1)
        return count

    def rest(self) -> None:
        if self.reader.unmask() and len(self.queue) <= 400:
            self.reader.mask()
            return
        self.wanted = len(self.queue[0]) + 8 if self.queue else 0
        if not self.wanted or not self.writer.wait_for_room(self.wanted):
            self.sleeper.sleep(self.is_stuck, self.state)
        if self.wanted:
            self.writer.stop_waiting()
        self.reader.mask()

    def guest_lives(self) -> bool:
        return self.guest is not None and self.guest.poll() is None

    def is_stuck(self) -> bool:
        reading = len(self.queue) <= 400 and self.reader.has_data()
        return reading or bool(self.wanted and self.writer.free_untrusted() >= self.wanted)

    def state(self) -> object:
        return self.served, len(self.queue), self.reader.available(), self.writer.occupied()


def run(shape: str, packets: int, start: int) -> dict[str, int]:
    in_pages, out_pages, longest = SHAPES[shape]
    size = (in_pages + out_pages) * PAGE_SIZE
    fd = create_memfd("rings", size)
    memory = GuestMemory()
    memory.add_region(0, size, fd)
    # Both rings are empty at the same, arbitrary place: long runs wrap everywhere anyway.
    for page in (0, in_pages):
        control = memory.page(page).cast("I")
        control[0] = control[1] = start
        control.release()
    host = Host(memory, in_pages, out_pages)
    options = {
        "memory": fd,
        "bell": host.guest_bell,
        "host_bell": host.bell,
        "out_pages": in_pages,
        "in_pages": out_pages,
        "packets": packets,
        "longest": longest,
        "patience": ASLEEP,
        "seed": packets,
    }
    command = [sys.executable, "-m", "tests.support.ring_peer", json.dumps(options)]
    with contextlib.ExitStack() as stack:
        for each in (fd, host.bell, host.guest_bell):
            stack.callback(os.close, each)
        guest = stack.enter_context(
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                pass_fds=(fd, host.bell, host.guest_bell),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        host.guest = guest
        try:
            host.run(packets)
        except BaseException as error:
            guest.kill()
            error.add_note(f"the guest says: {guest.communicate()[1]}")
            raise
        output, errors = guest.communicate(timeout=PATIENCE)
        assert guest.returncode == 0, errors
    assert not host.reader.has_data()
    host.reader.ring.release()
    host.writer.ring.release()
    memory.close()
    assert memory.drained()
    found: dict[str, int] = json.loads(output)
    assert found["sent"] == packets
    return found


SHORT = {
    "small": 120_000,
    "narrow out": 60_000,
    "narrow in": 60_000,
    "large": 10_000,
    "packets as long as the ring": 20_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_no_wake_up_is_lost_between_two_processes(shape):
    """Checklist rows 8, 9 and 10; about 450 000 packets in all."""
    run(shape, SHORT[shape], start=4096 - 24)


@pytest.mark.slow
@pytest.mark.skipif(not MILLIONS, reason="asks for VMBUS_STRESS=<millions of packets>")
@pytest.mark.parametrize("shape", SHAPES)
def test_no_wake_up_is_lost_in_millions_of_packets(shape):
    print(shape, run(shape, MILLIONS * 500_000, start=8))
