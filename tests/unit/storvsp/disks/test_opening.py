"""What is said aloud about a file that is opened as a raw image."""

from __future__ import annotations

import logging
import os

import pytest

from storvsp import open_disk
from storvsp.disks.opening import oddities


@pytest.mark.parametrize(
    ("name", "offset", "magic"),
    [
        ("qcow2", 0, b"QFI\xfb\0\0\0\3"),
        ("VHDX", 0, b"vhdxfile"),
        ("VHD", 0, b"conectix"),
        ("VHD", -512, b"conectix"),
        ("VMDK", 0, b"KDMV"),
        ("VMDK", 0, b"# Disk DescriptorFile\nversion=1"),
        ("VDI", 64, b"\x7f\x10\xda\xbe"),
        ("Parallels", 0, b"WithoutFreeSpace"),
    ],
)
async def test_an_image_of_another_format_is_opened_with_a_warning(
    tmp_path, caplog, name, offset, magic
):
    path = tmp_path / "disk.img"
    content = bytearray(8192)
    start = offset % len(content)
    content[start : start + len(magic)] = magic
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "storvsp"):
        disk = await open_disk(f"raw:{path}")
    assert caplog.messages == [
        f"{path}: it looks like a {name} image; as a raw one, the guest sees the format's own bytes"
    ]
    await disk.aclose()


@pytest.mark.parametrize(("spec", "sector"), [("raw:", 512), ("raw:[sector=4096]", 4096)])
async def test_a_tail_that_is_no_whole_sector_is_said(tmp_path, caplog, spec, sector):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(3 * sector + 100))
    with caplog.at_level(logging.WARNING, "storvsp"):
        disk = await open_disk(f"{spec}{path}")
    assert disk.info.size == 3 * sector
    assert caplog.messages == [
        f"{path}: the last 100 of its {3 * sector + 100} bytes are no whole sector of {sector} "
        "bytes, and not part of the disk"
    ]
    await disk.aclose()


@pytest.mark.parametrize("size", [512, 1024, 1 << 20])
def test_plain_images_have_nothing_odd_about_them(tmp_path, size):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(size))
    fd = os.open(path, os.O_RDONLY)
    assert oddities(fd, 512) == []
    os.close(fd)
