"""A machine without processors, attached to a server in another thread."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.leaks import count_fds
from tests.support.patience import PATIENCE, until
from tests.support.worlds import TIERS, EchoDevice, whole_life
from vmbus.attach.client import Done
from vmbus.attach.client.machine import MachineDelegate, attach_machine
from vmbus.attach.protocol.limits import Feature
from vmbus.attach.server import listen_path, serve
from vmbus.errors import AttachError
from vmbus.guest import LINUX_6_1, Interrupt, boot
from vmbus.host import open_bus
from vmbus.partition.soft_machine import SoftMachine
from vmbus.server import DeviceSetup, GuestServer
from vmbus.wire.synic import HvStatus, Msr


@pytest.fixture
async def machine() -> AsyncIterator[SoftMachine]:
    made = SoftMachine(((0, 32 << 20), (1 << 32, 1 << 20)), vp_count=2)
    yield made
    made.close()
    made.close()


class ServerThread:
    """A server in a thread with a loop of its own: attachments make calls that block."""

    def __init__(self, path: Path, handler: Any = None) -> None:
        self.path = str(path)
        self.server = GuestServer([DeviceSetup("storvsp", ("ram:4M",))])
        self.handler = handler or self.server.handle
        self.started = threading.Event()
        self.thread = threading.Thread(target=lambda: trio.run(self._main))

    async def _main(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.stop = trio.Event()
        listener = listen_path(self.path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, listener, self.handler)
            self.started.set()
            await self.stop.wait()
            nursery.cancel_scope.cancel()
        listener.close()


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ServerThread]:
    made = ServerThread(tmp_path / "socket", getattr(request, "param", None))
    made.thread.start()
    assert made.started.wait(PATIENCE)
    yield made
    trio.from_thread.run_sync(made.stop.set, trio_token=made.token)
    made.thread.join(PATIENCE)
    assert not made.thread.is_alive()


@pytest.mark.parametrize("tier", TIERS)
async def test_a_guest_lives_over_every_tier(server, machine, tier):
    with trio.fail_after(PATIENCE):
        async with (
            attach_machine(machine, server.path, features=TIERS[tier]),
            boot(machine, LINUX_6_1) as guest,
        ):
            assert machine.flags_are_shared == (tier == "T2")
            await whole_life(guest, sub_channels=0)
    assert machine.msr_written is None


async def test_the_server_may_be_missing(machine, tmp_path):
    with pytest.raises(AttachError):
        async with attach_machine(machine, str(tmp_path / "nobody")):
            raise AssertionError("attached to nobody")


async def test_a_machine_hears_of_the_end_of_the_server(machine, tmp_path):
    server = ServerThread(tmp_path / "socket")
    server.thread.start()
    assert server.started.wait(PATIENCE)
    with trio.fail_after(PATIENCE):
        async with attach_machine(machine, server.path) as (_, delegate):
            server.token.run_sync_soon(server.stop.set)
            await delegate.over.wait()
            assert delegate.reason
            # Hypercalls fail then, as they do without a host.
            assert machine.synic.ports.post_message(1, 1, 0, b"") != HvStatus.SUCCESS
            assert machine.synic.ports.signal_event(17, 0) != HvStatus.SUCCESS
    await trio.to_thread.run_sync(server.thread.join, PATIENCE)


async def reporting(transport: Any) -> None:
    async with open_bus(transport, [EchoDevice()]) as bus:
        bus.report_fault("this guest is up to no good", 3)
        await bus.wait_gone()


@pytest.mark.parametrize("server", [reporting], indirect=True)
async def test_what_the_server_says_of_the_guest_is_kept(server, machine):
    with trio.fail_after(PATIENCE):
        async with attach_machine(machine, server.path, features=Feature.LOG) as (_, delegate):
            await until(lambda: delegate.logged)
            assert delegate.logged == ["channel 3: this guest is up to no good"]
    for number in range(150):
        delegate.log(str(number))
    assert delegate.logged == [str(number) for number in range(50, 150)]


async def test_a_delegate_does_what_a_vmm_does(machine):
    delegate = MachineDelegate(machine)
    answers: list[int] = []

    class Deliveries:
        """All of them are unanswered for ever."""

        def __contains__(self, seq: int) -> bool:
            return True

        def answer(self, seq: int, code: int) -> None:
            answers.append(code)

    done = Done(Deliveries(), 1)

    delegate.deliver_message(0, 2, 1, b"nobody listens", done)
    assert answers == [errno.ENXIO]
    machine.write_msr(0, Msr.SIMP, 0x5001)
    machine.write_msr(0, Msr.SIEFP, 0x6001)
    machine.write_msr(0, Msr.SINT2, 0xF3)
    delegate.deliver_message(0, 2, 1, b"first", done)
    delegate.deliver_message(0, 2, 1, b"second", done)
    assert answers == [errno.ENXIO, 0]
    machine.memory.page(5).cast("I")[2 * 64] = 0
    machine.write_msr(0, Msr.EOM, 0)
    assert answers == [errno.ENXIO, 0, 0]
    delegate.set_flag(0, 2, 9)
    assert machine.memory.read(0x6000 + 512, 2) == b"\x00\x02"
    assert not delegate.call_fd(1, 0, 2, 9, None)
    delegate.event_port_added(1, 2, 3)
    delegate.event_port_removed(1, 2)
    assert Interrupt(0, 0xF3) in await machine.wait_interrupt()


async def test_a_failing_body_takes_the_attachment_down(server, machine):
    with pytest.raises(ExceptionGroup) as caught:
        async with attach_machine(machine, server.path):
            raise ZeroDivisionError
    assert caught.group_contains(ZeroDivisionError)
    before = count_fds(collect=True)
    with contextlib.suppress(ExceptionGroup):
        async with attach_machine(machine, server.path):
            raise ZeroDivisionError
    await until(lambda: count_fds() <= before)
