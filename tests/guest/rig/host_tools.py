"""The programs of the guests' root file system, for this side of the wire: the same on both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.guest.rig.packages import run


@contextlib.contextmanager
def open_tools(image: Path, tree: Path) -> Iterator[Path]:
    """Mount it for the length of a ``with`` block; to be used with ``chroot``.

    Args:
        image: The file system, which is left as it is.
        tree: Where; made, and removed at the end.

    Raises:
        RigError: It cannot be mounted.
    """
    tree.mkdir(parents=True)
    run("mount", "-o", "ro,loop", image, tree)
    try:
        # Programs want devices, and a place for what they write.
        run("mount", "-t", "tmpfs", "tmp", tree / "tmp")
        for name in ("dev", "proc"):
            run("mount", "--bind", f"/{name}", tree / name)
        yield tree
    finally:
        run("umount", "-R", tree)
        tree.rmdir()
