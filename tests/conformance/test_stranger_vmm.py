"""A VMM written from the document alone, the real server, and the Python guest between them.

The server is another process, ``vmbus serve``, as a user would start it; the VMM is
``tests/support/stranger_vmm.py``. Every test ends with the two of them in agreement: the VMM has
seen no rule broken, the server no error, and it stops with exit code 0.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from storvsp.guest import GuestDisk, StorvscAdapter, attach, scan
from tests.support.patience import PATIENCE
from tests.support.stranger_vmm import (
    ADD_MEM,
    CALL_FD,
    DIRECT,
    EBUSY,
    EEXIST,
    EINVAL,
    EMSGSIZE,
    ENOENT,
    ENOSYS,
    EPROTO,
    GOODBYE,
    HELLO,
    LOGGING,
    PAUSE,
    QUERY,
    REGION,
    REM_MEM,
    RESUME,
    SET_SINT_FD,
    SIGNAL_EVENT,
    SYNIC_STATE,
    VM_INFO,
    GoneError,
    RefusedError,
    StrangerVmm,
)
from vmbus.guest import LINUX_6_1, Guest, Region, boot
from vmbus.memory import create_memfd
from vmbus.wire.synic import HvStatus

MEBIBYTE = 1 << 20
TIERS = {"T0": LOGGING, "T1": CALL_FD | LOGGING, "T2": CALL_FD | DIRECT | LOGGING}
SLOW = "delay:[read=20ms,write=20ms]ram:16M"


class Server:
    """A running ``vmbus serve``."""

    def __init__(self, directory: Path, disk: str, *, stream: bool) -> None:
        self.socket = directory / "s"
        self.stream = stream
        self.log = directory / "log"
        self.stopping = False
        options = ["--stream"] if stream else []
        command = [sys.executable, "-m", "vmbus.cli", "serve", "--socket", str(self.socket)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, "--disk", disk, *options], stderr=log)

    def stop(self) -> None:
        """Ask it to stop, once."""
        if not self.stopping:
            self.stopping = True
            self.process.terminate()

    def attach(self, **options) -> StrangerVmm:
        return StrangerVmm(self.socket, stream=self.stream, **options)


@contextlib.contextmanager
def serving(directory: Path, disk: str = "ram:16M", *, stream: bool = False) -> Iterator[Server]:
    server = Server(directory, disk, stream=stream)
    try:
        yield server
        server.stop()
        assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in server.log.read_text()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def outlive(server: Server) -> None:
    """Have a second guest do slow work, which begins after all that the first has under way.

    This thread, and whoever lives in it, stands still meanwhile.
    """

    async def live() -> None:
        vmm = server.attach(vm_id=b"outlives".ljust(16))
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            adapter, disk = await start(guest)
            for block in range(5):
                await disk.write(block, bytes(512))
            await shut_down(guest, adapter)
        vmm.goodbye()

    thread = threading.Thread(target=trio.run, args=(live,))
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()


async def start(guest: Guest, **options) -> tuple[StorvscAdapter, GuestDisk]:
    (offer,) = await guest.connection.connect()
    adapter = await attach(guest, offer, **options)
    (disk,) = await scan(adapter)
    return adapter, disk


async def shut_down(guest: Guest, adapter: StorvscAdapter) -> None:
    await adapter.close()
    for channel in adapter.channels[1:]:
        await guest.connection.wait_gone(channel.relid)  # taken back with the first one
    await guest.connection.unload()
    guest.check_memory()


def contents(vmm: StrangerVmm) -> list[bytes]:
    return [bytes(region.view) for region in vmm.memory.regions]


def refusal(vmm: StrangerVmm, kind: int, payload: bytes = b"", fds=()) -> int:
    with pytest.raises(RefusedError) as caught:
        vmm.wire.request(kind, payload, fds)
    return caught.value.errno


# -- the whole way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["seqpacket", "stream"])
@pytest.mark.parametrize("tier", TIERS)
async def test_a_guest_reads_what_it_has_written_and_leaves(tmp_path, tier, stream):
    data = random.Random(1).randbytes(MEBIBYTE)
    with trio.fail_after(PATIENCE), serving(tmp_path, stream=stream) as server:
        vmm = server.attach(features=TIERS[tier], vp_count=8)
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            adapter, disk = await start(guest, contiguous=False)
            assert len(adapter.channels) > 1
            assert disk.size == 16 * MEBIBYTE
            await disk.write(5, data)
            await disk.flush()
            assert await disk.read(5, len(data) // 512) == data
            await shut_down(guest, adapter)
        vmm.settle()
        assert set(vmm.tiers) == {tier}
        assert vmm.credits == vmm.max_credits
        assert not vmm.event_ports
        assert not vmm.calls
        vmm.goodbye()
        assert vmm.log == []
        assert vmm.wire.faults == []


async def test_doorbells_may_come_as_messages(tmp_path):
    with trio.fail_after(PATIENCE), serving(tmp_path) as server:
        vmm = server.attach(signal_by_message=True)
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            adapter, disk = await start(guest)
            await disk.write(0, b"a" * 4096)
            assert await disk.read(0, 8) == b"a" * 4096
            assert vmm.sent[SIGNAL_EVENT] > 2
            await shut_down(guest, adapter)
        vmm.goodbye()
        assert vmm.wire.faults == []


@pytest.mark.parametrize("tier", TIERS)
async def test_a_channel_that_is_moved_interrupts_its_new_vp(tmp_path, tier):
    with trio.fail_after(PATIENCE), serving(tmp_path) as server:
        vmm = server.attach(features=TIERS[tier])
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            adapter, disk = await start(guest, sub_channels=0)
            (channel,) = adapter.channels
            for vp in (1, 0, 1):
                await guest.connection.modify_channel(channel, vp)
                vmm.vps.clear()
                await disk.read(0, 1)
                assert set(vmm.vps) == {vp}
            await shut_down(guest, adapter)
        vmm.goodbye()
        assert set(vmm.tiers) == {tier}
        assert vmm.wire.faults == []


async def test_flags_come_another_way_while_the_server_cannot_see_the_page(tmp_path):
    with trio.fail_after(PATIENCE), serving(tmp_path) as server:
        vmm = server.attach(features=TIERS["T2"], vp_count=1)
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            adapter, disk = await start(guest)
            await disk.read(0, 1)
            assert set(vmm.tiers) == {"T2"}
            vmm.tiers.clear()
            vmm.synic_state(0, siefp=1 << 51 | 1)
            await disk.read(0, 1)
            assert "T2" not in vmm.tiers
            vmm.settle()
            vmm.tiers.clear()
            vmm.synic_state(0)
            await disk.read(0, 1)
            assert set(vmm.tiers) == {"T2"}
            await shut_down(guest, adapter)
        vmm.goodbye()
        assert vmm.wire.faults == []


# -- interruptions ---------------------------------------------------------------------------------


class Load:
    """Writers that each fill a stripe of the disk, so that something is always in flight."""

    WRITERS, WRITES, BLOCKS = 8, 4, 16

    def __init__(self, disk: GuestDisk) -> None:
        self.disk = disk
        self.done = 0
        self.first = trio.Event()

    @staticmethod
    def pattern(writer: int, write: int) -> bytes:
        return bytes([1 + writer * Load.WRITES + write]) * (Load.BLOCKS * 512)

    async def run(self, writer: int) -> None:
        for write in range(self.WRITES):
            block = (writer * self.WRITES + write) * self.BLOCKS
            await self.disk.write(block, self.pattern(writer, write))
            self.done += 1
            self.first.set()

    async def check(self) -> None:
        for writer in range(self.WRITERS):
            for write in range(self.WRITES):
                block = (writer * self.WRITES + write) * self.BLOCKS
                assert await self.disk.read(block, self.BLOCKS) == self.pattern(writer, write)


@pytest.mark.parametrize("tier", TIERS)
async def test_a_paused_guest_is_left_alone_and_loses_nothing(tmp_path, tier):
    with trio.fail_after(PATIENCE), serving(tmp_path, SLOW) as server:
        vmm = server.attach(features=TIERS[tier])
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            adapter, disk = await start(guest)
            load = Load(disk)
            async with trio.open_nursery() as nursery:
                for writer in range(load.WRITERS):
                    nursery.start_soon(load.run, writer)
                await load.first.wait()
                # From here to the end of the block this thread, and so the guest, stands still.
                vmm.pause()
                vmm.settle()
                before, signals = contents(vmm), vmm.tiers.total()
                outlive(server)  # the disk is done with all that was in flight
                vmm.settle()
                assert contents(vmm) == before
                assert vmm.tiers.total() == signals
                region = vmm.add_memory(MEBIBYTE)
                vmm.remove_memory(region)
                assert refusal(vmm, PAUSE) == EPROTO
                vmm.resume()
                assert load.done < load.WRITERS * load.WRITES
            await load.check()
            await shut_down(guest, adapter)
        vmm.goodbye()
        assert vmm.wire.faults == []


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
@pytest.mark.parametrize("tier", TIERS)
async def test_a_reset_guest_boots_again_on_memory_that_is_its_own(tmp_path, tier, paused):
    with trio.fail_after(PATIENCE), serving(tmp_path, SLOW) as server:
        vmm = server.attach(features=TIERS[tier])
        machine = vmm.power_on()
        async with boot(machine, LINUX_6_1) as guest:
            _, disk = await start(guest)
            await disk.write(9000, b"kept" * 1024)
            load = Load(disk)
            async with trio.open_nursery() as nursery:
                for writer in range(load.WRITERS):
                    nursery.start_soon(load.run, writer)
                await load.first.wait()
                machine.off = True
                nursery.cancel_scope.cancel()
        assert load.done < load.WRITERS * load.WRITES
        if paused:
            vmm.pause()
        vmm.reset()
        assert not vmm.event_ports
        assert not vmm.calls
        for region in vmm.memory.regions:
            region.view[:] = b"\xa5" * region.size
        before = contents(vmm)
        outlive(server)
        vmm.settle()
        assert contents(vmm) == before
        if paused:
            vmm.resume()
        vmm.tiers.clear()
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            adapter, disk = await start(guest)
            assert await disk.read(9000, 8) == b"kept" * 1024
            await disk.write(0, b"new" * 512)
            assert await disk.read(0, 3) == b"new" * 512
            await shut_down(guest, adapter)
        assert set(vmm.tiers) == {tier}
        vmm.goodbye()
        assert vmm.credits <= vmm.max_credits
        assert vmm.wire.faults == []


@pytest.mark.parametrize("stream", [False, True], ids=["seqpacket", "stream"])
@pytest.mark.parametrize("tier", TIERS)
async def test_a_vmm_that_vanishes_may_come_back(tmp_path, tier, stream):
    name = bytes(range(16))
    with trio.fail_after(PATIENCE), serving(tmp_path, SLOW, stream=stream) as server:
        vmm = server.attach(features=TIERS[tier], vm_id=name)
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            load = Load((await start(guest))[1])
            async with trio.open_nursery() as nursery:
                for writer in range(load.WRITERS):
                    nursery.start_soon(load.run, writer)
                await load.first.wait()
                vmm.close()
                nursery.cancel_scope.cancel()
        assert vmm.wire.faults == []
        vmm = server.attach(features=TIERS[tier], vm_id=name)
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            adapter, disk = await start(guest)
            await disk.write(0, b"new" * 512)
            assert await disk.read(0, 3) == b"new" * 512
            await shut_down(guest, adapter)
        vmm.goodbye()
        assert vmm.wire.faults == []


async def test_a_vm_that_is_attached_is_not_attached_twice(tmp_path):
    with serving(tmp_path) as server:
        vmm = server.attach(vm_id=b"v" * 16)
        other = server.attach(vm_id=b"w" * 16)
        third = server.attach(vm_id=bytes(16))
        with pytest.raises(RefusedError) as caught:
            server.attach(vm_id=b"v" * 16, patience=0)
        assert caught.value.errno == EBUSY
        for each in (vmm, other, third):
            each.goodbye()
        server.attach(vm_id=b"v" * 16).goodbye()


@pytest.mark.parametrize("tier", TIERS)
async def test_a_server_that_stops_says_goodbye(tmp_path, tier):
    with trio.fail_after(PATIENCE), serving(tmp_path) as server:
        vmm = server.attach(features=TIERS[tier])
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            _, disk = await start(guest)
            await disk.write(0, bytes(512))
            server.stop()
            assert vmm.wire.gone.wait(PATIENCE)
            assert vmm.server_said_goodbye
            assert vmm.post_message(4, 1, 0, bytes(8)) == HvStatus.INVALID_CONNECTION_ID
            assert vmm.signal_event(guest.connection.offers[1].connection_id, 0) == (
                HvStatus.INVALID_CONNECTION_ID
            )
            with pytest.raises(GoneError):
                vmm.settle()
        vmm.close()
        assert vmm.wire.faults == []


# -- memory ----------------------------------------------------------------------------------------


async def test_memory_comes_and_goes(tmp_path):
    with trio.fail_after(PATIENCE), serving(tmp_path) as server:
        vmm = server.attach(features=CALL_FD, sizes=(8 * MEBIBYTE, 4 * MEBIBYTE))
        added = vmm.add_memory(16 * MEBIBYTE)
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            # Pages from all three regions, most of them from the one that came last.
            adapter, disk = await start(guest, contiguous=False)
            data = random.Random(2).randbytes(MEBIBYTE)
            await disk.write(0, data)
            assert await disk.read(0, len(data) // 512) == data
            await shut_down(guest, adapter)
        fd = create_memfd("another", MEBIBYTE)
        region = REGION.pack(added.gpa, MEBIBYTE, 0, 0, 0)
        assert refusal(vmm, ADD_MEM, region, [fd]) == EEXIST
        assert refusal(vmm, REM_MEM, struct.pack("<QQ", added.gpa, MEBIBYTE)) == ENOENT
        vmm.remove_memory(added)
        vmm.wire.request(ADD_MEM, region, [fd])
        vmm.wire.request(REM_MEM, struct.pack("<QQ", added.gpa, MEBIBYTE))
        os.close(fd)
        vmm.goodbye()
        assert vmm.wire.faults == []


async def test_a_new_table_with_the_old_regions_leaves_open_rings_alone(tmp_path):
    with trio.fail_after(PATIENCE), serving(tmp_path) as server:
        vmm = server.attach()
        async with boot(vmm.power_on(), LINUX_6_1) as guest:
            adapter, disk = await start(guest)
            vmm.map_memory(MEBIBYTE)
            vmm.set_memory_table()
            await disk.write(0, b"b" * 512)
            vmm.remove_memory(Region(*vmm.files[-1][:2]))
            vmm.set_memory_table()
            assert await disk.read(0, 1) == b"b" * 512
            await shut_down(guest, adapter)
        vmm.goodbye()
        assert vmm.wire.faults == []


# -- rules -----------------------------------------------------------------------------------------


async def test_a_guest_that_posts_without_end_runs_out_of_credits_and_gets_them_back(tmp_path):
    with serving(tmp_path) as server:
        vmm = server.attach(features=LOGGING)
        seen = {vmm.post_message(4, 1, 0, b"nonsense") for _ in range(2000)}
        assert HvStatus.SUCCESS in seen
        assert seen <= {HvStatus.SUCCESS, HvStatus.INSUFFICIENT_BUFFERS}
        assert vmm.post_message(5, 1, 0, b"") == HvStatus.INVALID_CONNECTION_ID
        assert vmm.post_message(4, 0, 0, b"") == HvStatus.INVALID_PARAMETER
        vmm.settle()
        vmm.goodbye()
        assert vmm.credits == vmm.max_credits
        assert vmm.log
        assert vmm.wire.faults == []


async def test_refusals_are_those_of_the_document(tmp_path):
    with serving(tmp_path) as server:
        vmm = server.attach()
        assert refusal(vmm, RESUME) == EPROTO
        assert refusal(vmm, HELLO) == EPROTO
        assert refusal(vmm, VM_INFO, bytes(40)) == EPROTO
        assert refusal(vmm, SYNIC_STATE, bytes(40)) == EPROTO
        assert refusal(vmm, 0x42) == ENOSYS
        assert refusal(vmm, 0x0D) == ENOSYS
        assert refusal(vmm, 0x84) == ENOSYS
        assert refusal(vmm, QUERY, b"a" * 65) == EMSGSIZE
        assert refusal(vmm, GOODBYE) == EMSGSIZE
        vmm.wire.post(0x4242, b"whatever")
        vmm.wire.post(SIGNAL_EVENT, struct.pack("<IHH", 77, 0, 0))
        vmm.settle()
        vmm.goodbye()
        vmm = server.attach(features=DIRECT)
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        assert refusal(vmm, SET_SINT_FD, struct.pack("<II", 0, 3), [fd]) == EINVAL
        assert refusal(vmm, SET_SINT_FD, struct.pack("<II", 2, 2), [fd]) == EINVAL
        os.close(fd)
        vmm.goodbye()
        assert vmm.wire.faults == []


async def test_the_other_socket_type_is_refused(tmp_path):
    with serving(tmp_path) as server:
        server.attach().goodbye()
        with pytest.raises(OSError, match="wrong type"):
            StrangerVmm(server.socket, stream=True)
