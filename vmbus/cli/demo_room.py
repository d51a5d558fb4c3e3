"""Whether this machine has the room that ``vmbus demo`` is asked to fill."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from vmbus.cli.output import size_text
from vmbus.errors import ConfigError

MEMORY = Path("/proc/meminfo")


def available_memory(path: Path = MEMORY) -> int | None:
    """Return the bytes that programs can have yet, swap included (proc(5)); None if unknown."""
    try:
        lines = path.read_text().splitlines()
        known = {
            name: int(rest.split()[0]) << 10
            for name, _, rest in (line.partition(":") for line in lines if line.endswith(" kB"))
        }
        return known["MemAvailable"] + known["SwapFree"]
    except (OSError, ValueError, KeyError):
        return None


def check_room(size: int, *, memory: int | None, disk: int, directory: str) -> None:
    """Refuse disks that cannot be filled, rather than fail in the middle.

    Args:
        size: Bytes of each disk; one is in memory, and one is an image.
        memory: Bytes that are available; None if unknown.
        disk: Bytes that are free where images are made.
        directory: That place.

    Raises:
        ConfigError: There is too little of one.
    """
    if memory is not None and size > memory:
        raise ConfigError(
            f"--size {size_text(size)}: one of the disks is in memory, of which "
            f"{size_text(memory)} are available"
        )
    if size > disk:
        raise ConfigError(
            f"--size {size_text(size)}: one of the disks is an image in {directory}, where "
            f"{size_text(disk)} are free; TMPDIR names another place"
        )


def check_machine(size: int) -> None:
    """Do so with what this machine has now. Raises ConfigError."""
    directory = tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    check_room(size, memory=available_memory(), disk=free, directory=directory)
