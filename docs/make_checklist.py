"""Write docs/reference/checklist.md: what hosts get wrong, and the tests that show we do not.

A test belongs to a row if it is called ``test_row_21_...`` (or ``test_row_7_and_33_...``), or if
its text says "checklist row 21", "checklist rows 9 and 29" or "checklist rows 1 to 12".
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reference/checklist.md"
HEAD = """# The checklist

What a VMBus host has to do because real guests rely on it, and what happens if it does not. The
rows come from reading the open guest drivers (Linux, FreeBSD, illumos, OpenBSD, NetBSD, DPDK,
MacHyperVSupport, Project Mu, Haiku); the Python guest in `vmbus.guest` checks the same rules from
the other side.

Made by `docs/make_checklist.py` from its own list and the names and comments of the tests; a test
compares this page with what the script would write.

Severity: **H** the guest hangs, **P** it panics or is reset, **C** data or a channel is corrupted,
**F** a device does not attach, **g** ghosts and cosmetics. "VMM" and "services" in place of tests:
what the row is about is not in this project's hands.

| # | the host has to | or else | severity | shown by |
|---|---|---|---|---|
"""
NUMBER = r"\d+"
MENTION = re.compile(r"[Cc]hecklist\s+rows?\s+((?:\d+(?:\s*(?:,|and|to)\s+(?:and\s+)?)?)+)")
NAME = re.compile(r"test_rows?_(\d+(?:_and_\d+)*)_")


class Row(NamedTuple):
    """One row of the list."""

    duty: str
    otherwise: str
    severity: str
    outside: str = ""
    """Whose matter it is, if not this project's."""


ROWS: dict[int, Row] = {
    1: Row(
        "answer every INITIATE_CONTACT, also for versions it does not know, and never with a "
        "hypercall error",
        "Linux waits for ever before init; FreeBSD takes 30 s longer per version",
        "H",
    ),
    2: Row(
        "deliver all control messages in order through one slot, marked as pending, and go on "
        "at EOM",
        "a lost OFFER or GPADL_CREATED is a wait for ever",
        "H",
    ),
    3: Row(
        "send ALLOFFERS_DELIVERED after the last offer, and when there are none",
        "all but Linux 6.1 stop booting",
        "H",
    ),
    4: Row(
        "give exactly one reply to each GPADL_HEADER set, OPEN, TEARDOWN, UNLOAD and, from 5.3 on, "
        "MODIFYCHANNEL",
        "none: the guest hangs; two: FreeBSD and others take one for the answer to the next",
        "H, C",
    ),
    5: Row(
        "send messages of exactly the right size",
        "UEFI crashes itself, Linux warns, older guests use stale bytes",
        "P",
    ),
    6: Row(
        "number relids from 1 without gaps, use none again before it is released, and keep "
        "instance GUIDs unique",
        "warnings, ignored channels, resets; Haiku serves up to 31 of them",
        "P, C",
    ),
    7: Row(
        "let go of everything at UNLOAD, at a reset and at a contact without UNLOAD, and write "
        "nothing after CLOSECHANNEL",
        "old rings overwrite the new kernel's memory",
        "C",
    ),
    8: Row(
        "signal when an empty outgoing ring fills and the mask is 0, with a barrier between index "
        "and mask",
        "NIC or disk stall until the next event",
        "H",
    ),
    9: Row(
        "drain incoming rings with mask, unmask and another look, until CLOSECHANNEL",
        "the ring fills: queues stop, interfaces do not go down",
        "H",
    ),
    10: Row(
        "count in packets of 8 bytes with a trailer of 8, and keep a byte free",
        "the reader is out of step",
        "C",
    ),
    11: Row(
        "send no packet larger than the driver's buffer: 64 bytes of payload for SCSI",
        "garbage in Linux, a dead channel in OpenBSD, a panic in FreeBSD, the end of DPDK",
        "C, P",
    ),
    12: Row(
        "send one completion for each packet that asks for one, none for others, with the same "
        "transaction id, 0 and 0xFFFFFFFFFFFFFFFD included",
        "a hang, a failed attach, a panic or a reset",
        "H, P",
    ),
    13: Row(
        "answer the NVSP handshake in 32 bytes, about sub-channels in 40, and leave completions of "
        "NDIS messages empty",
        "Linux and OpenBSD get no network",
        "H, F",
    ),
    14: Row(
        "describe receive and send buffers with one section and sane sizes",
        "attach fails; macOS divides by zero",
        "F, P",
    ),
    15: Row(
        "answer each RNDIS request twice, on the primary channel",
        "Linux hangs with its network lock held",
        "H",
    ),
    16: Row(
        "succeed with the OIDs that drivers insist on",
        "there is no interface",
        "F",
    ),
    17: Row(
        "offer exactly as many sub-channels as were promised, with the primary's GUIDs and indices "
        "from 1 on",
        "Linux, FreeBSD and illumos wait for ever, DPDK gives up",
        "H, P",
    ),
    18: Row(
        "send well-formed lists of per-packet information",
        "guests do not tolerate malformed ones",
        "-",
    ),
    19: Row(
        "use receive transaction ids below the number of sub-allocations, each once at a time",
        "DPDK leaks, others see overwritten frames",
        "C",
    ),
    20: Row(
        "pass on no frame before there is a packet filter, nor one shorter than 14 bytes",
        "drops, an assertion in OpenBSD, a panic in macOS",
        "P",
    ),
    21: Row(
        "tell absent units by INQUIRY data 0x7F and by srb_status 0x20 alone, and answer REPORT "
        "LUNS on every target",
        "ghost disks in Linux and macOS, endless retries in FreeBSD, no boot disk in UEFI",
        "g, F",
    ),
    22: Row(
        "send srb_status 0x01 for success, 0x84 with sense data for check conditions, and no "
        "length beyond what was asked for",
        "I/O errors in Linux, an assertion in FreeBSD, a crash of UEFI",
        "C, P",
    ),
    23: Row(
        "never send srb_status 0x00 or 0x03, nor COMPLETE_IO with id 0 unasked",
        "FreeBSD and illumos panic",
        "P",
    ),
    24: Row(
        "complete every SRB some time: after resets, removal of the medium, errors of the host",
        "Linux never times out: hung tasks for ever",
        "H",
    ),
    25: Row(
        "refuse a vstor version with 0xC0000059 and COMPLETE_IO",
        "UEFI gives up, the others try the next version",
        "F",
    ),
    26: Row(
        "answer a vstor request in as many bytes as it has (48 or 64)",
        "the first request is ignored: FreeBSD, illumos and macOS wait for ever",
        "H",
    ),
    27: Row(
        "announce a sane largest transfer (64 KiB to 128 MiB, whole pages), and take it in one SRB",
        "no I/O, an overflow in 16 bits, EIO",
        "F, C",
    ),
    28: Row(
        "give monitor ids of their own below 128 and poll the page, or give none",
        "OpenBSD and DPDK see no devices; a bit nobody polls silences all guests",
        "H, F",
    ),
    29: Row(
        "look for room in a full ring now and then, without being signalled",
        "OpenBSD, macOS and NetBSD never signal: a deadlock under load",
        "H",
    ),
    30: Row(
        "take HvSignalEvent in both forms, and HvPostMessage on connections 1 and 4",
        "no doorbells",
        "H",
    ),
    31: Row(
        "not look at padding, reserved bytes, message numbers or the length posted",
        "GPADLs of macOS, UEFI and FreeBSD are refused",
        "F",
    ),
    32: Row(
        "take GPADL_TEARDOWN on closed channels and before CLOSECHANNEL, and always answer",
        "removal of devices hangs",
        "H",
    ),
    33: Row(
        "set no event flag before OPENCHANNEL_RESULT is in the slot, nor after CLOSECHANNEL",
        "UEFI does not tolerate it",
        "P",
    ),
    34: Row(
        "rescind once, ignore an OPENCHANNEL that crosses it, free relids at RELID_RELEASED or "
        "UNLOAD",
        "NetBSD asserts, Linux keeps hung offers",
        "P, H",
    ),
    35: Row(
        "have the SynIC enabled at reset, timers' MSRs writable, and take a masked SINT with "
        "vector 0",
        "UEFI gets no interrupts, or a fault",
        "H, P",
    ),
    36: Row("put a VMBus device with an interrupt into ACPI", "no VMBus in macOS", "F", "VMM"),
    37: Row(
        'clear CPU_MANAGEMENT, set HYPERCALL and VP_INDEX and say "Hv#1" in CPUID',
        "Linux takes itself for the root partition, others see no hypervisor",
        "F",
    ),
    38: Row(
        "have one message under way per integration service",
        "the second one is lost",
        "C",
        "services",
    ),
    39: Row(
        "keep the order of offers and their GUIDs over restarts and hibernation",
        "Linux loses its devices on resume",
        "F",
    ),
    40: Row(
        "copy what a hostile guest shares once, and check all of it",
        "a compromised host",
        "-",
    ),
}


