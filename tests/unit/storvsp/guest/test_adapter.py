"""The Python guest's storage driver against a scripted controller."""

from __future__ import annotations

import struct

import pytest
import trio

from storvsp.guest import HABITS, AttachError, ScsiError, attach, scan
from tests.support.fake_host import Machine, cancelled, offer, poll_monitor
from tests.support.fake_storage import BLOCK, INSTANCE, Storage, answer, sense
from tests.support.patience import LOOK
from tests.support.storage_guest import attached
from vmbus.guest import (
    FREEBSD,
    HAIKU,
    LINUX_6_1,
    MACOS,
    OPENBSD,
    PERSONALITIES,
    UEFI,
    GuestPanic,
    boot,
)
from vmbus.wire.guids import CLASS_FIBRE_CHANNEL, CLASS_IDE

ALL = pytest.mark.parametrize("personality", PERSONALITIES.values(), ids=str)


@ALL
async def test_every_personality_finds_the_disks_and_uses_them(personality):
    """Checklist rows 21, 26."""
    storage = Storage(Machine(pages=16384).host)
    machine = storage.host.machine
    async with boot(machine, personality) as guest, trio.open_nursery() as nursery:
        nursery.start_soon(poll_when_needed, machine, personality)
        (found,) = await guest.connection.connect()
        adapter = await attach(guest, found, contiguous=False)
        disks = await scan(adapter)
        assert [(d.path, d.target, d.lun, d.size) for d in disks] == [
            (0, 0, 0, 64 * BLOCK),
            (0, 0, 3, 16 * BLOCK),
        ]
        data = bytes(range(256)) * 4
        await disks[1].write(3, data, fua=True)
        assert await disks[1].read(3, 2) == data
        await disks[1].flush()
        assert storage.units[0, 3][3 * BLOCK : 5 * BLOCK] == data
        await adapter.close()
        await guest.connection.unload()
        nursery.cancel_scope.cancel()
    first = storage.log[0]
    habits = HABITS[personality.key]
    assert len(first) == habits.init_size
    version = max(v for v in habits.versions if v in storage.versions)
    assert adapter.version == version
    assert repr(adapter).startswith("<StorvscAdapter")
    assert repr(disks[0]) == "<GuestDisk 0:0:0, 32768 bytes>"
    assert disks[0].device_type == 0


async def poll_when_needed(machine, personality) -> None:
    if personality.uses_monitor:
        while not machine.host.monitor_page:
            await trio.sleep(LOOK)
        await poll_monitor(machine)


async def test_an_ide_disk_is_at_the_target_its_guid_names():
    storage = Storage(Machine().host, class_id=CLASS_IDE)
    instance = INSTANCE.bytes_le[:4] + b"\x01\x00" + INSTANCE.bytes_le[6:]
    machine = storage.host.machine
    storage.host.offers = [
        offer(1, class_id=CLASS_IDE, instance_id=type(INSTANCE)(bytes_le=instance))
    ]
    storage.units = {(1, 0): bytearray(BLOCK)}
    async with boot(machine, LINUX_6_1) as guest:
        (found,) = await guest.connection.connect()
        (disk,) = await scan(await attach(guest, found))
        assert disk.target == 1


async def test_a_fibre_channel_adapter_names_its_ports():
    storage = Storage(Machine().host, class_id=CLASS_FIBRE_CHANNEL)
    async with attached(storage=storage) as (adapter, _):
        assert adapter.fibre_channel is not None
        assert adapter.fibre_channel.port_name == b"port...."


async def test_haiku_is_refused_6_1_and_takes_6_0():
    """Checklist row 25."""
    async with attached(HAIKU) as (adapter, storage):
        assert adapter.version == 0x600
        asked = [p[12:14] for p in storage.log if p[0] == 9]
        assert asked == [b"\x01\x06", b"\x00\x06"]


async def test_old_versions_use_short_packets_and_less_sense():
    storage = Storage(Machine().host)
    storage.versions = {0x402}
    async with attached(FREEBSD, storage=storage) as (adapter, _):
        assert adapter.version == 0x402
        storage.replies[0x28] = answer(0x84, 2, sense(5, 0x2000))
        result = await adapter.execute(b"\x28" + bytes(9), read=512)
        assert not result.good
        assert (result.sense_key, result.asc) == (5, 0x2000)
        assert len(storage.log[-1]) == 48
        storage.replies[0x28] = answer(0x84, 2, sense(5, 0x2000).ljust(19, b"\0"))
        with pytest.raises(GuestPanic, match="19 bytes of sense"):
            await adapter.execute(b"\x28" + bytes(9), read=512)


