"""What of a repository and of Python goes into the outer machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.guest.rig.code_tree import check_space, copy_repository, copy_tree, repository_files
from tests.guest.rig.packages import RigError


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One with all that may lie about in one, but no git."""
    root = tmp_path / "repository"
    for name in ("vmbus/ring.py", "tests/test_ring.py", "Makefile", "rootfs/etc/passwd"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "rootfs/dev").mkdir()
    for directory in ("rootfs/dev", "tests"):
        os.mkfifo(root / directory / "full")
    return root


def names(found: list[Path]) -> list[str]:
    return [str(each) for each in found]


def git(repository: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=repository, check=True, capture_output=True)


def test_what_git_knows_and_new_files_of_ours_go_in(repository: Path, tmp_path: Path):
    git(repository, "init", "-q")
    (repository / ".gitignore").write_text("*.log\n")
    git(repository, "add", "-A", "--", "vmbus", "Makefile", ".gitignore")
    (repository / "tests/x.log").write_text("ignored")
    (repository / "notes.txt").write_text("lies about")
    expected = [".gitignore", "Makefile", "tests/test_ring.py", "vmbus/ring.py"]
    assert names(repository_files(repository)) == expected
    copy_repository(repository, tmp_path / "copy")
    copied = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert sorted(names([path.relative_to(tmp_path / "copy") for path in copied])) == expected
    assert (tmp_path / "copy/vmbus/ring.py").read_text() == "vmbus/ring.py"
    # One that is deleted in the work tree only is known to git, and is not there.
    (repository / "Makefile").unlink()
    assert "Makefile" not in names(repository_files(repository))


def test_without_git_the_projects_own_directories_go_in(
    repository: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(repository))
    found = names(repository_files(repository))
    assert found == ["Makefile", "tests/test_ring.py", "vmbus/ring.py"]


def test_a_tree_is_copied_without_what_is_no_file(repository: Path, tmp_path: Path):
    (repository / "link").symlink_to("nowhere")
    copy_tree(repository, tmp_path / "copy", ("Makefile", "etc"))
    copy = tmp_path / "copy"
    found = sorted(str(path.relative_to(copy)) for path in copy.rglob("*"))
    assert found == [
        "link", "rootfs", "rootfs/dev", "tests", "tests/test_ring.py", "vmbus", "vmbus/ring.py",
    ]  # fmt: skip
    assert (tmp_path / "copy/link").is_symlink()


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = SimpleNamespace(free=3 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    check_space(tmp_path, 3 << 20)
    with pytest.raises(RigError, match=r"has 3 MiB free, .* takes 4; VMBUS_RIG_CACHE"):
        check_space(tmp_path, 4 << 20)
