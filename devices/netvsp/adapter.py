"""The synthetic network adapter: one device on the bus, one endpoint behind it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import trio

from netvsp.endpoint import Endpoint, EndpointError
from netvsp.frames.frame import Frame, format_mac
from netvsp.link import AdapterConfig, Link
from netvsp.session import Session
from netvsp.statistics import NO_BUFFER, AdapterStatistics
from netvsp.wire.nvsp import VERSION_NAMES
from vmbus.errors import ConfigError
from vmbus.host.channel import Channel
from vmbus.host.device import Offer
from vmbus.wire.guids import CLASS_NIC

MONITOR_LATENCY = 500
"""Ticks of 100 ns: how often the monitor page is looked at, if the adapter has a bit there."""
MAC_PREFIX = bytes.fromhex("00155d")
"""Of addresses made here: Microsoft's, by which Linux knows a Hyper-V adapter."""

STOP_SENDING = 2.5
"""Seconds for a guest to stop sending when its link is down: Linux looks at its link at most every
two (netvsc_link_change, LINKCHANGE_INT)."""
QUIET = 0.1
"""Seconds without a packet of the guest's in which it counts as having stopped."""

log = logging.getLogger("vmbus.netvsp")


class NetworkAdapter:
    """A network adapter, peer of ``hv_netvsc`` and its kin; see :class:`vmbus.host.Device`.

    Args:
        endpoint: Where its frames go; the adapter's, closed with it.
        mac: Six bytes; None: made from the instance GUID, so that it stays the same with it.
        instance_id: GUID of this adapter, unique on its bus; by default a random one. Linux names
            the interface by it, so give one that stays.
        config: What it agrees to.
        monitor: Use a monitor page bit as doorbell. DPDK and OpenBSD ignore adapters without one;
            others ring faster without.
        source: What people call the endpoint, such as the specification that it was made from.

    Attributes:
        config: What it agrees to.
        link: Address and state of its link.
        statistics: Counters.
        endpoint: Where its frames go.

    Raises:
        ConfigError: A value is out of its range.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        mac: bytes | None = None,
        instance_id: UUID | None = None,
        config: AdapterConfig | None = None,
        monitor: bool = False,
        source: str = "",
    ) -> None:
        self.config = config or AdapterConfig()
        self.endpoint = endpoint
        self.source = source
        own_id = instance_id or uuid4()
        info = endpoint.info
        mtu = self.config.max_mtu if info.mtu is None else min(info.mtu, self.config.max_mtu)
        self.link = Link(mac or mac_of(own_id), mtu=mtu, speed=info.speed)
        self.link.changed = self._link_changed
        self.statistics = AdapterStatistics()
        self.failure = ""
        """Why the endpoint has come to its end."""
        self._session: Session | None = None
        self._offer = Offer(
            class_id=CLASS_NIC,
            instance_id=own_id,
            monitor_latency=MONITOR_LATENCY if monitor else None,
            max_subchannels=self.config.max_queues - 1,
        )

    # -- the port of the endpoint ------------------------------------------------------------------

    @property
    def mac(self) -> bytes:
        """See :class:`netvsp.endpoint.Port`."""
        return self.link.mac

    def receive(self, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Port.receive`."""
        if self._session is None:
            self.statistics.receive.dropped["not ready"] += len(frames)
            return len(frames)
        return self._session.receiver.receive(frames)

    async def wait_room(self) -> None:
        """See :meth:`netvsp.endpoint.Port.wait_room`."""
        if self._session is None:
            await trio.lowlevel.checkpoint()
        else:
            await self._session.receiver.wait_room()

    def lost(self, count: int) -> None:
        """See :meth:`netvsp.endpoint.Port.lost`."""
        self.statistics.receive.dropped[NO_BUFFER] += count

    def link_changed(self, *, up: bool, speed: int | None = None) -> None:
        """See :meth:`netvsp.endpoint.Port.link_changed`."""
        self.link.set_endpoint(up=up, speed=speed)

    # -- operators ---------------------------------------------------------------------------------

    def set_link(self, *, up: bool) -> None:
        """Plug the cable in or out; a running guest is told at once. Cannot block."""
        self.link.set_operator(up=up)

    def set_mac(self, mac: bytes) -> None:
        """Give the adapter another address. Cannot block.

        The guest asks for it when it opens the adapter: one that runs keeps sending with the old
        one, and its frames are dropped until then.

        Raises:
            ConfigError: Not the address of a station.
        """
        self.link.set_mac(mac)

    def _link_changed(self) -> None:
        if self._session is not None:
            self._session.link_changed()

    # -- the device --------------------------------------------------------------------------------

    @property
    def offer(self) -> Offer:
        """See :attr:`vmbus.host.Device.offer`."""
        return self._offer

    async def run(self, primary: Channel) -> None:
        """See :meth:`vmbus.host.Device.run`."""
        session = self._session = Session(
            primary,
            self.endpoint,
            config=self.config,
            link=self.link,
            statistics=self.statistics,
        )
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_endpoint)
                try:
                    await session.run()
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            self._session = None

    async def _run_endpoint(self) -> None:
        if self.failure:
            return
        try:
            await self.endpoint.run(self)
            self.failure = "it has ended"
        except EndpointError as error:
            self.failure = str(error)
        log.warning("%s: %s; the link is down", self.source or "endpoint", self.failure)
        self.link.set_endpoint(up=False)

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`vmbus.host.Device.snapshot`."""
        session = self._session
        return {
            "stage": session.stage.value if session else "not open",
            "nvsp_version": VERSION_NAMES.get(session.version, "") if session else "",
            "mac": format_mac(self.link.mac),
            "mtu": session.control.mtu if session else self.link.mtu,
            "link": "up" if self.link.up else "down",
            "speed": self.link.speed,
            "filter": session.control.filter if session else 0,
            "channels": len(session.receiver.channels) if session else 0,
            "receive_outstanding": session.receiver.outstanding if session else 0,
            "refused": session.refused if session else 0,
            "source": self.source,
            "failure": self.failure,
            "transmit": self.statistics.transmit.describe(),
            "receive": self.statistics.receive.describe(),
            "endpoint": self.endpoint.snapshot(),
        }

    async def retire(self) -> None:
        """See :meth:`vmbus.host.device.Retiring.retire`: take the link down and wait.

        Linux waits in ``netvsc_remove`` for the completion of each frame that it has sent, for
        ever and with the lock of all networking held (rndis_filter_halt_device), and takes none any
        more once it has heard of the removal (vmbus_reset_channel_cb).
        """
        was_up = self.link.up
        self.link.set_leaving(leaving=True)
        session = self._session
        if session is None or not was_up or not session.control.filter:
            await trio.lowlevel.checkpoint()
            return
        enough = trio.current_time() + STOP_SENDING
        seen = -1
        while self._session is session and (
            seen != (now := _packets(session)) or trio.current_time() < enough
        ):
            seen = now
            await trio.sleep(QUIET)

    def stay(self) -> None:
        """See :meth:`vmbus.host.device.Retiring.stay`."""
        self.link.set_leaving(leaving=False)

    async def aclose(self) -> None:
        """See :meth:`vmbus.host.Device.aclose`."""
        await self.endpoint.aclose()


def _packets(session: Session) -> int:
    """Return how many packets have come on the channels that are open now."""
    return sum(each.statistics.packets_in for each in session.receiver.channels.values())


def mac_of(instance_id: UUID) -> bytes:
    """Return the address that goes with an instance GUID. Cannot block."""
    return MAC_PREFIX + instance_id.bytes[-3:]


def parse_mac(text: str) -> bytes:
    """Parse six bytes as people write them. Raises ConfigError."""
    try:
        mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6:
        raise ConfigError(f"{text[:40]!r} is not a MAC address such as 00:15:5d:01:02:03")
    return mac
