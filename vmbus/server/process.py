"""What a server program needs of its own process."""

from __future__ import annotations

import resource


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process's own, in bytes; 0 if it is gone.

    That of guests is shared memory, and left out: with huge pages, a look at one of their pages
    makes 2 MiB resident here.

    Args:
        pid: Of a process that is ours; None for this one.
    """
    try:
        with open(f"/proc/{pid or 'self'}/status", encoding="utf-8", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))
    except (OSError, KeyError, ValueError):
        return 0


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system lets us: each open channel needs one or two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
