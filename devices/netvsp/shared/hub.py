"""A switch with what it needs of the world: a clock, a log, others of its name; found by its name.

In one event loop there is one of each name, from when the first asks for it until the last has
given it back.
"""

from __future__ import annotations

import logging

import trio

from netvsp.frames.frame import format_mac
from netvsp.shared.line import make_buffer
from netvsp.shared.meeting import Meeting
from netvsp.switch.port import SwitchPort
from netvsp.switch.switch import Switch
from vmbus.errors import ConfigError
from vmbus.log_budget import LogBudget

log = logging.getLogger("vmbus.netvsp")

_HUBS: trio.lowlevel.RunVar[dict[str, Hub]] = trio.lowlevel.RunVar("netvsp.hubs")


class Hub:
    """A switch. Usually got by :func:`get_hub`.

    Args:
        name: What people call it.

    Attributes:
        switch: The switch.
        buffer: Room for a message, for all lines of the loop: whoever has filled it has emptied it
            before the next checkpoint.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.switch = Switch(trio.current_time, moved=self._moved, stations=self._stations)
        self.buffer = make_buffer()
        self._meeting: Meeting | None = None
        self._users = 0
        self._budget = LogBudget()

    def join(self, directory: str) -> None:
        """Meet switches of the same name in a directory, from now on. Cannot block.

        Raises:
            ConfigError: It meets others elsewhere, or the directory is not for that.
        """
        if self._meeting is None:
            self._meeting = Meeting(self.switch, self.name, directory, self.buffer)
        elif self._meeting.directory != directory:
            raise ConfigError(
                f"switch {self.name}: it meets others in {self._meeting.directory}, and cannot "
                f"in {directory} as well"
            )

    def set_station(self, port: SwitchPort, address: bytes | None) -> None:
        """Say which adapter is behind a port; see :meth:`Switch.set_station`. Cannot block."""
        if not self.switch.set_station(port, address) and self._budget.spend():
            assert address is not None
            log.warning(
                "switch %s: %s is another port's address; %s gets nothing until that one is gone%s",
                self.name,
                format_mac(address),
                port.name,
                self._budget.left_out(),
            )

    def _moved(self, vlan: int, address: bytes, before: SwitchPort, now: SwitchPort) -> None:
        if self._budget.spend():
            log.info(
                "switch %s: %s has moved from %s to %s, VLAN %d%s",
                self.name,
                format_mac(address),
                before.name,
                now.name,
                vlan,
                self._budget.left_out(),
            )

    def _stations(self, address: bytes, there: bool) -> None:
        if self._meeting is not None:
            self._meeting.tell_station(address, there)

    def describe(self) -> dict[str, object]:
        """Describe it for people, as JSON types. Cannot block."""
        found: dict[str, object] = {"name": self.name, **self.switch.describe()}
        if self._meeting is not None:
            found["joined"] = self._meeting.describe()
        return found

    async def release(self) -> None:
        """Give it back. Is a checkpoint."""
        self._users -= 1
        if not self._users:
            del _HUBS.get()[self.name]
            await self.aclose()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Leave the others, if it has met some. Idempotent. Is a checkpoint."""
        if self._meeting is not None:
            await self._meeting.aclose()
        await trio.lowlevel.checkpoint()


def get_hub(name: str, join: str = "") -> Hub:
    """Return the switch of a name in this event loop, to be given back. Cannot block.

    Args:
        name: Of the switch.
        join: Directory where it meets others; empty: this user has no wish.

    Raises:
        ConfigError: As :meth:`Hub.join`.
    """
    hubs = _HUBS.get({})
    _HUBS.set(hubs)
    hub = hubs.get(name) or Hub(name)
    if join:
        hub.join(join)
    hubs[name] = hub
    hub._users += 1
    return hub
