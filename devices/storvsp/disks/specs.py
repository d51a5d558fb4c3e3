"""Disks by name: ``ram:64M``, ``raw:[ro]disk.img``; see :mod:`vmbus.plugins.specs`.

A scheme is an entry point in the group ``storvsp.disks``; its object is
``async def open_spec(spec: DiskSpec) -> Disk``. The back-ends of this project are registered in
just that way, and nothing is imported before its scheme is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self, cast

from storvsp.disk import Disk
from vmbus.plugins.opening import open_backend
from vmbus.plugins.registry import Registry
from vmbus.plugins.specs import Spec

DISKS = Registry("storvsp.disks", "disk", "scheme")
"""The back-ends that are installed."""

_PLACES = "places a disk on the controller"


@dataclasses.dataclass(frozen=True, slots=True)
class DiskSpec(Spec):
    """The specification of a disk."""

    base: bool = dataclasses.field(default=False, compare=False)
    """Something else keeps what is written to the disk, and only ever reads this one: to be opened
    for reading, so that several can share it. Goes on to the disks below."""

    noun: ClassVar[str] = "disk"
    example: ClassVar[str] = "ram:64M"
    file_scheme: ClassVar[str] = "raw"
    reserved: ClassVar[Mapping[str, str]] = {
        "path": _PLACES,
        "target": _PLACES,
        "lun": _PLACES,
        "shared": "one disk for all guests of a server, with one set of reservations; cannot be "
        "resized or added later; not the same as `share`",
        "on-error": "what becomes of commands that find no room: report (default) or stop; not "
        "with shared",
    }

    def inner(self) -> Self:
        """Parse the target as the specification of the disk below; see :class:`Spec`."""
        return dataclasses.replace(Spec.inner(self), base=self.base)


async def open_disk(spec: str | DiskSpec) -> Disk:
    """Open the disk that a specification describes. A checkpoint if its back-end makes one.

    Args:
        spec: Text or a parsed specification, without the reserved options.

    Returns:
        An open disk; the caller closes it.

    Raises:
        ConfigError: The text is wrong, the scheme is not installed, its plug-in is broken, or
            what it names cannot be opened.
        DiskError: The back-end was reached and failed.
    """
    if isinstance(spec, str):
        spec = DiskSpec.parse(spec)
    return cast("Disk", await open_backend(DISKS, spec, Disk))
