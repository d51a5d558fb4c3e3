"""What came of ``vmbus demo``: collects what the guest tells, and compares it with the files.

The guest's words are checked against what its disks were made of: the file behind a raw disk has to
hold what the guest has written, an overlay's image has to be what it was, and the first look at a
disk has to show its file.
"""

from __future__ import annotations

import dataclasses
import random
from hashlib import blake2b
from pathlib import Path
from typing import Any

Event = dict[str, Any]
"""A line of the guest, parsed."""

_FACTS = frozenset({"start", "attached", "contact", "vstor", "left"})
"""Events that come once."""
_STATION_FACTS = ("adapter", "met", "ping", "sent", "received")
_LISTS = {"offer": "offers", "channel": "channels", "notice": "notices"}
_GRAIN = 4096
_SECTOR = 2048
_ISO_SIZE = 1 << 20
_IMAGE_SIZE = 8 << 20


@dataclasses.dataclass
class DiskReport:
    """One disk."""

    address: str
    backend: str
    """Name of the server's back-end."""
    facts: dict[str, Any]
    """What the guest has found out about it."""
    phases: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """``before`` and ``after``."""
    unmapped: int = 0
    verified: bool = False
    gone: bool = False

    def total(self, *names: str) -> int:
        """Return the bytes of some phases."""
        return sum(self.phases[name]["bytes"] for name in names if name in self.phases)

    def rate(self, name: str, unit: str) -> float | None:
        """Return ``bytes`` or ``requests`` per second of a phase, None if there were none."""
        phase = self.phases.get(name)
        return phase[unit] / phase["seconds"] if phase and phase[unit] else None


@dataclasses.dataclass
class Problem:
    """Something that is not as it has to be."""

    where: str
    """Address of a disk, ``operator``, or the name of a process."""
    text: str


