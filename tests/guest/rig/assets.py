"""Where things are: made by the rig, read by the tests."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, ClassVar

ENVIRONMENT = "VMBUS_RIG"
"""The variable that has the path of the description."""


@dataclasses.dataclass(frozen=True, slots=True)
class Assets:
    """Paths, valid where the tests run."""

    FILES: ClassVar = (
        "kernel", "initramfs", "root", "ordinary_kernel", "ordinary_initramfs", "dpdk",
    )  # fmt: skip
    """Those that tests read."""

    kernel: Path
    """The guests' bzImage."""
    initramfs: Path
    root: Path
    """ext4, with programs; not to be written."""
    scratch: Path
    """A directory for disks, on a file system that keeps holes and has a page cache."""
    emulator: Path
    """QEMU, for comparison."""
    release: str
    """Of the guests' kernel, for example ``6.1.0-57-cloud-amd64``."""
    ordinary_kernel: Path
    """Debian's kernel for machines, which has drivers that the one for clouds has not."""
    ordinary_initramfs: Path
    ordinary_release: str
    dpdk: Path
    """ext4, with DPDK and what it needs beside :attr:`root`."""

    def ordinary(self) -> Assets:
        """Return the same, with guests that have the ordinary kernel."""
        return dataclasses.replace(
            self,
            kernel=self.ordinary_kernel,
            initramfs=self.ordinary_initramfs,
            release=self.ordinary_release,
        )

    def save(self, path: Path) -> None:
        """Write the description."""
        path.write_text(json.dumps({k: str(v) for k, v in dataclasses.asdict(self).items()}))


def load_assets() -> Assets | None:
    """Return the description that the environment names, or None outside of the rig."""
    path = os.environ.get(ENVIRONMENT)
    if path is None:
        return None
    fields: dict[str, Any] = json.loads(Path(path).read_text())
    for name in fields.keys() - {"release", "ordinary_release"}:
        fields[name] = Path(fields[name])
    return Assets(**fields)