class Test(NamedTuple):
    """A test function."""

    path: Path
    name: str


def numbers(text: str) -> set[int]:
    """Return the rows in "7", "9 and 29", "1, 2 and 4" or "1 to 12"."""
    found = {int(number) for number in re.findall(NUMBER, text)}
    for first, last in re.findall(rf"({NUMBER})\s+to\s+({NUMBER})", text):
        found |= set(range(int(first), int(last) + 1))
    return found


def rows_of(name: str, source: str) -> set[int]:
    """Return the rows that a test is about."""
    found: set[int] = set()
    match = NAME.match(name)
    if match:
        found |= {int(number) for number in match[1].split("_and_")}
    for mention in MENTION.finditer(re.sub(r"\n\s*#", " ", source)):
        found |= numbers(mention[1])
    return found


def collect() -> dict[int, list[Test]]:
    """Find the tests of each row."""
    tests: dict[int, list[Test]] = {row: [] for row in ROWS}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "test_row" not in text and "hecklist row" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
                "test_"
            ):
                source = ast.get_source_segment(text, node) or ""
                for row in rows_of(node.name, source):
                    tests[row].append(Test(path, node.name))
    return tests


def links(tests: list[Test]) -> str:
    """Name the tests, file by file."""
    by_path: dict[Path, list[str]] = {}
    for test in tests:
        by_path.setdefault(test.path, []).append(test.name.removeprefix("test_").replace("_", " "))
    return "; ".join(
        f"[{path.stem}](../../{path.relative_to(ROOT)}): {', '.join(names)}"
        for path, names in by_path.items()
    )


def render() -> str:
    """Return the page."""
    tests = collect()
    lines = [
        f"| {number} | {row.duty} | {row.otherwise} | {row.severity} "
        f"| {row.outside or links(tests[number])} |"
        for number, row in ROWS.items()
    ]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
