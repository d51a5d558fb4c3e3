"""Packages taken apart, and things that are built once."""

from __future__ import annotations

import lzma

import pytest

from tests.guest.rig.packages import RigError, building, kernel_files, run


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
