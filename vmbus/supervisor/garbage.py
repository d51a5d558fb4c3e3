"""When a worker looks for garbage.

A full collection looks at every object there is. With thousands of a guest's commands waiting that
takes 70 ms (``make bench``: channels of one guest), in which none of its channels is served. So a
worker makes full collections by itself, when little is there to be looked at. Young objects are
collected as ever; what waits is what has lived for long and then become part of a cycle.
"""

from __future__ import annotations

import gc

import trio

INTERVAL = 10.0
"""Seconds from one look to the next."""
FEW_TASKS = 200
"""A task is what most objects belong to, and each command that waits has one."""
LONGEST = 300.0
"""Seconds after which it is done, however much there is."""
_NEVER = 1 << 30


async def collect_when_idle() -> None:
    """Make this process's full collections from now on. Runs until cancelled."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], _NEVER)
    try:
        due = trio.current_time() + LONGEST
        while True:
            await trio.sleep(INTERVAL)
            now = trio.current_time()
            if trio.lowlevel.current_statistics().tasks_living < FEW_TASKS or now >= due:
                gc.collect()
                due = now + LONGEST
    finally:
        gc.set_threshold(*thresholds)
