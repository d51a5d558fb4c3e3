"""The parts of the rig for real kernels that need no kernel."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from tests.guest.rig.assets import ENVIRONMENT, Assets, load_assets
from tests.guest.rig.images import module_order
from tests.guest.rig.packages import RigError, building, kernel_files, run


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    folder = tmp_path / "6.1.0"
    folder.mkdir()
    (folder / "modules.dep").write_text(
        "kernel/scsi/scsi_mod.ko.xz: kernel/scsi/scsi_common.ko.xz\n"
        "kernel/scsi/scsi_common.ko.xz:\n"
        "kernel/hv/hv_vmbus.ko:\n"
        "kernel/scsi/hv-storvsc.ko: kernel/scsi/scsi_mod.ko.xz kernel/scsi/scsi_common.ko.xz "
        "kernel/hv/hv_vmbus.ko\n"
    )
    (folder / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    return folder


def test_modules_come_behind_what_they_need(modules):
    order = module_order(modules, ["hv_storvsc"])

    assert order[-1] == "kernel/scsi/hv-storvsc.ko"
    assert order.index("kernel/scsi/scsi_common.ko.xz") < order.index("kernel/scsi/scsi_mod.ko.xz")
    assert len(order) == 4


def test_a_module_is_listed_once(modules):
    order = module_order(modules, ["hv_vmbus", "hv_storvsc", "scsi_mod"])

    assert sorted(order) == sorted(set(order))


def test_what_the_kernel_has_built_in_is_no_file(modules):
    assert module_order(modules, ["ext4"]) == []


def test_a_module_that_is_not_there_is_named(modules):
    with pytest.raises(RigError, match="no module hv_netvsc"):
        module_order(modules, ["hv_netvsc"])


def test_a_directory_without_modules_is_named(tmp_path):
    with pytest.raises(RigError, match=r"no modules\.dep"):
        module_order(tmp_path, ["ext4"])


@pytest.mark.parametrize("image", ["boot/vmlinuz-6.1.0", "lib/modules/6.1.0/vmlinuz"])
def test_a_kernel_is_found_in_old_packages_and_new_ones(tmp_path, image):
    (tmp_path / "lib/modules/6.1.0").mkdir(parents=True)
    (tmp_path / "boot").mkdir()
    (tmp_path / image).write_bytes(lzma.compress(b""))

    assert kernel_files(tmp_path) == (tmp_path / image, tmp_path / "lib/modules/6.1.0")


def test_something_else_than_a_kernel_is_refused(tmp_path):
    with pytest.raises(RigError, match="not an unpacked kernel package"):
        kernel_files(tmp_path)


def test_what_is_built_is_built_once(tmp_path):
    target = tmp_path / "thing"
    for number in range(2):
        with building(target) as part:
            if part is not None:
                part.write_text(str(number))
    assert target.read_text() == "0"


def test_what_was_not_finished_is_not_there(tmp_path):
    target = tmp_path / "thing"
    with pytest.raises(RigError), building(target) as part:
        assert part is not None
        part.write_text("half")
        raise RigError("no more")
    assert not target.exists()
    with building(target) as part:
        assert part is not None
        assert not part.exists()
        part.write_text("whole")
    assert target.read_text() == "whole"


def test_a_program_that_fails_is_reported_with_its_words():
    with pytest.raises(RigError, match="exit code 3\nsome words"):
        run("sh", "-c", "echo some words; exit 3")
    with pytest.raises(RigError, match="not installed"):
        run("there-is-no-such-program")


def test_the_tests_find_what_the_rig_has_made(tmp_path, monkeypatch):
    made = Assets(
        kernel=Path("vmlinuz"),
        initramfs=Path("initramfs"),
        root=Path("root"),
        scratch=Path("scratch"),
        emulator=Path("qemu"),
        release="6.1.0",
    )
    made.save(tmp_path / "assets.json")

    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert load_assets() is None
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "assets.json"))
    assert load_assets() == made
