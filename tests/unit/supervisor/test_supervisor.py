"""Guests in processes of their own: from coming to going, crashes, limits, and what they keep."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import uuid
from collections.abc import AsyncIterator
from functools import partial

import pytest
import trio

from storvsp.guest import attach, scan
from tests.support.attach import INFO, raw_vmm
from tests.support.patience import LOOK, PATIENCE, SOON, until
from vmbus.attach.client.machine import attach_machine
from vmbus.attach.protocol.limits import Role
from vmbus.attach.protocol.messages import Number, RefusedError
from vmbus.attach.protocol.to_server import Hello, VmInfo
from vmbus.attach.server import Names, Roll, ServerLimits, open_listener
from vmbus.attach.server.admission import Peer
from vmbus.errors import AttachError, ConfigError
from vmbus.guest import LINUX_6_1, boot
from vmbus.partition.soft_machine import SoftMachine
from vmbus.server import DeviceSetup
from vmbus.supervisor import Plan, Supervisor, parcels, supervisor as supervisor_module
from vmbus.supervisor.sandbox import landlock_version

pytestmark = pytest.mark.slow

PLAN = Plan(setups=(DeviceSetup("storvsp", ("ram:4M",)),))


class World:
    """A supervisor with a socket."""

    def __init__(self, supervisor: Supervisor, path: str, nursery: trio.Nursery) -> None:
        self.supervisor = supervisor
        self.path = path
        self.nursery = nursery

    async def until(self, count: int) -> None:
        """Wait until so many guests are attached."""
        with trio.fail_after(PATIENCE):
            while (await self.supervisor.query("status"))["guests_attached"] != count:
                await trio.sleep(LOOK)


@contextlib.asynccontextmanager
async def world(tmp_path, plan: Plan = PLAN, **names: object) -> AsyncIterator[World]:
    path = str(tmp_path / "s")
    admission = Names(Roll(), **names)  # type: ignore[arg-type]
    with open_listener(path) as listener:
        async with Supervisor.open(plan) as supervisor, trio.open_nursery() as nursery:
            nursery.start_soon(partial(supervisor.serve, listener, admission=admission))
            yield World(supervisor, path, nursery)
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def guest_on(path: str, name: str = "vm"):
    """A guest with its disks."""
    machine = SoftMachine([(0, 8 << 20)])
    try:
        async with (
            attach_machine(machine, path, name=name) as (attachment, delegate),
            boot(machine, LINUX_6_1) as guest,
        ):
            (offer, *_) = await guest.connection.connect()
            yield await scan(await attach(guest, offer)), attachment, delegate
    finally:
        machine.close()


def leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def worker_of(world: World, name: str) -> int:
    guests = (await world.supervisor.query("guests"))["guests"]
    (pid,) = (guest["pid"] for guest in guests if guest["name"] == name)
    return int(pid)


async def answers_of(world: World) -> dict[str, bool]:
    guests = (await world.supervisor.query("guests"))["guests"]
    return {guest["name"]: guest["answers"] for guest in guests}


async def test_every_guest_has_a_process_and_operators_reach_all(tmp_path):
    async with world(tmp_path) as here:
        async with guest_on(here.path, "a") as ((disk,), _, _), guest_on(here.path, "b"):
            await disk.write(0, b"x" * 512)
            assert await disk.read(0, 1) == b"x" * 512
            found = (await here.supervisor.query("guests"))["guests"]
            assert [guest["name"] for guest in found] == ["a", "b"]
            assert len({os.getpid(), *(guest["pid"] for guest in found)}) == 3
            assert all(guest["answers"] and guest["version"] == "5.3" for guest in found)
            added = await here.supervisor.command(
                {"guest": "b", "backend": "disk", "action": "add", "spec": "ram:1M"}
            )
            assert added == {"address": "0:0:1"}
            with pytest.raises(ConfigError, match="which guest"):
                await here.supervisor.command({"action": "add", "spec": "ram:1M"})
            with pytest.raises(ConfigError, match="nothing is at"):
                await here.supervisor.command(
                    {"guest": "a", "backend": "disk", "action": "remove", "address": "7"}
                )
        await here.until(0)
        assert here.supervisor.served == 2
        assert not here.supervisor.failed
        with pytest.raises(ConfigError, match="there is no query"):
            await here.supervisor.query("weather")


async def test_a_vmm_hears_of_its_own_guest_only(tmp_path):
    async with (
        world(tmp_path) as here,
        guest_on(here.path, "a"),
        guest_on(here.path, "b") as (_, attachment, _),
    ):
        told = await trio.to_thread.run_sync(attachment.query, "guests")
        assert [guest["name"] for guest in told["guests"]] == ["b"]
        assert "pid" not in told


async def test_a_crash_costs_one_guest(tmp_path, caplog):
    async with world(tmp_path) as here, guest_on(here.path, "steady") as ((disk,), _, _):
        with pytest.raises((AttachError, BaseExceptionGroup)) as caught:
            async with guest_on(here.path, "doomed") as (_, _, delegate):
                os.kill(await worker_of(here, "doomed"), signal.SIGSEGV)
                with trio.fail_after(PATIENCE):
                    await delegate.over.wait()
                raise AttachError("it is over")
        assert isinstance(leaf(caught.value), AttachError)
        await disk.write(0, b"y" * 512)
        async with guest_on(here.path, "doomed") as ((again,), _, _):
            assert await again.read(0, 1) == bytes(512)
        assert here.supervisor.failed
    assert "doomed: its worker was killed by SIGSEGV" in caplog.text


async def test_a_worker_that_stands_still_holds_nobody_up(tmp_path, monkeypatch):
    async with (
        world(tmp_path) as here,
        guest_on(here.path, "good") as ((disk,), _, _),
        guest_on(here.path, "stuck"),
    ):
        pid = await worker_of(here, "stuck")
        os.kill(pid, signal.SIGSTOP)
        await disk.write(0, bytes(512))
        answers, patience = {"good": False}, SOON
        while not answers["good"]:  # a slow machine needs longer for it
            monkeypatch.setattr(supervisor_module, "QUERY_PATIENCE", patience)
            answers = await answers_of(here)
            patience *= 2
        assert answers == {"good": True, "stuck": False}
        os.kill(pid, signal.SIGCONT)
        # It answers late what nobody waits for any more, and that is no mistake.
        monkeypatch.setattr(supervisor_module, "QUERY_PATIENCE", PATIENCE)
        assert await answers_of(here) == {"good": True, "stuck": True}


async def test_several_workers_may_be_killed_while_the_zygote_has_much_to_read(
    tmp_path, monkeypatch
):
    refusals = 3
    send = parcels.send_down

    def send_down(sock, message, *arguments):
        nonlocal refusals
        if "kill" in message and refusals:
            refusals -= 1
            raise BlockingIOError
        return send(sock, message, *arguments)

    monkeypatch.setattr(supervisor_module, "send_down", send_down)
    async with world(tmp_path) as here:
        with contextlib.ExitStack() as peers:
            for number in range(refusals):
                info = dataclasses.replace(INFO, vm_id=uuid.UUID(int=number + 1).bytes)
                await peers.enter_context(raw_vmm(tmp_path / "s")).attach(info=info)
            await here.until(refusals)
            for guest in (await here.supervisor.query("guests"))["guests"]:
                here.supervisor.kill(guest["pid"])
            await here.until(0)
    assert not refusals


async def test_a_worker_that_does_not_end_is_killed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(supervisor_module, "STOP_PATIENCE", SOON)
    async with world(tmp_path) as here:
        # No guest that would go on talking to its server while the server waits.
        with raw_vmm(tmp_path / "s") as vmm:
            await vmm.attach()
            await here.until(1)
            (guest,) = (await here.supervisor.query("guests"))["guests"]
            os.kill(guest["pid"], signal.SIGSTOP)
    assert f"{guest['name']}: did not end by itself" in caplog.text


async def test_silent_connections_lock_nobody_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(supervisor_module, "MAX_GREETING", 3)
    async with world(tmp_path) as here:
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(raw_vmm(tmp_path / "s")) for _ in range(6)]
            async with guest_on(here.path) as (disks, _, _):
                assert len(disks) == 1
            with trio.fail_after(PATIENCE):
                assert await silent[0].receive() is None, "the oldest has gone"
    assert "a VMM that has not said who it is makes room for others" in caplog.text
    assert "SIGKILL" not in caplog.text


async def test_a_full_server_answers(tmp_path):
    plan = dataclasses.replace(PLAN, limits=ServerLimits(max_connections=1))
    async with world(tmp_path, plan) as here:
        async with guest_on(here.path, "first"):
            with raw_vmm(tmp_path / "s") as vmm:
                hello = Hello(1, 1, 0, 1, Role.VMM, "second").encode()
                code, text = await vmm.refused(Number.HELLO, hello)
                assert "this server has its 1 guest(s), the limit" in text
                assert (code, True) == (
                    errno.EAGAIN,
                    True,
                )
        await here.until(0)
        async with guest_on(here.path, "second"):
            pass


async def test_names_and_ids_are_unique_over_all_processes(tmp_path):
    async with world(tmp_path):
        first = Hello(1, 1, 0, 1, Role.VMM, "a").encode()
        second = Hello(1, 1, 0, 1, Role.VMM, "b").encode()
        info = VmInfo(1, 4096, bytes(15) + b"\x07", 0, 0).encode()
        with raw_vmm(tmp_path / "s") as one, raw_vmm(tmp_path / "s") as two:
            await one.ok(Number.HELLO, first)
            assert (await two.refused(Number.HELLO, first))[0] == errno.EBUSY
            await two.ok(Number.HELLO, second)
            await one.ok(Number.VM_INFO, info)
            assert (await two.refused(Number.VM_INFO, info))[0] == errno.EBUSY
            one.close()
            with trio.fail_after(PATIENCE):
                while True:  # until the first one's end is known
                    answer = await two.ask(Number.VM_INFO, info)
                    if not answer.flags & 2:
                        break


async def test_the_name_of_a_socket_is_the_guests(tmp_path):
    async with world(tmp_path, given="alice") as here, guest_on(here.path, "mallory"):
        (guest,) = (await here.supervisor.query("guests"))["guests"]
        assert guest["name"] == "alice"


async def test_hot_plug_stays_within_what_is_allowed(tmp_path):
    if not landlock_version():
        pytest.skip("this kernel has no Landlock")
    allowed, private, own = tmp_path / "allowed", tmp_path / "private", tmp_path / "own"
    for each in (allowed, private, own):
        each.mkdir()
        (each / "x.img").write_bytes(bytes(1 << 20))
    (allowed / "way.img").symlink_to(private / "x.img")
    named = f"raw:[create=1M]{own}/named.img"
    plan = Plan(setups=(DeviceSetup("storvsp", (named,)),), allowed=(str(allowed),))
    async with world(tmp_path, plan) as here, guest_on(here.path) as ((disk,), _, _):
        await disk.write(0, b"z" * 512)
        add = {"backend": "disk", "action": "add"}
        added = await here.supervisor.command({**add, "spec": f"raw:{allowed}/x.img"})
        assert added == {"address": "0:0:1"}
        for path in (f"{private}/x.img", f"{allowed}/way.img", "/etc/passwd"):
            with pytest.raises(ConfigError, match="Permission denied"):
                await here.supervisor.command({**add, "spec": f"raw:[ro,share]{path}"})
    assert (own / "named.img").read_bytes()[:512] == b"z" * 512


async def test_what_guests_share_is_opened_by_nobody_but_its_keeper(tmp_path):
    if not landlock_version():
        pytest.skip("this kernel has no Landlock")
    place = tmp_path / "place"
    place.mkdir()
    (place / "s.img").write_bytes(bytes(1 << 20))
    plan = Plan(setups=(DeviceSetup("storvsp", (f"raw:[shared]{place}/s.img",)),), allowed=())
    async with world(tmp_path, plan) as here, guest_on(here.path) as ((disk,), _, _):
        await disk.write(0, b"z" * 512)
        spec = f"raw:[ro,share]{place}/s.img"
        with pytest.raises(ConfigError, match="Permission denied"):
            await here.supervisor.command({"backend": "disk", "action": "add", "spec": spec})


async def test_the_end_of_the_zygote_is_the_end_of_the_server_and_no_hang(tmp_path):
    with pytest.raises((AttachError, BaseExceptionGroup)) as caught:
        async with world(tmp_path) as here, guest_on(here.path):
            pid = await worker_of(here, "vm")
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                zygote = int(file.read().rpartition(")")[2].split()[1])
            os.kill(zygote, signal.SIGKILL)
            with trio.fail_after(PATIENCE):
                await trio.sleep_forever()
    assert isinstance(leaf(caught.value), AttachError)


def test_a_limit_that_nothing_would_keep_is_refused():
    with pytest.raises(ConfigError, match="there is none"):
        dataclasses.replace(PLAN, sandbox=False, allowed=("/",))


async def test_processes_that_cannot_be_started_are_said(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises((AttachError, BaseExceptionGroup)) as caught:
        async with Supervisor.open(PLAN):
            raise AssertionError("nothing can be served")
    assert isinstance(leaf(caught.value), AttachError)


async def test_a_worker_has_nothing_of_the_servers_and_is_known(tmp_path):
    async with world(tmp_path) as here, guest_on(here.path):
        pid = await worker_of(here, "vm")
        files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
        assert files == ["/dev/null"] * 3
        assert os.getsid(pid) != os.getsid(0)
        known = Peer(pid, os.getuid(), os.getgid())
        assert here.supervisor.is_own(known)
        assert not here.supervisor.is_own(Peer(os.getpid(), os.getuid(), os.getgid()))
        os.kill(pid, signal.SIGKILL)
        await until(lambda: pid not in here.supervisor._workers)
        assert here.supervisor.is_own(known), "what it has connected may live on"


async def test_one_guest_may_be_all(tmp_path):
    with open_listener(tmp_path / "s") as listener:
        async with Supervisor.open(PLAN) as supervisor:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(supervisor.serve, listener, exit_after_guest=True))
                with raw_vmm(tmp_path / "s"):
                    pass  # it was no guest
                async with guest_on(str(tmp_path / "s")):
                    pass
            assert supervisor.served == 1


async def test_a_refused_vmm_is_told_why(tmp_path):
    plan = Plan(setups=(DeviceSetup("storvsp", (f"raw:{tmp_path}/missing.img",)),))
    async with world(tmp_path, plan) as here:
        with pytest.raises((RefusedError, BaseExceptionGroup)) as caught:
            async with guest_on(here.path):
                raise AssertionError("it has no disk")
        assert isinstance(leaf(caught.value), RefusedError)
        await until(lambda: here.supervisor.failed)


SHARED = (DeviceSetup("storvsp", ("ram:[shared]4M", "ram:1M")),)


def reserve(action: int, key: int, new: int = 0) -> tuple[bytes, bytes]:
    """PERSISTENT RESERVE OUT for exclusive access, SPC-4 6.16."""
    cdb = bytes.fromhex(f"5f {action:02x} 03 00 00 00 00 00 18 00")
    return cdb, key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes(8)


async def use_a_shared_disk(path: str) -> None:
    """Two guests, one disk: data, reservations, and what each has for itself."""
    async with guest_on(path, "a") as (a, _, _), guest_on(path, "b") as (b, _, _):
        assert [disk.size for disk in a] == [4 << 20, 1 << 20]
        await a[0].write(0, b"s" * 4096)
        assert await b[0].read(0, 8) == b"s" * 4096
        await a[1].write(0, b"own" + bytes(509))
        assert await b[1].read(0, 1) == bytes(512)
        for action, key, new in ((0, 0, 1), (1, 1, 0)):  # REGISTER, RESERVE
            cdb, parameters = reserve(action, key, new)
            await a[0].command("reserve", cdb, write=parameters)
        refused = await b[0].execute(bytes.fromhex("28 00 00000000 00 0001 00"), read=512)
        assert refused.scsi_status == 0x18
        await a[0].read(0, 1)
    async with guest_on(path, "b") as (b, _, _):
        # The guest that has the reservation is gone, and still has it.
        refused = await b[0].execute(bytes.fromhex("28 00 00000000 00 0001 00"), read=512)
        assert refused.scsi_status == 0x18


async def test_guests_share_one_unit_wherever_they_are_served(tmp_path):
    async with world(tmp_path, Plan(setups=SHARED)) as here:
        await use_a_shared_disk(here.path)
        async with guest_on(here.path, "c"):
            (guest,) = (await here.supervisor.query("guests"))["guests"]
            (shared, own) = guest["devices"][0]["units"]
            assert (shared["shared"], shared["source"]) == (True, "ram:[shared]4M")
            assert "shared" not in own
            with pytest.raises(ConfigError, match="only disks that the server was started with"):
                await here.supervisor.command(
                    {"backend": "disk", "action": "add", "spec": "ram:[shared]1M"}
                )


async def test_a_keeper_that_dies_is_a_lost_disk_and_comes_back_for_others(tmp_path, caplog):
    async with (
        world(tmp_path, Plan(setups=SHARED)) as here,
        guest_on(here.path, "a") as (a, _, _),
    ):
        (keeper,) = here.supervisor.keeping.workers.values()
        os.kill(keeper.pid, signal.SIGKILL)
        with trio.fail_after(PATIENCE):
            await keeper.gone.wait()
        lost = await a[0].execute(bytes.fromhex("28 00 00000000 00 0001 00"), read=512)
        while lost.scsi_status == 0:
            lost = await a[0].execute(bytes.fromhex("28 00 00000000 00 0001 00"), read=512)
        assert lost.sense[12:14] == b"\x08\x00"
        await a[1].read(0, 1)
        async with guest_on(here.path, "b") as (b, _, _):
            await b[0].read(0, 1)
    assert "ram:[shared]4M: its worker was killed by SIGKILL" in caplog.text


async def test_a_shared_disk_that_cannot_be_opened_refuses_guests(tmp_path):
    setups = (DeviceSetup("storvsp", (f"raw:[shared]{tmp_path}/missing.img",)),)
    async with world(tmp_path, Plan(setups=setups)) as here:
        for _ in range(3):
            with raw_vmm(tmp_path / "s") as vmm:
                hello = Hello(1, 1, 0, 1, Role.VMM, "vm").encode()
                code, text = await vmm.refused(Number.HELLO, hello)
                assert code == errno.EIO
                assert "missing.img" in text
        # Nothing is left of what could not be opened but the worker that is ready for the next.
        await until(lambda: len(here.supervisor._workers) == 1)
    named = (DeviceSetup("storvsp", ("raw:[shared]{guest}.img",)),)
    with pytest.raises(ConfigError, match="no guest's name in it"):
        async with Supervisor.open(Plan(setups=named)):
            raise AssertionError("it cannot be shared")
