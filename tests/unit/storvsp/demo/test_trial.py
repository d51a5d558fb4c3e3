"""The trials that the demo's guest makes of disks, in this process."""

from __future__ import annotations

import contextlib
import struct

import pytest
import trio

from storvsp import ScsiController
from storvsp.demo.trial import GRAIN, LARGE, CorruptionError, DiskTrial, Meter, fingerprint, insist
from storvsp.disks.fault import Fault, FaultDisk, FaultKind, Operation
from storvsp.disks.overlay import OverlayDisk
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk
from storvsp.disks.wrapper import DiskWrapper
from storvsp.guest import ScsiError, attach, scan
from storvsp.guest.replies import Result
from tests.support.patience import until
from vmbus.guest import LINUX_6_1, boot
from vmbus.host import open_bus
from vmbus.partition.loopback import LoopbackTransport
from vmbus.partition.soft_machine import SoftMachine

SIZE = 1 << 20


class LyingDisk(DiskWrapper):
    """Does everything with a straight face, and one thing wrong."""

    def __init__(self, base, lie):
        super().__init__(base)
        self.lie = lie

    def try_readv(self, offset, buffers):
        done = super().try_readv(offset, buffers)
        if self.lie == "bit" and offset <= 70 * 512 < offset + sum(map(len, buffers)):
            skip = 70 * 512 - offset
            for view in buffers:
                if skip < len(view):
                    view[skip] ^= 0x10
                    break
                skip -= len(view)
        return done

    def try_writev(self, offset, buffers, *, fua=False):
        if self.lie == "lost" and offset == 0:
            return True
        if self.lie == "astray":
            offset ^= LARGE
        return super().try_writev(offset, buffers, fua=fua)

    async def unmap(self, offset, length):
        if self.lie != "kept":
            await super().unmap(offset, length)


@contextlib.asynccontextmanager
async def trying(disk, *, depth=8, limit=SIZE, controller=None):
    """A trial of a disk that a guest has found; yields it and the phases that are over."""
    machine = SoftMachine(((0, 16 << 20),))
    controller = controller or ScsiController()
    controller.add_disk(disk)
    phases: list[Meter] = []
    with LoopbackTransport(machine.synic) as transport:
        async with (
            open_bus(transport, [controller]),
            boot(machine, LINUX_6_1) as guest,
        ):
            (offer,) = await guest.connection.connect()
            adapter = await attach(guest, offer, contiguous=False)
            (found,) = await scan(adapter)
            trial = DiskTrial(found, depth=depth, limit=limit, progress=phases.append)
            await trial.look()
            yield trial, phases
            await adapter.close()
            await guest.connection.unload()
    machine.close()


async def whole(trial):
    await trial.survey()
    await trial.write(0)
    await trial.read(0)
    await trial.mix(0.02)
    await trial.unmap()
    await trial.check()


def digest_of(data):
    """What the module says a digest is."""
    return fingerprint(
        b"".join(fingerprint(data[start : start + GRAIN]) for start in range(0, len(data), GRAIN))
    ).hex()


