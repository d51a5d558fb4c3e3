"""How a bus comes to a stop: pauses, resets and its end, each within a stated time.

A transfer that a worker thread has begun cannot be called back: the thread reads or writes guest
memory, and it ends when the disk wants it to. So nothing says that guest memory is left alone
before that is so. What takes too long is answered with a failure instead, which names it; and at
the end of a bus, whose partition may be gone already, it is given up: it keeps the memory and the
files that it uses until it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import trio

from vmbus.host.runner import ChannelRunner
from vmbus.host.services import Services
from vmbus.host.undertakings import not_back
from vmbus.partition.events import PartitionPaused
from vmbus.workers import abandon

_log = logging.getLogger("vmbus.bus")


def names_of(runners: Iterable[ChannelRunner]) -> list[str]:
    """Return what is touching guest memory, for people, on all of some channels."""
    return [
        name
        for runner in runners
        if runner.channel is not None
        for name in runner.channel.undertakings.names
    ]


class Stops:
    """Those of one bus.

    Args:
        bus: The bus.
        runners: Its channels; only read here.
    """

    def __init__(self, bus: Services, runners: Mapping[int, ChannelRunner]) -> None:
        self._bus = bus
        self._runners = runners

    def hold(self) -> None:
        """Begin nothing any more. Cannot block."""
        for runner in self._runners.values():
            runner.hold()

    async def pause(self, event: PartitionPaused, resume: Callable[[], None]) -> None:
        """Wait until guest memory is left alone, and say so, or that it is not. A checkpoint.

        Args:
            event: Gets the answer.
            resume: Makes the bus go on; called if the pause has failed.
        """
        seconds = float("inf") if event.failed is None else self._bus.config.pause_grace
        with trio.move_on_after(seconds):
            for runner in tuple(self._runners.values()):
                await runner.pause()
            event.done()
            return
        text = self._late("pause", seconds)
        resume()
        if event.failed is not None:
            event.failed(text)

    def begin_reset(
        self, done: Callable[[], None], failed: Callable[[str], None] | None
    ) -> Callable[[], None]:
        """See to it that a reset is answered in time. Cannot block.

        Returns:
            What to call when nothing of the old life touches memory.
        """
        if failed is None:
            return done
        over = trio.Event()
        self._bus.nursery.start_soon(self._bound_reset, over, failed)

        def ended() -> None:
            over.set()
            done()

        return ended

    async def _bound_reset(self, over: trio.Event, failed: Callable[[str], None]) -> None:
        seconds = self._longest_end
        with trio.move_on_after(seconds):
            await over.wait()
        if not over.is_set():
            failed(self._late("reset", seconds))

    async def end(self) -> None:
        """End all channels. A checkpoint if there are any."""
        seconds = self._longest_end
        with trio.move_on_after(seconds):
            await self._end_runners()
        if self._runners:
            self._late("closing goes on without what is under way", seconds)
            abandon(self._bus.transport.memory)
            await self._end_runners()

    @property
    def _longest_end(self) -> float:
        """Seconds until what is under way has to have ended."""
        return self._bus.config.close_grace + self._bus.config.fence_grace

    async def _end_runners(self) -> None:
        while self._runners:
            for runner in tuple(self._runners.values()):
                runner.stop()
            for runner in tuple(self._runners.values()):
                await runner.finished.wait()

    def begin_close(self, runner: ChannelRunner) -> None:
        """See to it that a channel that a guest closes, and that does not end, is known of.

        Cannot block. The guest is not told that its pages are free before they are, and no message
        could tell it anything else; so it waits, and the log says for what.
        """
        self._bus.nursery.start_soon(self._watch_close, runner)

    async def _watch_close(self, runner: ChannelRunner) -> None:
        seconds = self._longest_end
        with trio.move_on_after(seconds):
            await runner.finished.wait()
        if not runner.finished.is_set():
            self._late("the guest waits for the end of a channel", seconds, [runner])

    def _late(
        self, action: str, seconds: float, runners: Iterable[ChannelRunner] | None = None
    ) -> str:
        """Say what has not ended in time; also in the log."""
        names = names_of(self._runners.values() if runners is None else runners)
        text = not_back(names, seconds)
        if self._bus.failure_log.spend():
            _log.error("%s: %s: %s", self._bus.transport.name, action, text)
        return text
