"""The modules that an image needs, and their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.rig.images import module_order
from tests.guest.rig.packages import RigError


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


def test_a_module_that_newer_kernels_have_built_in_may_be_missing(modules):
    assert module_order(modules, ["crc32c_generic", "scsi_common"]) == [
        "kernel/scsi/scsi_common.ko.xz"
    ]


def test_a_directory_without_modules_is_named(tmp_path):
    with pytest.raises(RigError, match=r"no modules\.dep"):
        module_order(tmp_path, ["ext4"])
