"""Events of a demo's guest, and the report of them."""

from __future__ import annotations

from vmbus.cli.demo_report import Report

DISK = {
    "event": "disk", "address": "0:0:0", "kind": "disk", "vendor": "Msft",
    "product": "Virtual Disk", "block_size": 512, "size": 1 << 20, "used": 1 << 20,
    "writable": True, "unmaps": True, "label": None,
}  # fmt: skip


def phase(name, **changes):
    return {"event": "phase", "address": "0:0:0", "phase": name, "block": 4096, "requests": 10,
            "bytes": 40960, "seconds": 0.5, **changes}  # fmt: skip


def report_of(*events):
    report = Report(backends={"0:0:0": "RamDisk"})
    for event in events:
        report.take(event)
    return report