async def test_an_honest_disk_passes_and_every_byte_is_touched():
    disk = RamDisk(SIZE)
    async with trying(disk) as (trial, phases):
        assert (trial.writable, trial.unmaps, trial.label, trial.used) == (True, True, None, SIZE)
        await trial.survey()
        assert trial.digest == digest_of(bytes(SIZE))
        await whole(trial)
        assert trial.unmapped == SIZE // 4
        content = bytearray(SIZE)
        await disk.readv(0, [memoryview(content)])
        assert trial.digest == digest_of(content)
        assert not any(content[: SIZE // 4])
        assert all(any(content[at : at + 512]) for at in range(SIZE // 4, SIZE, 512))
    over = {meter.phase: meter for meter in phases if meter.over}
    assert list(over) == ["survey", "write", "read", "mixed", "check"]
    for name in ("survey", "write", "read", "check"):
        assert (over[name].requests, over[name].bytes) == (SIZE // LARGE, SIZE)
    assert over["mixed"].bytes == over["mixed"].requests * GRAIN


async def test_phases_go_on_until_their_time_is_over_and_tell_how_they_are_doing():
    async with trying(RamDisk(SIZE)) as (trial, phases):
        await trial.survey()
        await trial.write(0.25)
        meter = phases[-1]
        assert meter.over
        assert meter.seconds >= 0.25
        assert meter.bytes > SIZE
        assert [other for other in phases if other.phase == "write" and not other.over]
        await trial.check()


async def test_news_of_other_disks_does_not_disturb_a_trial():
    controller = ScsiController()
    async with trying(RamDisk(SIZE), controller=controller) as (trial, _):

        def news():
            controller.add_disk(RamDisk(SIZE))

        news()
        assert (await trial.disk.execute(bytes(6))).sense_key == 6  # TEST UNIT READY
        news()
        await trial.look()
        assert trial.unmaps
        for phase in (trial.survey(), trial.write(0), trial.unmap(), trial.check()):
            news()
            await phase


async def test_a_unit_that_has_nothing_but_news_is_given_up():
    asked = []

    async def only_news():
        asked.append(1)
        raise ScsiError("READ", Result(0x84, 2, bytes([0x70, 0, 6]) + bytes(15), 0, b""))

    with pytest.raises(ScsiError, match="sense 6/00/00"):
        await insist(only_news)
    assert 1 < len(asked) < 10


@pytest.mark.parametrize("lie", ["bit", "lost", "astray", "kept"])
async def test_a_disk_that_lies_is_found_out(lie):
    disk = LyingDisk(RamDisk(SIZE), lie)
    async with trying(disk) as (trial, _):
        with pytest.raises(CorruptionError, match=r"4 KiB at byte \d+ \(block \d+\) read as"):
            await whole(trial)


async def test_the_place_of_a_corruption_is_named():
    async with trying(LyingDisk(RamDisk(SIZE), "bit")) as (trial, _):
        await trial.survey()
        await trial.write(0)
        with pytest.raises(CorruptionError, match=r"at byte 32768 \(block 64\)"):
            await trial.read(0)


@pytest.mark.parametrize("operation", Operation)
async def test_an_error_of_the_disk_is_passed_on(operation):
    async with trying(FaultDisk(RamDisk(SIZE), Fault(on=operation))) as (trial, _):
        with pytest.raises(ScsiError):
            await whole(trial)


async def test_a_disk_that_hangs_is_not_told_to_make_progress(autojump_clock):
    fault = Fault(FaultKind.HANG, on=Operation.READ)
    disk = FaultDisk(RamDisk(SIZE), fault)
    async with trying(disk) as (trial, phases), trio.open_nursery() as nursery:
        nursery.start_soon(trial.survey)
        await until(lambda: fault.waiting)
        await trio.sleep(60)
        assert not phases
        disk.remove(fault)


async def test_more_workers_than_places_do_not_meet():
    async with trying(RamDisk(2 * GRAIN), depth=64) as (trial, _):
        await whole(trial)
        await trial.mix(0.05)
        await trial.check()
        assert trial.unmapped == 0


async def test_no_more_than_the_limit_is_used():
    disk = RamDisk(SIZE)
    async with trying(disk, limit=SIZE // 2) as (trial, _):
        await whole(trial)
        rest = bytearray(SIZE // 2)
        await disk.readv(SIZE // 2, [memoryview(rest)])
        assert not any(rest)


async def test_a_disk_with_large_sectors_is_tried_like_any_other():
    async with trying(RamDisk(SIZE, sector_size=4096)) as (trial, _):
        await whole(trial)


async def test_a_read_only_disk_is_known_as_one(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    async with trying(await RawDisk.open(path, read_only=True)) as (trial, _):
        assert (trial.writable, trial.unmaps) == (False, False)
        await trial.survey()
        await trial.check()


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (bytes(16 * 2048) + b"\x01CD001\x01".ljust(40) + b"MY_DISC".ljust(2008), "MY_DISC"),
        (bytes(64 * 2048), None),
        (bytes(4 * 2048), None),
    ],
)
async def test_a_cd_is_known_by_the_name_of_its_volume(tmp_path, content, label):
    path = tmp_path / "cd.iso"
    path.write_bytes(content)
    disk = await RawDisk.open(path, read_only=True, sector_size=2048, optical=True)
    async with trying(disk) as (trial, _):
        assert (trial.label, trial.writable) == (label, False)
        await trial.survey()
        await trial.check()


async def test_a_cd_that_cannot_be_read_has_no_name(tmp_path):
    path = tmp_path / "cd.iso"
    path.write_bytes(bytes(64 * 2048))
    disk = await RawDisk.open(path, read_only=True, sector_size=2048, optical=True)
    async with trying(FaultDisk(disk, Fault(on=Operation.READ))) as (trial, _):
        assert trial.label is None


async def test_an_overlay_passes_with_its_base_showing_through_first(capsys):
    base = RamDisk(SIZE)
    content = struct.pack("<Q", 7) * (SIZE // 8)
    await base.writev(0, [memoryview(bytearray(content))])
    async with trying(OverlayDisk(base, None)) as (trial, _):
        await trial.survey()
        assert trial.digest == digest_of(content)
        await trial.write(0)
        await trial.check()
    assert not capsys.readouterr().out
