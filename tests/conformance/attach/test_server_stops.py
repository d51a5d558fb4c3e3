"""RESET, PAUSE and GOODBYE when something does not come back: a failure that says so, in time."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import trio

from tests.support.attach import Bus, raw_vmm, running_server
from tests.support.patience import PATIENCE, until
from vmbus.attach.protocol.limits import ResetReason
from vmbus.attach.protocol.messages import Number, State
from vmbus.attach.protocol.to_server import Goodbye, Reset
from vmbus.attach.server.transport import SocketTransport
from vmbus.partition.events import PartitionPaused, PartitionReset
from vmbus.workers import AbandonedError, abandon, shared_pool, work_for

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


@pytest.mark.parametrize(("kind", "payload", "event"), [
    (Number.PAUSE, b"", PartitionPaused),
    (Number.RESET, Reset(ResetReason.RESET).encode(), PartitionReset),
])  # fmt: skip
async def test_what_fails_is_refused_with_the_reason_and_can_be_tried_again(
    tmp_path: Path, kind: Number, payload: bytes, event: type
) -> None:
    bus = Bus()
    bus.auto = False
    async with running_server(tmp_path / "s", bus) as path:
        with raw_vmm(path) as vmm:
            await vmm.attach()
            for count in (1, 2):
                number = await vmm.send(kind, payload)
                await bus.wait_events(count)
                asked = bus.events[-1]
                assert isinstance(asked, PartitionPaused | PartitionReset)
                assert isinstance(asked, event)
                assert asked.failed is not None
                asked.failed("disk 0:0:0 (raw:dead.img): WRITE(10): not back in 5 s")
                asked.done()  # too late
                asked.failed("again")
                frame = await vmm.expect_answer(kind, number)
                assert b"WRITE(10): not back in 5 s" in frame.payload
                assert frame.payload[:4] == errno.ETIMEDOUT.to_bytes(4, "little")
                assert bus.transport.state is State.ATTACHED
            number = await vmm.send(kind, payload)
            await bus.wait_events(3)
            asked = bus.events[-1]
            assert isinstance(asked, PartitionPaused | PartitionReset)
            asked.done()
            assert asked.failed is not None
            asked.failed("too late")
            await vmm.expect_answer(kind, number)
            paused = kind is Number.PAUSE
            assert bus.transport.state is (State.PAUSED if paused else State.ATTACHED)


async def test_goodbye_says_that_memory_may_still_be_in_use(tmp_path: Path) -> None:
    go, begun = threading.Event(), threading.Event()

    async def handler(transport: SocketTransport) -> None:
        await transport.add_message_port(1)
        pool = shared_pool()
        page = transport.memory.page(0)

        def transfer(page: memoryview) -> None:
            begun.set()
            assert go.wait(PATIENCE)
            page[:1] = b"x"

        async def call() -> None:
            work_for(transport.memory)
            with pytest.raises(AbandonedError):
                await pool.run(transfer, page)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await until(begun.is_set)
            async for _ in transport.incoming():
                pass
            assert abandon(transport.memory) == 1
        await pool.aclose()

    try:
        async with running_server(tmp_path / "s", handler) as path:
            with raw_vmm(path) as vmm:
                await vmm.attach()
                code, text = await vmm.refused(Number.GOODBYE, Goodbye(0).encode())
                assert code == errno.ETIMEDOUT
                assert "may still use memory" in text
                assert await vmm.receive() is None
                go.set()
    finally:
        go.set()