async def test_no_version_in_common_is_reported():
    storage = Storage(Machine().host)
    storage.versions = {0x200}
    with pytest.raises(ExceptionGroup) as caught:
        async with attached(LINUX_6_1, storage=storage):
            pass
    assert isinstance(caught.value.exceptions[0], AttachError)


@pytest.mark.parametrize("operation", [7, 8, 10, 12, 13])
async def test_a_refused_step_of_the_handshake_is_reported(operation):
    storage = Storage(Machine(vps=9).host, class_id=CLASS_FIBRE_CHANNEL, channels=1)
    storage.answers[operation] = struct.pack("<III", 1, 0, 0xC0000001).ljust(64, b"\0")
    with pytest.raises(ExceptionGroup) as caught:
        async with attached(storage=storage):
            pass
    assert isinstance(caught.value.exceptions[0], AttachError)


@pytest.mark.parametrize(
    ("personality", "change", "reason"),
    [
        (UEFI, {"versions": set(), "refusal": 0xC0000001}, "refused with 0xc0000001"),
        (UEFI, {"echo": 0x501}, "0x501 echoed"),
        (LINUX_6_1, {"properties": struct.pack("<IHHII8x", 0, 0, 0, 0, 0)}, "max_transfer"),
        (LINUX_6_1, {"properties": struct.pack("<IHHII8x", 0, 0, 0, 0, 65537)}, "max_transfer"),
        (OPENBSD, {"properties": struct.pack("<IHHII8x", 9, 0, 0, 0, 65536)}, "bus and target"),
        (LINUX_6_1, {"answers": {7: bytes(64)}}, "operation 0 instead"),
        (LINUX_6_1, {"answers": {7: bytes(56)}}, "56 bytes instead of 64"),
        (UEFI, {"answers": {7: bytes(40)}}, "answer of 40 bytes"),
        (
            LINUX_6_1,
            {"answers": {7: bytes(72)}},
            "of 72 bytes, there is room for 64: .*next packet",
        ),
    ],
)
async def test_a_wrong_handshake_crashes_the_guest(personality, change, reason):
    """Checklist rows 25 and 27."""
    storage = Storage(Machine().host)
    for name, value in change.items():
        setattr(storage, name, value)
    with pytest.raises(GuestPanic, match=reason):
        async with attached(personality, storage=storage):
            pass


async def test_sub_channels_carry_requests_and_are_closed_first():
    """Checklist row 17."""
    storage = Storage(Machine(vps=9).host, channels=8)
    async with attached(storage=storage) as (adapter, _):
        assert len(adapter.channels) == 9  # one for each other VP and the primary
        (disk, _) = await scan(adapter)
        async with trio.open_nursery() as nursery:
            for block in range(30):
                nursery.start_soon(disk.write, block, bytes([block]) * BLOCK)
        assert all(channel.interrupts for channel in adapter.channels)
        assert await disk.read(29, 1) == bytes([29]) * BLOCK
        await adapter.close()
    closed = [item.relid for item in storage.host.log if item.NAME == "CLOSECHANNEL"]
    assert closed == [17, 16, 15, 14, 13, 12, 11, 10, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extra_sub_channels": 1}, "3 sub-channels offered, 2 wanted"),
        ({"first_sub_channel": 2}, "sub-channel 2 where 1 was due"),
    ],
)
async def test_sub_channels_have_to_be_as_many_as_asked_for(change, reason):
    """Checklist row 17."""
    storage = Storage(Machine(vps=2).host, channels=8)
    for name, value in change.items():
        setattr(storage, name, value)
    with pytest.raises(GuestPanic, match=reason):
        async with attached(storage=storage, sub_channels=2):
            pass


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (answer(1, 0, length=513), "513 bytes transferred"),
        (answer(0x81, 0, length=512), "no flag bits"),
        (answer(0, 0), "FreeBSD panics"),
        (answer(3, 0), "FreeBSD panics"),
        (answer(0x83, 0), "FreeBSD panics"),
        (answer(1, 2), "success with scsi_status"),
        (answer(0xA0, 0), "absent unit"),
        (answer(0x20, 2), "absent unit"),
        (answer(0x20, 0, length=1), "absent unit"),
        (answer(4, 2), "instead of 0x84"),
        (answer(0x84, 2), "sense data announced"),
        (answer(0x84, 2, b"\x72"), "sense data announced"),
        (answer(0x84, 2, bytes(20))[:21] + b"\x15" + bytes(42), "21 bytes of sense"),
        (answer(1, 0)[:21] + b"\x15" + bytes(42), "21 bytes of sense"),
        (answer(1, 0, status=1), "status 0x1 in"),
        (b"\x02" + answer(1, 0)[1:], "operation 2"),
        (answer(1, 0)[:48], "48 bytes instead of 64"),
    ],
)
async def test_a_wrong_answer_to_a_command_crashes_the_guest(reply, reason):
    """Checklist rows 11, 21, 22 and 23."""
    with pytest.raises(GuestPanic, match=reason):
        async with attached() as (adapter, storage):
            storage.replies[0x28] = reply
            await adapter.execute(b"\x28" + bytes(9), read=512)


