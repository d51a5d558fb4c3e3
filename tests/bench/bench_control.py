"""The control plane: what offering and opening devices costs, and attaching guests."""

from __future__ import annotations

import time
from statistics import median
from uuid import UUID

import trio

from tests.bench.harness import Figure, median_ns
from vmbus.engine import Engine, EngineConfig
from vmbus.engine.events import ChannelOpen
from vmbus.engine.offers import Offer
from vmbus.guest.kernel import boot
from vmbus.guest.personality import LINUX_6_1
from vmbus.host import open_bus
from vmbus.host.channel import Channel
from vmbus.memory import allocate_memory
from vmbus.partition.loopback import LoopbackTransport
from vmbus.partition.soft_machine import SoftMachine
from vmbus.wire.gpa import build_range
from vmbus.wire.guids import CLASS_SCSI
from vmbus.wire.messages import (
    CONNECTION_MESSAGES_5,
    Direction,
    GpadlHeader,
    InitiateContact,
    OpenChannel,
    RequestOffers,
    build_message,
    parse_message_untrusted,
)
from vmbus.wire.versions import Version

DEVICES = 100
MANY = 1000


class Idle:
    """A device that does nothing."""

    def __init__(self, number: int) -> None:
        self.offer = Offer(class_id=CLASS_SCSI, instance_id=UUID(int=number + 1))

    async def run(self, primary: Channel) -> None:
        while True:
            await primary.receive_batch()

    def snapshot(self) -> dict[str, object]:
        return {}

    async def aclose(self) -> None:
        return


def figures() -> list[Figure]:
    """Measure."""
    return [_parse(), _engine_alone(), *trio.run(_over_the_bus)]


def _parse() -> Figure:
    message = build_message(
        OpenChannel(relid=1, open_id=1, ring_gpadl=1, target_vp=0, downstream_page_offset=1),
        version=Version.V5_3,
    )

    def run(count: int) -> None:
        for _ in range(count):
            parse_message_untrusted(
                message, direction=Direction.GUEST_TO_HOST, version=Version.V5_3
            )

    return Figure("parse OPENCHANNEL", median_ns(run, 2_000) / 1000, "us")


def _engine_alone() -> Figure:
    """Contact, offers, a GPADL and an open for each device; no guest, no trio."""
    memory = allocate_memory(64 * 4096)

    def once() -> float:
        start = time.perf_counter()
        engine = Engine(memory, EngineConfig())
        for number in range(DEVICES):
            engine.offer(Idle(number).offer)

        def post(message: object) -> None:
            data = build_message(message, version=Version.V5_3)  # type: ignore[arg-type]
            engine.receive_untrusted(CONNECTION_MESSAGES_5, data)

        post(
            InitiateContact(
                version=Version.V5_3,
                target_vp=0,
                target_info=2,
                monitor_page_1=0,
                monitor_page_2=0,
            )
        )
        post(RequestOffers())
        pages = build_range(4 * 4096, 0, range(4))
        for relid in range(1, DEVICES + 1):
            post(
                GpadlHeader(
                    relid=relid,
                    gpadl=0xE1E10 + relid,
                    range_buflen=len(pages),
                    range_count=1,
                    data=pages,
                )
            )
            post(
                OpenChannel(
                    relid=relid,
                    open_id=relid,
                    ring_gpadl=0xE1E10 + relid,
                    target_vp=0,
                    downstream_page_offset=2,
                )
            )
        opened = [event for event in engine.take() if isinstance(event, ChannelOpen)]
        for event in opened:
            engine.open_done(event.key, ok=True)
        engine.take()
        assert len(opened) == DEVICES
        return time.perf_counter() - start

    return Figure(
        f"engine alone: {DEVICES} devices offered and opened",
        median(once() for _ in range(5)) * 1000,
        "ms",
        target=150.0,
    )


async def _over_the_bus() -> list[Figure]:
    """A Python guest in the same process opens every device; its half is in the figure."""
    spent = {count: await _open_all(count) for count in (DEVICES, MANY)}
    return [
        Figure(f"{DEVICES} devices opened by a Python guest", spent[DEVICES] * 1000, "ms"),
        Figure(f"per channel, {MANY} offered and opened", spent[MANY] / MANY * 1000, "ms"),
    ]


async def _open_all(count: int) -> float:
    machine = SoftMachine(((0, 64 << 20),))
    with LoopbackTransport(machine.synic) as transport:
        devices = [Idle(number) for number in range(count)]
        async with open_bus(transport, devices), boot(machine, LINUX_6_1) as guest:
            start = time.perf_counter()
            offers = await guest.connection.connect()
            for offer in offers:
                await guest.connection.open_channel(offer, ring_pages=2)
            spent = time.perf_counter() - start
            await guest.connection.unload()
    machine.close()
    return spent
