"""Where a switch is that guests of several processes are connected to."""

from __future__ import annotations

import logging
from collections.abc import Hashable

import trio

from netvsp.shared.carrier import Carrier
from netvsp.shared.hub import Hub
from netvsp.shared.line import FrameLine
from netvsp.shared.messages import Kind, pack_info, station_untrusted
from netvsp.shared.options import find_switch, parse_options
from vmbus.errors import ConfigError, PeerProtocolError, leaves
from vmbus.plugins.sharing import Line

log = logging.getLogger("vmbus.netvsp")

TELL_EVERY = 1.0
"""Seconds between two messages to a guest's worker about what was counted."""


class SwitchKeeper:
    """Keeps one switch for the guests of a server; see :class:`vmbus.plugins.sharing.Keeper`.

    Args:
        hub: The switch; given back at the end.
    """

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    async def serve(self, line: Line, initiator: Hashable, spec: str) -> None:
        """Serve one guest until its line ends; see :meth:`vmbus.plugins.sharing.Keeper.serve`."""
        frames = FrameLine(line.sock, self.hub.buffer)
        try:
            await self._serve(frames, str(initiator), spec)
        except* (PeerProtocolError, ConfigError) as group:
            log.warning("%s: %s", initiator, leaves(group)[0])
        except* OSError:
            log.debug("%s: the line of a switch has ended", initiator)
        finally:
            frames.close()

    async def _serve(self, line: FrameLine, name: str, spec: str) -> None:
        hub = self.hub

        def obey(kind: Kind, count: int, data: memoryview) -> bool:
            if kind is Kind.STATION:
                hub.set_station(carrier.port, station_untrusted(data, count))
            return kind is Kind.STATION

        found = find_switch(spec)
        assert found is not None  # it is kept here
        options = parse_options(found)
        if options.join:  # of an adapter that was added later
            hub.join(options.join)
        carrier = Carrier(hub.switch, line, name, options.port, obey)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, carrier)
            await carrier.run()
            nursery.cancel_scope.cancel()

    async def _tell(self, carrier: Carrier) -> None:
        """Tell the guest's worker what its port has counted, for people who ask there."""
        told = b""
        while True:
            switch = self.hub.switch
            message = pack_info(
                {
                    "switch": self.hub.name,
                    "ports": len(switch.ports),
                    "addresses": len(switch.table),
                    "moves": switch.table.moves,
                    "port": carrier.port.describe(),
                }
            )
            if message != told:
                told = message
                carrier.post(message)
            await trio.sleep(TELL_EVERY)

    async def aclose(self) -> None:
        """Give the switch back, when no line is left. Is a checkpoint."""
        await self.hub.release()
