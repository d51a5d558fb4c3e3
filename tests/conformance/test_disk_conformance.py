"""Every back-end, and every sensible stack of them, keeps the Disk contract."""

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from storvsp.disk import Disk
from storvsp.disks.delay import DelayDisk
from storvsp.disks.fault import Fault, FaultDisk, FaultKind
from storvsp.disks.overlay import OverlayDisk
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk
from storvsp.disks.specs import open_disk
from storvsp.disks.wrapper import DiskWrapper
from storvsp.testing import check_disk

SHARED_MEMORY = Path("/dev/shm")


async def check_specs(*specs: str) -> None:
    """Check what each specification opens; ``{n}`` in it becomes another number each time."""
    for spec in specs:
        numbers = itertools.count()

        async def make(spec: str = spec, numbers: Iterator[int] = numbers) -> Disk:
            return await open_disk(spec.format(n=next(numbers)))

        await check_disk(make)


@pytest.mark.parametrize(
    "spec", ["ram:8M", "ram:[sector=4096]8M", "ram:512", "ram:3K", "ram:65K", "ram:1T"]
)
async def test_a_ram_disk_keeps_the_contract(spec):
    await check_specs(spec)


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("size", ["4K", "100K", "3M"])
async def test_a_raw_image_keeps_the_contract(tmp_path, sector, size):
    await check_specs(f"raw:[create={size},sector={sector}]{tmp_path}/{{n}}.img")


async def test_a_raw_image_that_lives_on_keeps_the_contract(tmp_path):
    await check_disk(lambda: RawDisk.open(tmp_path / "disk.img", create=3 << 20))


async def test_a_read_only_raw_image_keeps_the_contract(tmp_path):
    (tmp_path / "disk.img").write_bytes(os.urandom(1 << 20))
    await check_specs(f"raw:[ro]{tmp_path}/disk.img", f"raw:[ro,share]{tmp_path}/disk.img")


async def test_a_raw_image_without_the_page_cache_keeps_the_contract(tmp_path):
    await check_specs(f"raw:[direct,create=3M]{tmp_path}/{{n}}.img")


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no tmpfs at /dev/shm")
async def test_a_raw_image_in_a_memory_file_system_keeps_the_contract():
    path = SHARED_MEMORY / f"vmbus-conformance-{os.getpid()}.img"
    try:
        await check_disk(lambda: RawDisk.open(path, create=3 << 20))
    finally:
        path.unlink(missing_ok=True)


async def test_a_memory_file_given_as_a_descriptor_keeps_the_contract():
    async def make() -> Disk:
        fd = os.memfd_create("disk")
        os.ftruncate(fd, 2 << 20)
        return RawDisk(fd)

    await check_disk(make)


@pytest.mark.root
@pytest.mark.parametrize("options", ["share", "direct"])
async def test_a_block_device_keeps_the_contract(loop_device, options):
    await check_specs(f"raw:[{options}]{loop_device}", f"raw:[ro]{loop_device}")


async def test_an_iso_image_keeps_the_contract(tmp_path):
    (tmp_path / "cd.iso").write_bytes(os.urandom(300 * 2048))
    await check_specs(f"cd:{tmp_path}/cd.iso")


@pytest.mark.parametrize("scratch", ["", "[scratch={tmp}]", "[scratch={tmp}/{{n}}.scratch]"])
@pytest.mark.parametrize("size", [3 << 20, 100 << 10, 512])
async def test_an_overlay_keeps_the_contract(tmp_path, scratch, size):
    (tmp_path / "base.img").write_bytes(content := os.urandom(size))
    await check_specs(f"overlay:{scratch.format(tmp=tmp_path)}raw:[ro]{tmp_path}/base.img")
    assert (tmp_path / "base.img").read_bytes() == content


async def test_an_overlay_of_large_sectors_keeps_the_contract():
    await check_specs("overlay:ram:[sector=4096]2M")


async def test_overlays_on_overlays_keep_the_contract(tmp_path):
    (tmp_path / "base.img").write_bytes(os.urandom(1 << 20))
    await check_specs(f"overlay:overlay:[scratch={tmp_path}]overlay:raw:[ro]{tmp_path}/base.img")


async def test_an_overlay_on_a_slow_base_and_a_slow_scratch_keeps_the_contract(autojump_clock):
    async def make() -> Disk:
        return OverlayDisk(
            DelayDisk(RamDisk(1 << 20), read=0.001), DelayDisk(RamDisk(1 << 20), write=0.001)
        )

    await check_disk(make)


async def test_a_slow_disk_keeps_the_contract(autojump_clock):
    await check_specs(
        "delay:[read=1ms]ram:1M",
        "delay:[write=1ms,flush=2ms,unmap=3ms]ram:1M",
        "delay:ram:1M",
    )


async def test_a_fault_disk_without_a_fault_in_reach_keeps_the_contract():
    await check_specs("fault:[count=0]ram:1M", "fault:[lba=999999]ram:1M")


async def test_a_wrapper_keeps_the_contract(tmp_path):
    async def make() -> Disk:
        return DiskWrapper(await RawDisk.open(tmp_path / "disk.img", create=1 << 20))

    await check_disk(make)


async def test_a_disk_that_fails_once_does_not_pass():
    async def make() -> Disk:
        return FaultDisk(RamDisk(1 << 20), Fault(FaultKind.SHORT, first=3, last=3))

    with pytest.raises(Exception, match="on purpose"):
        await check_disk(make)


@pytest.fixture
def loop_device(tmp_path):
    image = tmp_path / "loop.img"
    with image.open("wb") as file:
        file.truncate(3 << 20)
    try:
        device = subprocess.run(
            ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices: {error}")
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)
