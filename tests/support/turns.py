"""How long, and how much, a loop works before others have a turn.

A *step* is what one task does between two checkpoints, a *turn* what all tasks that were ready do
until the loop looks for I/O again: nobody else is served during either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio


class Turns(trio.abc.Instrument):
    """Measures steps and turns, for benchmarks.

    Attributes:
        longest_step: Seconds of processor time, in which neither the other work of the machine nor
            that of other threads counts.
        longest_turn: The same.
    """

    def __init__(self) -> None:
        self.longest_step = 0.0
        self.longest_turn = 0.0
        self._step = self._turn = math.inf  # what had begun before is not counted

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._step = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest_step = max(self.longest_step, time.thread_time() - self._step)

    def after_io_wait(self, timeout: float) -> None:
        self._turn = time.thread_time()

    def before_io_wait(self, timeout: float) -> None:
        self.longest_turn = max(self.longest_turn, time.thread_time() - self._turn)


class Work(trio.abc.Instrument):
    """Counts work, for tests: whatever calls :meth:`done` says what one unit of it is.

    Attributes:
        total: All that was done.
        most_in_step: The most that one task did between two checkpoints.
        most_in_turn: The most that all tasks together did before the loop looked for I/O.
        turns: How often the loop has looked for I/O.
    """

    def __init__(self) -> None:
        self.total = 0
        self.most_in_step = 0
        self.most_in_turn = 0
        self.turns = 0
        self._step = 0
        self._turn = 0

    def done(self, amount: int = 1) -> None:
        """Say that some work is being done. Work outside the loop's thread is not for here."""
        self.total += amount
        self._step += amount
        self._turn += amount
        self.most_in_step = max(self.most_in_step, self._step)
        self.most_in_turn = max(self.most_in_turn, self._turn)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._step = 0

    def after_io_wait(self, timeout: float) -> None:
        self.turns += 1
        self._turn = 0


@contextmanager
def watched(instrument: trio.abc.Instrument) -> Iterator[None]:
    """Have the running loop tell an instrument what it does."""
    trio.lowlevel.add_instrument(instrument)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(instrument)


@contextmanager
def counting(
    owner: object, name: str, amount: Callable[..., int] = lambda *_args, **_options: 1
) -> Iterator[Work]:
    """Count calls of a function in the running loop.

    Args:
        owner: Whose attribute the function is.
        name: What it is called.
        amount: Units of work in one call, from its arguments.
    """
    work = Work()
    original = getattr(owner, name)

    def counted(*args: object, **options: object) -> object:
        work.done(amount(*args, **options))
        return original(*args, **options)

    setattr(owner, name, counted)
    try:
        with watched(work):
            yield work
    finally:
        setattr(owner, name, original)
