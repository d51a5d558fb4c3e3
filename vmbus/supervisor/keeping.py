"""What guests share, kept in workers of their own, and the lines to it."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from vmbus.plugins.sharing import Line, make_line
from vmbus.server.devices import DeviceSetup, SharedKey
from vmbus.server.keepers import KeeperKey, kept_specs, shared_backends, shared_by_added
from vmbus.supervisor.workers import Worker


class Keeping:
    """Has a worker made for each thing that guests share, when it is first needed.

    Args:
        setups: The devices that every guest gets.
        spare: Gives workers that are ready and have nothing to do; borrowed.

    Attributes:
        workers: Those that keep something; one may have ended.
    """

    def __init__(
        self, setups: Sequence[DeviceSetup], spare: trio.MemoryReceiveChannel[Worker]
    ) -> None:
        self.workers: dict[KeeperKey, Worker] = {}
        self._setups = tuple(setups)
        self._shared = shared_backends(setups)
        self._spare = spare
        self._making = trio.Lock()

    async def lines(self, guest: str, added: DeviceSetup | None = None) -> dict[SharedKey, Line]:
        """Return new lines to what a guest shares, the caller's. Is a checkpoint.

        Args:
            guest: Its name.
            added: A device that it gets, for the lines of that alone, in place 0.

        Raises:
            ConfigError: Something cannot be shared.
            OSError: Something cannot be opened.
            Gone: The worker that keeps it has ended.
        """
        shared = self._shared if added is None else shared_by_added(added)
        made: dict[SharedKey, Line] = {}
        try:
            for key, how in shared.items():
                keeper = await self._keeper(how.keeper, key.spec)
                theirs, made[key] = make_line(how.staging)
                try:
                    keeper.send({"connect": guest, "spec": key.spec}, theirs.filenos())
                finally:
                    theirs.close()
        except BaseException:
            for line in made.values():
                line.close()
            raise
        return made

    async def _keeper(self, key: KeeperKey, spec: str) -> Worker:
        """Return the worker that keeps something; a new one keeps at least what ``spec`` names."""
        async with self._making:
            keeper = self.workers.get(key)
            if keeper is None or keeper.gone.is_set():
                keeper = await self._spare.receive()
                while keeper.gone.is_set():
                    keeper = await self._spare.receive()
                specs = list(dict.fromkeys([*kept_specs(self._setups, key), spec]))
                try:
                    await keeper.ask({"keep": list(key), "specs": specs})
                except BaseException:
                    keeper.stop()  # it is of no use to anybody
                    raise
                keeper.keeps = key
                self.workers[key] = keeper
            return keeper
