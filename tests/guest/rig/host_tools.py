"""The programs of the guests' root file system, for this side of the wire: the same on both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.guest.rig.internet import IPERF_PORT
from tests.guest.rig.namespaces import Namespace
from tests.guest.rig.packages import RigError, run
from tests.support.patience import until_in_thread


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


@contextlib.contextmanager
def serve_iperf(namespace: Namespace, tree: Path, log: Path) -> Iterator[None]:
    """Run a server for ``iperf3`` in a namespace for the length of a ``with`` block; it listens.

    Args:
        namespace: Where, at port :data:`~tests.guest.rig.internet.IPERF_PORT`.
        tree: Of :func:`open_tools`.
        log: A file for what it says, which nobody has to read.

    Raises:
        RigError: It has ended.
    """
    command = ("chroot", str(tree), "iperf3", "-s", "--forceflush", "-p", str(IPERF_PORT))
    with open(log, "wb") as output:
        process = namespace.start(*command, output=output.fileno())
    try:
        until_in_thread(lambda: process.poll() is not None or b"listening" in log.read_bytes())
        if process.poll() is not None:
            raise RigError(f"iperf3 has ended: {log.read_text()}")
        yield
    finally:
        process.kill()
        process.wait()
