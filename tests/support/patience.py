"""The only clock of the tests: how long they wait for what has to come.

A test waits for the event itself. So that one which never comes does not stop everything, each wait
ends after :data:`PATIENCE`, which is many times what the slowest machine needs; a test that gets
there has found a hang, not a slow machine. ``VMBUS_TEST_PATIENCE`` sets it, in seconds, for a
machine that is slower still (an emulated one, say).

That nothing happens is shown by something later that does happen, or by a loop without anything
left to do (``trio.testing.wait_all_tasks_blocked``), and what takes long by trio's ``MockClock``
(the fixture ``autojump_clock``), in which a minute passes at once. ``tests/test_house_rules.py``
lets no other clock in.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable

import trio
import trio.testing

PATIENCE = float(os.environ.get("VMBUS_TEST_PATIENCE", "300"))
"""Seconds; nothing is decided by it but that a test hangs."""

WHOLE_TEST = 2 * PATIENCE
"""Seconds for one test, if it says nothing else."""

LONG_TEST = 12 * PATIENCE
"""Seconds for a test with a real kernel as its guest, which may be emulated twice over."""

SOON = 0.05
"""Seconds: a time limit of the code under test that is meant to run out. It is given only where
nothing has to happen within it."""

STANDSTILL = 60.0 if os.environ.get("VMBUS_LONG") else 15.0
"""Seconds for which a server is stopped while its guest works. How many decides nothing: a server
that loses nothing in a minute loses nothing in less."""

LOOK = 0.001
"""Seconds between two looks at what tells nobody that it changes."""


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds that no event tells of."""
    with trio.fail_after(PATIENCE):
        while not condition():
            await trio.sleep(LOOK)


def until_in_thread(condition: Callable[[], object]) -> None:
    """Do as :func:`until`, without an event loop."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(LOOK)


async def waits(function: Callable[[], Awaitable[object]]) -> bool:
    """Whether a call still waits when the loop has nothing left to do; it is cancelled then."""
    returned = False

    async def run() -> None:
        nonlocal returned
        await function()
        returned = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return not returned
