"""Descriptors that are open, to find those that are left."""

from __future__ import annotations

import gc
import os

from vmbus.attach.protocol.closing import wait_closed


def open_descriptors(*, collect: bool = False) -> set[str]:
    """Return the open descriptors; with ``collect`` without those that earlier tests left.

    What is garbage before a test may be collected in the middle of it, and be missed at its end.
    """
    if collect:
        gc.collect()
    assert wait_closed(20), "a descriptor of a peer takes for ever to close"
    return set(os.listdir("/proc/self/fd"))


def count_fds(*, collect: bool = False) -> int:
    """Return how many descriptors are open."""
    return len(open_descriptors(collect=collect))
