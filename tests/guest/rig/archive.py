"""A small archive of Debian packages, as apt takes it: made here, served over HTTP."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.guest.rig.packages import run


class Package(NamedTuple):
    """What a package is made of."""

    name: str
    files: dict[str, bytes]
    """By path below the root; those in ``usr/bin`` are programs."""
    depends: tuple[str, ...] = ()


def make_archive(folder: Path, *packages: Package) -> None:
    """Make an archive in a directory, without signature. Raises RigError."""
    entries = []
    for package in packages:
        tree = folder / package.name
        control = (
            f"Package: {package.name}\nVersion: 1.0\nArchitecture: all\n"
            "Maintainer: the rig <rig@rig.example>\nDescription: made by a test\n"
        )
        if package.depends:
            control += f"Depends: {', '.join(package.depends)}\n"
        for path, data in {**package.files, "DEBIAN/control": control.encode()}.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(data)
            (tree / path).chmod(0o755 if path.startswith("usr/bin/") else 0o644)
        file = folder / f"{package.name}_1.0_all.deb"
        # Without compression: an emulated machine has better things to do.
        run("dpkg-deb", "-Znone", "--root-owner-group", "-b", tree, file)
        data = file.read_bytes()
        entries.append(
            f"{control}Filename: ./{file.name}\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\n"
        )
    (folder / "Packages").write_text("\n".join(entries))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_said: object) -> None:
        """Nobody reads it."""


@contextlib.contextmanager
def serve_archive(folder: Path, address: str, port: int) -> Iterator[int]:
    """Serve a directory over HTTP for the length of a ``with`` block, in this thread's network.

    Yields:
        The port; one that is free for 0.
    """
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer((address, port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
