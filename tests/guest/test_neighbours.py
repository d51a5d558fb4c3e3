"""Guests on one server mind their own business: one dies, again and again; the other works on."""

from __future__ import annotations

import os
import random
import secrets

import pytest

from tests.guest.conftest import Lab, Server
from tests.guest.rig.guest import Guest, until
from tests.support.patience import LONG_TEST

ROUNDS = 50 if os.environ.get("VMBUS_LONG") else 5
MEMORY = "192M"
GROWTH = 24 << 20
"""Bytes that the server may grow by over all rounds: far less than what a guest has of memory and
disk, so that even one that is not let go shows."""

WORK = """
(
    count=0
    while [ ! -e /run/stop ]; do
        at=$((count % 64))
        dd if=/dev/urandom of=/run/new bs=64k count=1 2>/dev/null &&
            dd if=/run/new of=/dev/$name bs=64k seek=$at conv=notrunc,fsync 2>/dev/null &&
            dd if=/dev/$name bs=64k skip=$at count=1 iflag=direct 2>/dev/null | cmp - /run/new ||
            { echo "pass $count" >/run/failed; exit 1; }
        count=$((count + 1))
        echo $count >/run/count.new && mv /run/count.new /run/count
    done
    touch /run/stopped
) >/run/work.log 2>&1 &
"""
"""Writes and verifies for ever, and counts."""
LOAD = "while :; do dd if=/dev/urandom of=/dev/$name bs=64k count=16 conv=fsync 2>/dev/null; done"


class Worker:
    """The guest that works."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        guest.run(f"name={guest.disk(0)}; {WORK}")

    def count(self) -> int:
        """Return how often it has written and verified; it must not have found a mistake."""
        code, text = self.guest.attempt("cat /run/failed /run/work.log 2>/dev/null; cat /run/count")
        words = text.split()
        assert code or len(words) == 1, f"the neighbour has trouble: {text}"
        return 0 if code else int(words[0])

    def wait_beyond(self, count: int) -> int:
        """Wait until it has gone on from there. Returns where it is."""
        reached = count

        def further() -> bool:
            nonlocal reached
            reached = self.count()
            return reached > count

        until(further, what="the neighbour's next pass")
        return reached

    def finish(self) -> None:
        """Have it stop after its present pass."""
        self.guest.run("touch /run/stop; while [ ! -e /run/stopped ]; do usleep 50000; done")


def packets(server: Server, name: str) -> int:
    """Return how many packets a guest has sent on its channels."""
    guests = {guest["name"]: guest for guest in server.guests()}
    return sum(channel["packets_in"] for channel in guests.get(name, {}).get("channels", ()))


def resident(server: Server) -> int:
    """Return how much memory the server uses, in bytes."""
    from vmbus.cli.client import ask_guests

    size: int = ask_guests(server.socket)["rss"]
    return size


@pytest.mark.timeout(LONG_TEST)
def test_a_neighbours_sudden_death_stops_nobody(lab: Lab):
    seed = int(os.environ.get("VMBUS_SEED") or secrets.randbits(32))
    print(f"VMBUS_SEED={seed}")
    chance = random.Random(seed)
    server = lab.serve("ram:[lun=0]8M")
    worker = Worker(lab.boot(server, "--name=worker", memory=MEMORY))
    reached = worker.wait_beyond(0)
    sizes = []
    messages = 0

    for number in range(ROUNDS):
        name = f"victim{number}"
        # Moments are counted in what the victim has said, so that no machine is too fast or slow:
        # in the first round it lives until it works; then it dies while it comes up, or at work.
        early = number > 0 and chance.random() < 0.5
        victim = lab.boot(server, f"--name={name}", memory=MEMORY, ready=not early)
        if early:
            moment = chance.randint(1, messages)
            until(lambda n=name, m=moment: len(server.account(n)) >= m, what=f"message {moment}")
        else:
            victim.begin(f"name={victim.disk(0)}; {LOAD}")
            messages = messages or len(server.account(name))
            moment = packets(server, name) + chance.randint(1, 60)
            until(lambda n=name, m=moment: packets(server, n) >= m, what=f"packet {moment}")
        victim.kill()

        until(
            lambda: [guest["name"] for guest in server.guests()] == ["worker"],
            what=f"the end of {name}",
        )
        reached = worker.wait_beyond(reached)
        assert server.guests()[0]["faults"] == 0
        sizes.append(resident(server))

    print(f"server's memory after each round, KiB: {[size >> 10 for size in sizes]}")
    assert sizes[-1] - sizes[0] < GROWTH, sizes
    worker.finish()
    assert worker.count() >= reached
    worker.guest.check_log()
    worker.guest.power_off()
    server.stop()
