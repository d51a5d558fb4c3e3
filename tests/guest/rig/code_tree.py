"""What goes into the outer machine of the repository and of Python, and nothing else."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.guest.rig.packages import RigError

DIRECTORIES = ("vmbus", "devices", "tests", "captures", "docs")
"""Of the repository's, those in which a new file counts before git is told of it."""


def repository_files(repository: Path) -> list[Path]:
    """Return the files of a repository, relative to it: what git knows, and new ones of ours.

    A root file system that somebody has unpacked beside them stays out, and so does everything that
    is no regular file: a copy of ``dev/full`` never ends.
    """
    names: set[str] = set()
    try:
        for options in (("--cached",), ("--others", "--exclude-standard", "--", *DIRECTORIES)):
            listed = subprocess.run(
                # Whoever owns the checkout, root may read it.
                ["git", "-c", f"safe.directory={repository}", "ls-files", "-z", *options],
                cwd=repository, check=True, capture_output=True, text=True,
            )  # fmt: skip
            names.update(filter(None, listed.stdout.split("\0")))
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        names.update(path.name for path in repository.iterdir())
        for directory in DIRECTORIES:
            names.update(
                str(path.relative_to(repository)) for path in (repository / directory).rglob("*")
            )
    return sorted(Path(name) for name in names if _is_plain(repository / name))


def _is_plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:  # deleted, and git does not know it yet
        return False


def copy_repository(repository: Path, target: Path) -> None:
    """Copy the files of a repository. Raises OSError."""
    target.mkdir(parents=True)
    for file in repository_files(repository):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / file, target / file)


def copy_tree(source: Path, target: Path, leave_out: Sequence[str]) -> None:
    """Copy a directory with its symbolic links, without devices, sockets and pipes.

    Args:
        source: The directory.
        target: Where its contents go.
        leave_out: Patterns of names.
    """
    unwanted = shutil.ignore_patterns(*leave_out)

    def ignore(directory: str, names: list[str]) -> set[str]:
        found = set(unwanted(directory, names))
        for name in names:
            mode = os.lstat(os.path.join(directory, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                found.add(name)
        return found

    shutil.copytree(source, target, symlinks=True, ignore=ignore, dirs_exist_ok=True)


def check_space(directory: Path, needed: int) -> None:
    """Raise RigError unless there are so many bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RigError(
            f"{directory} has {free >> 20} MiB free, and the outer machine's disk takes "
            f"{needed >> 20}; VMBUS_RIG_CACHE=DIRECTORY puts it elsewhere"
        )
