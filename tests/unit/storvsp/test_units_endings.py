"""Disks and media that are taken away: nothing stays open, nothing is closed that is in use."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing

from storvsp import ScsiController
from storvsp.disk import Buffers, DiskInfo
from storvsp.disks.opening import identify
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk
from storvsp.disks.wrapper import DiskWrapper
from storvsp.plugin import PLUGIN
from tests.support.storage_line import SUCCESS, TEST_UNIT_READY, clear, line
from tests.support.worlds import read_10
from vmbus.errors import ConfigError, VMBusError


class Medium(DiskWrapper):
    """Memory full of one letter, as a CD; reads miss, and wait as a worker's do."""

    def __init__(self, letter: bytes = b"A", *, optical: bool = True) -> None:
        super().__init__(RamDisk(1 << 20, sector_size=2048 if optical else 512))
        self.base.try_writev(0, [memoryview(bytearray(letter * 65536))])
        self.optical = optical
        self.go = trio.Event()
        self.reading = 0
        self.closed = 0
        self.closed_in_use = False
        self.missed: Callable[[], None] = lambda: None

    @property
    def info(self) -> DiskInfo:
        return dataclasses.replace(super().info, optical=self.optical, removable=True)

    def try_readv(self, offset: int, buffers: Buffers) -> bool:
        self.missed()
        return False

    async def readv(self, offset: int, buffers: Buffers) -> None:
        self.reading += 1
        with trio.CancelScope(shield=True):
            await self.go.wait()
        self.reading -= 1
        self.base.try_readv(offset, buffers)

    async def flush(self) -> None:
        await self.go.wait()

    async def aclose(self) -> None:
        self.closed += 1
        self.closed_in_use |= bool(self.reading)


ENDINGS: dict[str, Callable[[ScsiController], Any]] = {
    "remove": lambda store: store.remove_disk((0, 0, 0)),
    "eject": lambda store: store.eject_medium((0, 0, 0)),
    "change": lambda store: store.insert_medium((0, 0, 0), Medium(), replace=True),
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_operator_who_loses_patience_leaves_no_disk_open(ending):
    store, disk = ScsiController(), Medium()
    store.add_disk(disk)
    async with line(store) as wire:
        await clear(wire)
        wire.start(read_10(0, 1), read=2048)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ENDINGS[ending], store)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert not disk.closed
        closing = trio.Event()

        async def close() -> None:
            await store.aclose()
            closing.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            await trio.testing.wait_all_tasks_blocked()
            assert not closing.is_set(), "it waits for what was begun"
            disk.go.set()
    assert (disk.closed, disk.closed_in_use) == (1, False)


async def test_an_error_that_nobody_waits_for_is_logged(caplog):
    class Failing(Medium):
        async def aclose(self) -> None:
            raise OSError("no more")

    store, disk = ScsiController(), Failing()
    store.add_disk(disk)
    async with line(store) as wire:
        await clear(wire)
        wire.start(read_10(0, 1), read=2048)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.remove_disk, (0, 0, 0))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        disk.go.set()
        await store.aclose()
    assert caplog.messages == ["a disk that was taken away could not be closed: no more"]


async def test_two_changes_of_one_drive_close_each_medium_once_and_not_in_use():
    store = ScsiController()
    first, second, third = (Medium(letter) for letter in (b"A", b"B", b"C"))
    place = store.add_disk(first)
    async with line(store) as wire:
        await clear(wire)
        wire.start(read_10(0, 1), read=2048)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            for medium in (second, third):
                nursery.start_soon(partial(store.insert_medium, place, medium, replace=True))
                await trio.testing.wait_all_tasks_blocked()
            first.go.set()
        await wire.replies()
        assert store.units.disk(place) is third
    await store.aclose()
    assert [disk.closed for disk in (first, second, third)] == [1, 1, 1]
    assert not any(disk.closed_in_use for disk in (first, second, third))


async def test_a_read_of_the_old_medium_never_gets_data_of_the_new_one():
    store, old, new = ScsiController(), Medium(b"A"), Medium(b"B")
    for disk in (old, new):
        disk.go.set()
    place = store.add_disk(old)
    async with line(store) as wire, trio.open_nursery() as nursery:
        await clear(wire)
        # The change comes between the turn in which reads miss and the one in which they begin.
        old.missed = lambda: nursery.start_soon(
            partial(store.insert_medium, place, new, replace=True, force=True)
        )
        for _ in range(2):
            wire.start(read_10(0, 1), read=2048)
        replies = [wire.reply(packet) for packet in await wire.replies()]
        assert len(replies) == 2
        assert not [each for each in replies if each.scsi_status == 0 and each.data[:1] == b"B"]
    await store.aclose()


async def test_nothing_is_put_behind_a_controller_that_has_left_the_bus(tmp_path):
    store = ScsiController()
    place = store.add_drive()
    await store.aclose()
    for add in (
        lambda: store.add_disk(RamDisk(1 << 20)),
        store.add_drive,
        lambda: store.units.drive_for_medium(place, replace=True),
    ):
        with pytest.raises(ConfigError, match="has left the bus"):
            add()
    medium = Medium()
    with pytest.raises(ConfigError, match="has left the bus"):
        await store.insert_medium(place, medium)
    assert medium.closed == 1


