"""How long to look for packets before sleeping.

A guest that has one request under way at a time sends the next one a few microseconds after the
answer. Sleeping in between costs more than that: a doorbell is an exit of the guest, an interrupt
of a processor that sleeps, a wake-up of the loop. So the host looks on for a little while, with the
ring's interrupt mask set, and the guest rings nothing.

How long is learnt from how long the last waits were, as KVM does when a processor is idle
(linux/virt/kvm/kvm_main.c, halt_poll_ns): the window grows while sleeps turn out to be short, and
is given up after a long one. A channel that is idle, or slow, costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from vmbus.ring import RingReader

DEFAULT_LONGEST = 200e-6
"""Seconds; what KVM allows a processor to look on for."""
FIRST = 10e-6
"""Seconds of the window that is tried first."""
WORTH_TURNS = 64
"""Turns of the loop that a sleep and what it takes to wake up again are worth: about
:data:`DEFAULT_LONGEST` on a fast machine, whose turn takes 3 us."""
LONGEST_OF_ALL = 5e-3
"""Seconds, on whichever machine."""
LOOKS = 100
"""At a ring, between two turns of others: 2 us, nearly as long as such a turn takes if nobody wants
it."""


async def longest_worth_while(samples: int = 32) -> float:
    """Return how many seconds to look on at most, on this machine. A checkpoint, many times.

    A sleep costs more on a slow machine, an emulated one above all, as everything does.

    Args:
        samples: Turns of the loop to measure; their median counts.
    """
    turns = []
    for _ in range(samples):
        start = time.perf_counter()
        await trio.lowlevel.checkpoint()
        turns.append(time.perf_counter() - start)
    longest = WORTH_TURNS * sorted(turns)[samples // 2]
    return min(max(longest, DEFAULT_LONGEST), LONGEST_OF_ALL)


class Lookout:
    """The window of one channel.

    Args:
        longest: Seconds the window may have; 0 for never looking on.
    """

    __slots__ = ("longest", "window")

    def __init__(self, longest: float = DEFAULT_LONGEST) -> None:
        self.longest = longest
        self.window = 0.0
        """Seconds to look on before the next sleep."""

    async def look(self, reader: RingReader, stopped: Callable[[], bool]) -> bool:
        """Look for packets for as long as the window says. Is a checkpoint.

        The guest has been asked not to signal. Other tasks get their turn between two looks.

        Args:
            reader: Where packets come in.
            stopped: Whether there is something else to see to; its rings may be gone then.

        Returns:
            True if there are packets, or something else.
        """
        end = time.perf_counter() + self.window
        while time.perf_counter() < end:
            await trio.lowlevel.checkpoint()
            if stopped() or reader.look_for_data(LOOKS):
                return True
        return False

    def slept(self, seconds: float) -> None:
        """Learn from a wait that ended in a sleep.

        Args:
            seconds: From the last packet to the next, sleep included.
        """
        if seconds > self.longest:
            self.window = 0.0
        elif self.window < self.longest:
            self.window = min(max(self.window * 2, FIRST), self.longest)
