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
    )
    made.save(tmp_path / "assets.json")

    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert load_assets() is None
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "assets.json"))
    assert load_assets() == made