@dataclasses.dataclass
class Report:
    """All that came of it."""

    facts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By event, those that come once."""
    lists: dict[str, list[dict[str, Any]]] = dataclasses.field(
        default_factory=lambda: {name: [] for name in _LISTS.values()}
    )
    backends: dict[str, str] = dataclasses.field(default_factory=dict)
    """By address, as the server tells."""
    disks: dict[str, DiskReport] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    exit_codes: dict[str, int | None] = dataclasses.field(default_factory=dict)
    """Of each process by its name; negative: killed by that signal; None: had to be ended."""
    last_lines: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Of the same ones, what they wrote to standard error."""
    network: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By the number of a station on the switch: what it has told, by event; both ways of its
    streams by name. Empty: there was no such act."""
    seconds: float = 0.0
    directory: str | None = None
    """Where images and logs are, if they were kept."""
    interrupted: int | None = None
    """The signal that ended it."""
    mistake: str | None = None
    """What is wrong with the command line, if the server has found it."""

    @property
    def ok(self) -> bool:
        """Whether everything was done and verified."""
        everybody = (self.facts, *self.network.values())
        left = all("left" in each for each in everybody)
        return not self.problems and self.interrupted is None and left

    def problem(self, where: str, text: str) -> None:
        """Take note of a problem."""
        self.problems.append(Problem(where, text))

    def take(self, event: Event) -> None:
        """Take note of what the guest has said."""
        members = dict(event)
        kind = members.pop("event")
        if kind in _FACTS:
            self.facts[kind] = members
        elif kind in _LISTS:
            self.lists[_LISTS[kind]].append(members)
        elif kind == "problem":
            self.problem(**members)
        elif kind == "disk":
            address = members.pop("address")
            backend = self.backends.get(address, "-")
            self.disks[address] = DiskReport(address, backend, members)
        elif "address" in members:
            disk = self.disks[members.pop("address")]
            if kind == "phase":
                disk.phases[members.pop("phase")] = members
            elif kind == "contents":
                disk.digests[members["when"]] = members["digest"]
            elif kind == "verified":
                disk.unmapped = members["unmapped"]
                disk.verified = True
            elif kind == "gone":
                disk.gone = True

    def total(self, unit: str) -> int:
        """Return how many ``requests`` or ``bytes`` there were, those of the scan not counted."""
        return sum(phase[unit] for disk in self.disks.values() for phase in disk.phases.values())

    def as_json(self) -> dict[str, Any]:
        """Return the document of ``vmbus demo --json``; see ``docs/tutorials/demo.md``."""
        return {
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "guest": self.facts.get("start"),
            "attachment": self.facts.get("attached"),
            "bus": self.facts.get("contact"),
            "storage": self.facts.get("vstor"),
            **self.lists,
            "disks": [
                {
                    "address": disk.address,
                    "backend": disk.backend,
                    **disk.facts,
                    "phases": disk.phases,
                    "digests": disk.digests,
                    "unmapped": disk.unmapped,
                    "verified": disk.verified,
                    "gone": disk.gone,
                }
                for disk in self.disks.values()
            ],
            "calls": self.facts.get("left"),
            "network": [
                {
                    "station": number,
                    **{name: facts.get(name) for name in _STATION_FACTS},
                    "calls": facts.get("left"),
                }
                for number, facts in self.network.items()
            ],
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "exit_codes": self.exit_codes,
            "directory": self.directory,
        }


class Images:
    """The files behind the demo's disks.

    Args:
        directory: Where to make them.
        size: Bytes of the writable disks.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self.raw = directory / "disk.img"
        self.base = directory / "base.img"
        self.cd = directory / "cd.iso"
        self.base_size = min(size, _IMAGE_SIZE)
        self.specs = (
            f"ram:{size_option(size)}",
            f"raw:[create={size_option(size)}]{self.raw}",
            f"overlay:raw:[ro]{self.base}",
            f"cd:{self.cd}",
        )
        """In the order of their LUNs."""

    def make(self) -> None:
        """Write the files; the raw disk's is made by the server."""
        noise = random.Random()  # noqa: S311  # fills files, hides nothing
        self.base.write_bytes(noise.randbytes(self.base_size))
        self.cd.write_bytes(iso_image(noise.randbytes(_ISO_SIZE)))
        self._base_digest = file_digest(self.base, self.base_size)

    def compare(self, report: Report) -> list[str]:
        """Compare the files with what the guest says of their disks; to be called at the end.

        Returns:
            What was found to be right; the rest is in the report.
        """
        found = []
        for address, path, when, good, bad in (
            (
                "0:0:1",
                self.raw,
                "after",
                "holds what was written",
                "does not hold what was written",
            ),
            ("0:0:2", self.base, "before", "showed through the overlay", "did not show through it"),
            ("0:0:3", self.cd, "after", "was read as it is", "was not read as it is"),
        ):
            disk = report.disks.get(address)
            if disk is None or when not in disk.digests:
                continue  # there is a worse problem
            if file_digest(path, disk.facts["used"]) == disk.digests[when]:
                found.append(f"{path.name} {good}")
            else:
                report.problem(address, f"{path.name} {bad}")
        if file_digest(self.base, self.base_size) == self._base_digest:
            found.append(f"{self.base.name} is unchanged")
        else:
            report.problem("0:0:2", f"{self.base.name} was changed under the overlay")
        return found


def size_option(size: int) -> str:
    """Write a multiple of 4096 as options take it."""
    return f"{size >> 10}K" if size % (1 << 20) else f"{size >> 20}M"


def file_digest(path: Path, size: int) -> str:
    """Return the digest, in the guest's way, of the first ``size`` bytes of a file."""
    with path.open("rb") as file:
        prints = [_digest(file.read(min(_GRAIN, size - start))) for start in range(0, size, _GRAIN)]
    return _digest(b"".join(prints)).hex()


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def iso_image(content: bytes) -> bytes:
    """Return a CD image: ``content`` with the descriptor of a volume VMBUS_DEMO in its place.

    Its volume descriptor is all it has of ISO 9660 (ECMA-119 8.4): it can be named, not mounted.
    """
    sectors = len(content) // _SECTOR
    descriptor = bytearray(_SECTOR)
    descriptor[:7] = b"\x01CD001\x01"
    descriptor[8:40] = b"LINUX".ljust(32)
    descriptor[40:72] = b"VMBUS_DEMO".ljust(32)
    descriptor[80:84] = sectors.to_bytes(4, "little")
    descriptor[84:88] = sectors.to_bytes(4, "big")
    terminator = b"\xffCD001\x01".ljust(_SECTOR, b"\0")
    volume = bytes(descriptor) + terminator
    start = 16 * _SECTOR
    return content[:start] + volume + content[start + len(volume) :]
