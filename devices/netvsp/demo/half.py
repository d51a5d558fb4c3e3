"""The network half of a demo's guest: one of two stations on a switch, which talk to each other.

Its lines among those of :mod:`vmbus.demo`:

==========  ====================================================================================
event       further members (sizes in bytes, times in seconds)
==========  ====================================================================================
adapter     ``mac``, ``version`` of NVSP, ``mtu``, ``leaves_sums`` (the adapter fills in those of
            UDP)
met         ``address`` and ``mac`` of the other station, ``asked``: how often, by ARP
ping        ``sent``, ``answered``, ``best`` and ``mean`` time
stream      ``way`` ("sent" or "received"), ``frames``, ``bytes`` of their data, ``seconds``,
            ``lost``, ``damaged``
==========  ====================================================================================

Station 1 sends its stream first, then station 2. Each datagram has a digest of its own, and one
that has not come, or not as it was sent, is a problem.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import trio

from netvsp.demo.talk import Stream, Talker, text_of
from netvsp.guest import HABITS, NetvscAdapter, attach
from netvsp.wire.nvsp import VERSION_NAMES
from vmbus.demo import Half, Options, Program, Story
from vmbus.errors import VMBusError
from vmbus.guest import Guest
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.guids import CLASS_NIC
from vmbus.wire.messages import OfferChannel

PINGS = 20
RECEIVE_BUFFER = 2 << 20
SEND_BUFFER = 1 << 20
"""Bytes of the buffers, which drivers would have larger."""


class NetworkHalf(Half[NetvscAdapter]):
    """What the guest does with a network adapter; see :class:`vmbus.demo.Half`."""

    def __init__(self, options: Options, arguments: argparse.Namespace, story: Story) -> None:
        super().__init__(options, arguments, story)
        if options.personality.key not in HABITS:
            sys.stderr.write(f"{options.personality.name}: its network driver is not played\n")
            raise SystemExit(2)
        self.number: int = arguments.station
        """Which of the two it is."""

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """See :meth:`vmbus.demo.Half.add_options`."""
        parser.add_argument(
            "--station",
            type=int,
            choices=(1, 2),
            required=True,
            help="which of the two this is: each waits for the other",
        )

    @property
    def ram(self) -> int:
        """See :attr:`vmbus.demo.Half.ram`."""
        habits = HABITS[self.options.personality.key]
        rings = 2 * self.options.channels * habits.ring_pages * PAGE_SIZE
        return rings + 2 * (RECEIVE_BUFFER + SEND_BUFFER)

    async def attach(self, guest: Guest, offers: Sequence[OfferChannel]) -> NetvscAdapter:
        """See :meth:`vmbus.demo.Half.attach`; the first adapter is taken."""
        adapters = [offer for offer in offers if offer.class_id == CLASS_NIC]
        if not adapters:
            raise VMBusError("the bus offers no network adapter that this driver serves")
        habits = HABITS[self.options.personality.key]
        adapter = await attach(
            guest,
            adapters[0],
            sub_channels=min(self.options.channels, habits.max_channels) - 1,
            contiguous=False,
            receive_size=RECEIVE_BUFFER,
            send_size=SEND_BUFFER,
        )
        await adapter.up()
        return adapter

    async def use(self, driver: NetvscAdapter) -> None:
        """Talk to the other station; see :meth:`vmbus.demo.Half.use`."""
        talker = Talker(driver, self.number)
        self.story.emit(
            "adapter",
            mac=text_of(driver.address),
            version=VERSION_NAMES[driver.version],
            mtu=driver.mtu,
            leaves_sums=talker.leaves_sums,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talker.run)
            await self._talk(talker)
            nursery.cancel_scope.cancel()

    async def _talk(self, talker: Talker) -> None:
        asked = await talker.meet()
        assert talker.peer is not None
        mac, address = map(text_of, talker.peer)
        self.story.emit("met", address=address, mac=mac, asked=asked)
        pings = await talker.ping(PINGS)
        self.story.emit("ping", **pings._asdict())
        if pings.answered < pings.sent:
            self.story.problem("ping", f"{pings.sent - pings.answered} were not answered")
        seconds = self.options.seconds / 2
        if self.number == 1:
            self._told("sent", await talker.send(seconds))
            self._told("received", await talker.receive())
        else:
            self._told("received", await talker.receive())
            self._told("sent", await talker.send(seconds))

    def _told(self, way: str, stream: Stream) -> None:
        self.story.emit("stream", way=way, **stream._asdict())
        if way == "received" and (stream.lost or stream.damaged):
            self.story.problem(
                "stream",
                f"of {stream.frames + stream.lost} datagrams, {stream.lost} were lost and "
                f"{stream.damaged} damaged",
            )


PROGRAM = Program(
    "python -m netvsp.demo",
    "One of two guests of ``vmbus demo`` that talk to each other: attaches itself to a server.",
    (NetworkHalf,),
)
"""A guest with a network adapter and nothing else."""