@pytest.mark.parametrize(
    "reply",
    [answer(4, 8), answer(5, 0), answer(0x20, 0), answer(0x84, 2, sense(3, 0x1100))],
)
async def test_failures_are_results_and_errors_of_the_disk(reply):
    async with attached() as (adapter, storage):
        disk, _ = await scan(adapter)
        storage.replies.update({0x28: reply, 0x2A: reply, 0x35: reply})
        with pytest.raises(ScsiError, match="READ of 1 blocks at 0") as caught:
            await disk.read(0, 1)
        assert caught.value.result.absent == (reply[14] == 0x20)
        with pytest.raises(ScsiError, match="WRITE of 1"):
            await disk.write(0, bytes(BLOCK))
        with pytest.raises(ScsiError, match="SYNCHRONIZE CACHE"):
            await disk.flush()


async def test_short_transfers_are_errors_of_the_disk():
    async with attached() as (adapter, storage):
        disk, _ = await scan(adapter)
        storage.replies.update({0x28: answer(1, 0, length=8), 0x2A: answer(1, 0, length=8)})
        with pytest.raises(ScsiError):
            await disk.read(0, 1)
        with pytest.raises(ScsiError):
            await disk.write(0, bytes(BLOCK))
        with pytest.raises(ValueError, match="whole blocks"):
            await disk.write(0, b"short")


async def test_large_transfers_are_split_and_may_start_anywhere_in_a_page():
    storage = Storage(Machine(pages=16384).host)
    storage.properties = struct.pack("<IHHII8x", 0, 0, 0, 0, 65536)
    storage.units = {(0, 0): bytearray(600 * BLOCK)}
    async with attached(storage=storage, contiguous=False) as (adapter, _):
        (disk,) = await scan(adapter)
        data = bytes(n * n % 251 for n in range(600 * BLOCK))
        await disk.write(0, data)
        assert await disk.read(0, 600) == data
        cdb = struct.pack(">BBIBHB", 0x28, 0, 1, 0, 20, 0)
        result = await disk.execute(cdb, read=20 * BLOCK, offset=3000)
        assert result.data == data[BLOCK : 21 * BLOCK]
        cdb = struct.pack(">BBIBHB", 0x2A, 0, 1, 0, 20, 0)
        assert (await disk.execute(cdb, write=bytes(20 * BLOCK), offset=4000)).good
        assert not any(storage.units[0, 0][BLOCK : 21 * BLOCK])


async def test_big_disks_are_asked_and_addressed_with_16_bytes():
    storage = Storage(Machine().host)
    storage.capacity_16 = True
    async with attached(storage=storage) as (adapter, _):
        disk, _ = await scan(adapter)
        assert disk.size == 64 * BLOCK
        with pytest.raises(ScsiError, match="5/21/00"):
            await disk.read(1 << 33, 1)
        assert storage.cdbs[-1][0] == 0x88


