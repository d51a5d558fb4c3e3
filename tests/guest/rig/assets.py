"""Where things are: made by the rig, read by the tests."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

ENVIRONMENT = "VMBUS_RIG"
"""The variable that has the path of the description."""


@dataclasses.dataclass(frozen=True, slots=True)
class Assets:
    """Paths, valid where the tests run."""

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

    def save(self, path: Path) -> None:
        """Write the description."""
        path.write_text(json.dumps({k: str(v) for k, v in dataclasses.asdict(self).items()}))


def load_assets() -> Assets | None:
    """Return the description that the environment names, or None outside of the rig."""
    path = os.environ.get(ENVIRONMENT)
    if path is None:
        return None
    fields = json.loads(Path(path).read_text())
    release = fields.pop("release")
    return Assets(release=release, **{name: Path(value) for name, value in fields.items()})
