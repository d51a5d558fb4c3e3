"""What a server program needs of its own process."""

from __future__ import annotations

import resource


def resident_bytes() -> int:
    """Resident memory of this process's own, in bytes.

    That of guests is shared memory, and left out: with huge pages, a look at one of their pages
    makes 2 MiB resident here.
    """
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system lets us: each open channel needs one or two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
