"""What the log of a healthy guest's kernel does not have."""

from __future__ import annotations

import re
from collections.abc import Sequence

COMPLAINTS = (
    # hv_vmbus (linux/drivers/hv)
    r"Unable to connect to host", r"MSR not available", r"unexpected msgtype", r"unknown msgtype",
    r"message too short", r"Failed to establish GPADL", r"Invalid transaction ID",
    r"invalid? (?:icversion|offer|relid|channel)",
    r"hv_vmbus:.*(?:fail|unable|invalid|timed? ?out)",
    r"Waiting for (?:unload|VMBus)", r"VMBus.*(?:error|fail)", r"unchecked MSR access",
    # hv_storvsc
    r"hv_storvsc .*(?:tag#|unable|fail|invalid|timed? ?out)", r"INQUIRY result too short",
    r"storvsc_.*(?:fail|error)", r"scsi host\d+: .*(?:fail|error)",
    # hv_netvsc
    r"hv_netvsc .*(?:unable|Ring buffer not empty|length too small|fail|invalid|timed? ?out)",
    # SCSI disks and what is on them
    r"I/O error", r"critical \w+ error", r"\bSense Key\b", r"\bAdd\. Sense\b", r"FAILED Result",
    r"Buffer I/O error", r"EXT4-fs (?:error|warning)", r"Asking for cache data failed",
    r"Test WP failed", r"No Caching mode page", r"rejecting I/O", r"device offlined",
    r"Medium access timeout",
    # the kernel as a whole
    r"\bBUG: ", r"kernel BUG at", r"WARNING: (?:CPU|possible|suspicious)", r"\bOops\b",
    r"Call Trace", r"blocked for more than \d+ seconds",
    r"soft lockup", r"hard LOCKUP", r"rcu: .*(?:stall|starved)", r"general protection fault",
    r"Kernel panic", r"scheduling while atomic", r"refcount_t", r"UBSAN",
    r"page allocation failure",
)  # fmt: skip


def coarse_filter() -> str:
    """Return a regular expression for ``grep -iE`` that misses no complaint.

    A guest's log is long and its serial port slow, so it sends only what may be of interest.
    """
    text = "|".join(COMPLAINTS)
    for precise, coarse in (("(?:", "("), (r"\b", ""), (r"\d", "[0-9]"), (r"\w", "[a-z0-9_]")):
        text = text.replace(precise, coarse)
    return text


def complaints(log: str, allow: Sequence[str] = ()) -> list[str]:
    """Return the lines of a kernel's log that it should not have.

    Args:
        log: What dmesg prints.
        allow: Regular expressions of lines that are all right this time.
    """
    bad = re.compile("|".join(COMPLAINTS), re.IGNORECASE)
    fine = [re.compile(each) for each in allow]
    return [
        line
        for line in log.splitlines()
        if bad.search(line) and not any(each.search(line) for each in fine)
    ]
