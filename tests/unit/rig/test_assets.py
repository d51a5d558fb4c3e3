"""What the rig has made, as the tests find it."""

from __future__ import annotations

from pathlib import Path

from tests.guest.rig.assets import ENVIRONMENT, Assets, load_assets


def test_the_tests_find_what_the_rig_has_made(tmp_path, monkeypatch):
    made = Assets(
        kernel=Path("vmlinuz"),
        initramfs=Path("initramfs"),
        root=Path("root"),
        scratch=Path("scratch"),
        emulator=Path("qemu"),
        release="6.1.0",
        ordinary_kernel=Path("ordinary-vmlinuz"),
        ordinary_initramfs=Path("ordinary-initramfs"),
        ordinary_release="6.1.1",
        dpdk=Path("dpdk"),
    )
    made.save(tmp_path / "assets.json")

    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert load_assets() is None
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "assets.json"))
    assert load_assets() == made
    assert made.ordinary().kernel == made.ordinary_kernel
    assert made.ordinary().initramfs == made.ordinary_initramfs
    assert (made.ordinary().release, made.ordinary().root) == ("6.1.1", made.root)