async def test_a_unit_that_somebody_removes_during_the_end_is_no_error():
    store, first = ScsiController(), Medium(optical=False)
    store.add_disk(first)
    store.add_disk(RamDisk(1 << 20))
    async with line(store) as wire:
        wire.start(read_10(0, 1), read=512)
        await trio.testing.wait_all_tasks_blocked()

        async def remove() -> None:
            with contextlib.suppress(ConfigError):  # the end was quicker
                await store.remove_disk((0, 0, 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.aclose)
            nursery.start_soon(remove)
            await trio.testing.wait_all_tasks_blocked()
            first.go.set()
    assert not store.units


async def test_a_lock_that_comes_during_the_flush_keeps_the_tray_closed():
    store, disk = ScsiController(), Medium(optical=False)
    store.add_disk(disk)
    async with line(store) as wire:
        eject = wire.start(bytes([0x1B, 0, 0, 0, 0x02, 0]))
        await trio.testing.wait_all_tasks_blocked()
        assert (await wire.command(bytes([0x1E, 0, 0, 0, 1, 0]))).srb_status == SUCCESS
        disk.go.set()
        (packet,) = await wire.replies()
        assert packet.transaction_id == eject
        assert wire.reply(packet).sense[12:14] == b"\x53\x02"
        assert (await wire.command(TEST_UNIT_READY)).srb_status == SUCCESS
    await store.aclose()


async def test_a_file_that_has_grown_outside_is_not_cut_off_unasked(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    store = ScsiController()
    place = store.add_disk(await RawDisk.open(image))
    with image.open("r+b") as file:
        file.truncate(4 << 20)
    with pytest.raises(ConfigError, match="has 4194304 bytes; 2097152 would cut off"):
        await store.resize_disk(place, 2 << 20)
    assert image.stat().st_size == 4 << 20
    await store.aclose()


def test_a_file_system_without_a_name_gives_its_files_none(tmp_path, monkeypatch):
    """NFS and FUSE: the same inode number may be on two of them."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"x")
    with path.open() as file:
        assert len(identify(file.fileno())) == 16
        monkeypatch.setattr("os.fstatvfs", lambda _fd: type("Vfs", (), {"f_fsid": 0}))
        assert identify(file.fileno()) == b""


HUGE = "9" * 5000


@pytest.mark.parametrize(
    "request_",
    [
        {"action": "add", "spec": f"ram:{HUGE}"},
        {"action": "add", "spec": "ram:99999999T"},
        {"action": "add", "spec": f"ram:[lun={HUGE}]1M"},
        {"action": "add", "spec": f"raw:[sector={HUGE}]x"},
        {"action": "add", "spec": "raw:[create=9999999T]x"},
        {"action": "add", "spec": "raw:a\0b"},
        {"action": "add", "spec": "raw:\ud800"},
        {"action": "add", "spec": "overlay:[scratch=\0]ram:1M"},
        {"action": "add", "spec": "overlay:" * 1500 + "ram:1M"},
        {"action": "add", "spec": "overlay:" * 40 + "ram:1M"},
        {"action": "insert", "address": "1", "spec": "cd:\0"},
        {"action": "insert", "address": "1", "spec": "cd:[lun=3]x"},
        {"action": "remove", "address": HUGE},
        {"action": "remove", "address": "0" * 30},
        {"action": "add", "spec": f"ram:[lun={'0' * 30}7]1M"},
        {"action": "resize", "address": "0", "size": HUGE},
        {"action": "resize", "address": "0", "size": "99999999T"},
    ],
    ids=lambda request: str(request)[:60],
)
async def test_odd_values_of_operators_are_their_mistakes(request_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = await PLUGIN.from_specs(
        ["ram:1M", "cd:"], instance_id=UUID(int=5), initiator="vm", options={}
    )
    with pytest.raises(VMBusError) as caught:
        await PLUGIN.command(store, request_)
    assert len(str(caught.value)) < 6000
    str(caught.value).encode()
    assert len(store.units) == 2
    assert list(tmp_path.iterdir()) == []
    await store.aclose()


@pytest.mark.parametrize("value", ["many", None, "1" * 5000])
async def test_odd_options_are_mistakes_too(value):
    with pytest.raises(ConfigError):
        await PLUGIN.from_specs(
            (), instance_id=UUID(int=5), initiator="vm", options={"max_subchannels": value}
        )


async def test_a_refused_disk_leaves_no_image(tmp_path):
    store = await PLUGIN.from_specs(["ram:1M"], instance_id=UUID(int=5), initiator="vm", options={})
    for request in (
        {"action": "add", "spec": f"raw:[lun=0,create=1M]{tmp_path}/x"},
        {"action": "insert", "address": "0", "spec": f"raw:[create=1M]{tmp_path}/x"},
    ):
        with pytest.raises(ConfigError):
            await PLUGIN.command(store, request)
    assert list(tmp_path.iterdir()) == []
    await store.aclose()
