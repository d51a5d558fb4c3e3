"""The SCSI controller: addresses, disks that come and go, what it says of itself."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing

from storvsp import ScsiController
from storvsp.disk import Disk
from storvsp.disks.ram import RamDisk
from storvsp.disks.wrapper import DiskWrapper
from storvsp.scsi import DiskUnit
from vmbus.errors import ConfigError
from vmbus.testing import channel_pair
from vmbus.wire.guids import CLASS_SCSI


class Watched(DiskWrapper):
    """Counts what is done to it; can fail to close."""

    def __init__(self, base: Disk, *, error: Exception | None = None) -> None:
        super().__init__(base)
        self.closed = 0
        self.error = error

    async def aclose(self) -> None:
        self.closed += 1
        await super().aclose()
        if self.error is not None:
            raise self.error


def disk(**options: Any) -> Watched:
    return Watched(RamDisk(1 << 20), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_subchannels": -1},
        {"max_subchannels": 64},
        {"max_transfer_bytes": 65536 + 512},
        {"max_transfer_bytes": 32768},
        {"max_transfer_bytes": 256 << 20},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        ScsiController(**options)


def test_the_offer_is_what_was_asked_for():
    one = ScsiController(instance_id=UUID(int=5), max_subchannels=3, monitor=True)
    assert (one.offer.class_id, one.offer.instance_id) == (CLASS_SCSI, UUID(int=5))
    assert one.offer.max_subchannels == 3
    assert one.offer.monitor_latency
    other = ScsiController()
    assert other.offer.monitor_latency is None
    assert other.offer.instance_id != ScsiController().offer.instance_id
    assert other.units.initiator == other.offer.instance_id
    assert ScsiController(initiator="vm").units.initiator == "vm"


def test_disks_go_to_the_lowest_free_lun():
    controller = ScsiController()
    assert controller.add_disk(disk(), lun=1) == (0, 0, 1)
    assert [controller.add_disk(disk()) for _ in range(3)] == [(0, 0, 0), (0, 0, 2), (0, 0, 3)]
    assert controller.add_disk(disk(), path=7, target=1, lun=254) == (7, 1, 254)
    assert controller.add_disk(disk(), path=7, target=1) == (7, 1, 0)
    assert controller.units.luns(0, 0) == [0, 1, 2, 3]
    assert controller.units.luns(7, 1) == [0, 254]
    assert controller.units.luns(1, 0) == []


def test_a_full_target_takes_no_more():
    controller = ScsiController()
    for _ in range(255):
        controller.add_disk(RamDisk(4096))
    with pytest.raises(ConfigError, match="no guest looks"):
        controller.add_disk(RamDisk(4096))
    assert len(controller.units) == 255


@pytest.mark.parametrize(
    "place",
    [
        {"path": 8},
        {"path": -1},
        {"target": 2},
        {"target": -1},
        {"lun": 255},
        {"lun": -1},
        {"lun": 0},
    ],
    ids=str,
)
async def test_places_that_do_not_exist_or_are_taken_are_refused(place):
    controller = ScsiController()
    controller.add_disk(disk())
    spare = disk()
    with pytest.raises(ConfigError):
        controller.add_disk(spare, **place)
    # It is still the caller's.
    assert spare.closed == 0
    assert len(controller.units) == 1


async def test_a_disk_is_closed_when_it_is_removed_unless_it_belongs_to_others():
    controller = ScsiController()
    own, lent = disk(), disk()
    controller.add_disk(own)
    controller.add_disk(lent, owned=False)
    assert controller.units.disk((0, 0, 0)) is own
    await controller.remove_disk((0, 0, 0))
    await controller.remove_disk((0, 0, 1))
    assert (own.closed, lent.closed) == (1, 0)
    assert controller.units.disk((0, 0, 0)) is None
    with pytest.raises(ConfigError, match="nothing is at 0:0:0"):
        await controller.remove_disk((0, 0, 0))


async def test_a_unit_of_any_kind_can_be_there():
    controller = ScsiController()
    unit = DiskUnit(disk(), luns=lambda: [5], identity=bytes(16))
    assert controller.add_unit(unit, lun=5) == (0, 0, 5)
    assert list(controller.units) == [unit]
    assert controller.units.disk((0, 0, 5)) is None
    (found,) = controller.snapshot()["units"]
    assert (found["kind"], found["size"], found["read_only"]) == ("DiskUnit", None, None)
    with pytest.raises(ConfigError):
        await controller.resize_disk((0, 0, 5), 4096)
    await controller.remove_disk((0, 0, 5))


async def test_a_disk_is_resized_and_one_that_cannot_be_says_so():
    controller = ScsiController()
    ram = RamDisk(1 << 20)
    controller.add_disk(ram)
    assert await controller.resize_disk((0, 0, 0), 2 << 20) == 2 << 20
    assert ram.info.size == 2 << 20

    class Stiff(DiskWrapper):
        resize = None

    controller.add_disk(Stiff(RamDisk(1 << 20)))
    for lun in (1, 2):
        with pytest.raises(ConfigError):
            await controller.resize_disk((0, 0, lun), 4096)


async def test_a_resize_may_take_its_time():
    class Slow(DiskWrapper):
        async def resize(self, size: int) -> None:
            await trio.sleep(0)
            assert isinstance(self.base, RamDisk)
            await self.base.resize(size)

    controller = ScsiController()
    controller.add_disk(Slow(RamDisk(1 << 20)))
    assert await controller.resize_disk((0, 0, 0), 3 << 20) == 3 << 20


async def test_a_removed_disk_is_not_watched_any_more():
    controller = ScsiController()
    ram = RamDisk(1 << 20)
    controller.add_disk(ram, owned=False)
    await controller.remove_disk((0, 0, 0))
    told: list[int] = []
    controller.units.changed = lambda: told.append(1)
    await ram.resize(2 << 20)
    assert told == []


async def test_one_disk_that_cannot_be_closed_does_not_keep_the_others_open():
    controller = ScsiController()
    disks = [disk(), disk(error=OSError("stuck")), disk()]
    for each in disks:
        controller.add_disk(each)
    with pytest.raises(OSError, match="stuck"):
        await controller.aclose()
    assert [each.closed for each in disks] == [1, 1, 1]
    assert len(controller.units) == 0
    await controller.aclose()


async def test_the_identity_of_a_disk_stays_with_its_place():
    names = []
    for _ in range(2):
        controller = ScsiController(instance_id=UUID(int=5))
        controller.add_disk(disk())
        controller.add_disk(disk())
        units = list(controller.units)
        names.append([unit._identity.unique for unit in units])  # type: ignore[attr-defined]
    assert names[0] == names[1]
    assert names[0][0] != names[0][1]


async def test_a_snapshot_is_json_before_in_and_after_a_life():
    controller = ScsiController()
    controller.add_disk(disk())
    assert json.loads(json.dumps(controller.snapshot()))["stage"] == "not open"
    channel, _ = channel_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(controller.run, channel)
        await trio.testing.wait_all_tasks_blocked()
        found = json.loads(json.dumps(controller.snapshot()))
        assert found["stage"] == "BEGIN_INITIALIZATION"
        assert found["units"] == [
            {
                "address": "0:0:0",
                "size": 1 << 20,
                "kind": "Watched",
                "source": "",
                "read_only": False,
                "stopped": "",
                "no_space": 0,
                "commands": 0,
                "bytes_read": 0,
                "bytes_written": 0,
                "errors": 0,
            }
        ]
        channel.end()
    assert controller.snapshot()["stage"] == "not open"
    channel.close_doorbell()


async def test_the_end_of_a_life_is_told_to_the_units(monkeypatch: pytest.MonkeyPatch):
    controller = ScsiController(initiator="vm")
    controller.add_disk(disk())
    (unit,) = controller.units
    left: list[object] = []
    monkeypatch.setattr(unit, "detach", left.append)
    channel, _ = channel_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(controller.run, channel)
        await trio.testing.wait_all_tasks_blocked()
        channel.end()
    assert left == ["vm"]
    channel.close_doorbell()


async def test_mode_pages_that_a_guest_has_set_are_kept_beyond_the_process():
    one, other = ScsiController(), ScsiController()
    for controller in (one, other):
        controller.add_disk(RamDisk(1 << 20))
        controller.add_disk(RamDisk(1 << 20), path=1)
    unit = one.units.by_address[1, 0, 0]
    assert isinstance(unit, DiskUnit)
    assert unit.write_protection() is None
    unit.modes.store(0x0A, 4, 0x08)  # SWP
    saved = json.loads(json.dumps(one.save()))
    assert list(saved) == ["0:0:0", "1:0:0"]
    assert saved["0:0:0"] == {"modes": {}}
    other.restore(saved)
    first, second = other.units
    assert isinstance(first, DiskUnit)
    assert isinstance(second, DiskUnit)
    assert first.write_protection() is None
    assert second.write_protection() is not None


@pytest.mark.parametrize(
    "state",
    [
        {"0:0:7": {"modes": {}}},
        {"0:0:0": []},
        {"0:0:0": {}},
        {"0:0:0": {"modes": {"08": "zz"}}},
        {"0:0:0": {"modes": {"3e": "3e00"}}},
        {"0:0:0": {"modes": {"08": "0812"}}},
    ],
    ids=str,
)
def test_a_state_that_fits_no_unit_is_refused(state):
    controller = ScsiController()
    controller.add_disk(RamDisk(1 << 20))
    with pytest.raises(ConfigError, match="saved"):
        controller.restore(state)
