"""Images that are opened, made, locked, or refused with the reason."""

import errno
import fcntl
import os

import pytest

from storvsp.disks import linux
from storvsp.disks.raw import RawDisk
from storvsp.disks.specs import open_disk
from tests.support.disks import MIB
from tests.support.leaks import open_descriptors
from vmbus.errors import ConfigError


async def test_a_missing_image_is_created_sparse_and_found_again(tmp_path, caplog):
    path = tmp_path / "new.img"
    for _ in range(2):
        disk = await open_disk(f"raw:[create=8M]{path}")
        assert disk.info.size == 8 * MIB
        await disk.aclose()
    assert path.stat().st_blocks == 0
    assert not caplog.text
    # It may have been resized since, and its guest is to find it all the same.
    for create in ("4M", "16M"):
        disk = await open_disk(f"raw:[create={create}]{path}")
        assert disk.info.size == 8 * MIB
        await disk.aclose()
    assert caplog.text.count("has 8388608 bytes and is used as it is") == 2
    assert path.stat().st_size == 8 * MIB


async def test_a_writer_excludes_writers_and_readers_but_readers_share(image):
    before = open_descriptors(collect=True)
    writer = await RawDisk.open(image)
    for options in ("", "[ro]"):
        with pytest.raises(ConfigError, match=r"is in use: .*share"):
            await open_disk(f"raw:{options}{image}")
    with pytest.raises(ConfigError, match="in use"):
        await open_disk(f"cd:{image}")
    shared = await open_disk(f"raw:[share]{image}")
    await shared.aclose()
    await writer.aclose()
    readers = [await open_disk(f"raw:[ro]{image}") for _ in range(2)]
    with pytest.raises(ConfigError, match="is in use"):
        await RawDisk.open(image)
    for reader in readers:
        await reader.aclose()
    await (await RawDisk.open(image)).aclose()
    assert open_descriptors() == before


async def test_a_file_system_without_locks_is_named(image, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with pytest.raises(ConfigError, match=r"cannot lock \(No locks available\); \[share\] opens"):
        await RawDisk.open(image)
    await (await RawDisk.open(image, share=True)).aclose()


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("raw:", "'raw:': needs the path of an image"),
        ("cd:", "'cd:': needs the path of an ISO image"),
        ("raw:{tmp}/missing.img", "No such file or directory; raw:[create=SIZE]"),
        ("raw:[ro]{tmp}/missing.img", "missing.img: No such file or directory"),
        ("cd:{tmp}/missing.iso", "missing.iso: No such file or directory"),
        ("raw:[create=1M]{tmp}/no/dir.img", "No such file or directory"),
        ("raw:{tmp}", "neither a file nor a block device"),
        ("raw:/dev/null", "neither a file nor a block device"),
        ("raw:{tmp}/empty.img", "smaller than one sector; create=SIZE makes a new one$"),
        ("raw:[ro,create=1M]{tmp}/new.img", "this one is for reading only"),
        ("overlay:raw:[create=1M]{tmp}/new.img", "this one is for reading only"),
        ("cd:{tmp}/empty.img", "smaller than one sector$"),
        ("raw:[ro]{tmp}/empty.img", "smaller than one sector$"),
        ("raw:[create=100]{tmp}/new.img", "not a number of 512-byte sectors"),
        ("raw:[create=0]{tmp}/new.img", "not a number of 512-byte sectors"),
        ("raw:[sector=2048]{tmp}/new.img", "it can be 512 or 4096"),
        ("raw:[rw]{tmp}/new.img", "unknown option 'rw'"),
        ("cd:[ro]{tmp}/new.img", "unknown option 'ro'"),
    ],
)
async def test_images_that_cannot_be_opened_say_why_and_leave_nothing(tmp_path, spec, hint):
    (tmp_path / "empty.img").touch()
    before = open_descriptors(collect=True)
    with pytest.raises(ConfigError) as caught:
        await open_disk(spec.format(tmp=tmp_path))
    assert hint in str(caught.value) + "$"
    assert open_descriptors() == before
    assert os.listdir(tmp_path) == ["empty.img"]


@pytest.mark.parametrize(
    ("code", "options", "hint"),
    [
        (errno.EACCES, {}, "use raw:[ro]"),
        (errno.EROFS, {}, "use raw:[ro]"),
        (errno.EACCES, {"read_only": True}, "Permission denied"),
        (errno.EACCES, {}, "Permission denied"),
        (errno.EBUSY, {}, "is mounted or in use by the host"),
        (errno.EINVAL, {"direct": True}, "without direct I/O"),
        (errno.EINVAL, {}, "Invalid argument"),
    ],
)
async def test_what_the_kernel_refuses_says_what_to_do(image, monkeypatch, code, options, hint):
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if path == str(image) and (flags & os.O_RDWR or "raw:[ro]" not in hint):
            raise OSError(code, os.strerror(code))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError) as caught:
        await RawDisk.open(image, **options)
    assert hint in str(caught.value)


async def test_an_image_that_cannot_get_its_size_is_not_left_behind(tmp_path, monkeypatch):
    before = open_descriptors(collect=True)
    with pytest.raises(ConfigError, match=r"File too large|Invalid argument"):
        await RawDisk.open(tmp_path / "new.img", create=1 << 62)

    def busy(*_):
        raise OSError(errno.EAGAIN, "busy")

    monkeypatch.setattr(fcntl, "fcntl", busy)
    with pytest.raises(ConfigError, match="in use"):
        await RawDisk.open(tmp_path / "new.img", create=MIB)
    assert os.listdir(tmp_path) == []
    assert open_descriptors() == before


async def test_a_descriptor_is_closed_when_its_disk_cannot_be_made(image, monkeypatch):
    before = open_descriptors(collect=True)

    for error in (OSError(errno.EIO, "Input/output error"), RuntimeError("boom")):

        def fail(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(linux, "in_memory", fail)
            with pytest.raises((ConfigError, RuntimeError), match=r"Input/output error|boom"):
                await RawDisk.open(image)
        assert open_descriptors() == before