async def test_unmap_and_write_same_build_their_parameters():
    async with attached() as (adapter, storage):
        disk, _ = await scan(adapter)
        await disk.unmap([(1, 2), (1 << 40, 5)])
        assert storage.cdbs[-1] == struct.pack(">B6xHx", 0x42, 40)
        await disk.write_same(7, 9, bytes(BLOCK), unmap=True)
        assert storage.cdbs[-1] == struct.pack(">BBQIBB", 0x93, 8, 7, 9, 0, 0)
        await disk.write_same(7, 9, bytes(BLOCK))
        assert storage.cdbs[-1][1] == 0


async def test_notifications_reach_those_who_rescan():
    for personality, expected in ((LINUX_6_1, 1), (MACOS, 2), (OPENBSD, 0)):
        async with attached(personality) as (adapter, storage):
            rescans: list[bool] = []
            theirs = storage.host.channels[1]
            for operation in (11, 2, 14):
                theirs.send(6, struct.pack("<I", operation).ljust(64, b"\0"))
            assert await adapter.wait_notifications(3) == [11, 2, 14]
            adapter.on_rescan = lambda rescans=rescans: rescans.append(True)
            for operation in (11, 2):
                theirs.send(6, struct.pack("<I", operation).ljust(64, b"\0"))
            await adapter.wait_notifications(5)
            assert len(rescans) == expected


@pytest.mark.parametrize(
    ("kind", "operation", "tid", "flags", "reason"),
    [
        (6, 1, 0, 0, "COMPLETE_IO"),
        (6, 99, 0, 0, "99"),
        (7, 11, 0, 0, "packet of type 7"),
        (6, 11, 5, 0, "transaction id"),
        (6, 11, 0, 1, "completion wanted"),
        (11, 1, 0, 0, "not in flight"),
    ],
)
async def test_an_unsolicited_packet_crashes_the_guest(kind, operation, tid, flags, reason):
    """Checklist row 23."""
    with pytest.raises(GuestPanic, match=reason):
        async with attached() as (adapter, storage):
            payload = struct.pack("<I", operation).ljust(64, b"\0")
            storage.host.channels[1].send(kind, payload, tid, flags)
            await adapter.wait_notifications(1)


async def test_queue_depth_is_kept_and_nothing_is_lost():
    async with attached(queue_depth=4) as (adapter, storage):
        disk, _ = await scan(adapter)
        storage.holding = True
        done = []

        async def one(block: int) -> None:
            await disk.read(block, 1)
            done.append(block)

        async with trio.open_nursery() as nursery:
            for block in range(20):
                nursery.start_soon(one, block)
            await trio.testing.wait_all_tasks_blocked()
            assert adapter.channels[0].outstanding == 4
            storage.release()
        assert len(done) == 20


async def test_a_bus_reset_waits_for_all_that_is_in_flight():
    """Checklist row 24."""
    async with attached() as (adapter, storage):
        disk, _ = await scan(adapter)
        storage.holding = True
        order = []

        async def read() -> None:
            await disk.read(0, 1)
            order.append("read")

        async def reset() -> None:
            await adapter.reset_bus()
            order.append("reset")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            await cancelled(disk.execute, bytes(6))
            await cancelled(disk.read, 0, 1)
            nursery.start_soon(reset)
            await trio.testing.wait_all_tasks_blocked()
            reset_answer = storage.held.pop()
            assert reset_answer[2] == 0xFFFFFFFFFFFFFFFC
            reset_answer[0].send(11, *reset_answer[1:])
            await trio.testing.wait_all_tasks_blocked()
            assert order == []
            storage.release()
        assert sorted(order) == ["read", "reset"]
        storage.answers[6] = struct.pack("<III", 1, 0, 1).ljust(64, b"\0")
        with pytest.raises(AttachError, match="RESET_BUS"):
            await adapter.reset_bus()


async def test_a_rescinded_controller_ends_all_requests():
    async with attached(queue_depth=1) as (adapter, storage):
        disk, _ = await scan(adapter)
        storage.holding = True
        ended: list[object] = []

        async def read() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await disk.read(0, 1)
            ended.append(True)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            adapter.on_removed = lambda: ended.append("removed")
            storage.host.rescind(1)
        assert sorted(map(str, ended)) == ["True", "True", "True", "removed"]
        await adapter.guest.connection.wait_gone(1)


async def test_a_removal_without_anybody_watching_is_fine():
    async with attached() as (adapter, storage):
        storage.host.rescind(1)
        await adapter.guest.connection.wait_gone(1)
