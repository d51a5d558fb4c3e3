"""Writing traces: records go into sections, and sections into sinks.

A section stands by itself: its interfaces are described in it before they are used. So a file that
follows another one, and what is left of a ring when its oldest part is gone, can be read alone.
"""

from __future__ import annotations

import platform
import time
from typing import Protocol

from vmbus.trace.pcapng import (
    COMMENT,
    INTERFACE_DESCRIPTION,
    INTERFACE_NAME,
    SECTION_APPLICATION,
    SECTION_HARDWARE,
    SECTION_OS,
    pack_interface,
    pack_packet,
    pack_section,
    text_option,
)
from vmbus.trace.records import (
    CONTROL,
    HEADER,
    LINKTYPE,
    MAGIC,
    MEMORY,
    META,
    SIGNALS,
    VERSION,
    Kind,
    Record,
    channel_interface,
)

SECTION_INTERFACES = 1 << 15
"""After so many interfaces a section ends: readers have bounds."""

_INTERFACES = {Kind.MESSAGE: CONTROL, Kind.SIGNAL: SIGNALS, Kind.MEMORY: MEMORY}
_OF_CHANNELS = frozenset({Kind.PACKET, Kind.RAW, Kind.OPEN, Kind.CLOSE})
_pack_header = HEADER.pack


class Sink(Protocol):
    """Where a trace goes; see :mod:`vmbus.trace.sinks`."""

    full: bool
    """Whether what follows has to be in a new section: what is here has become too much."""

    def begin(self, time_ns: int) -> None:
        """A section begins, at that time; :attr:`full` is false. Blocks as writing does."""

    def write(self, data: bytes, records: int) -> None:
        """Take blocks, whole ones, with so many records in them. Blocks as writing does.

        Never raises: what cannot be written is lost, and counted.
        """

    def take_lost(self) -> tuple[int, str]:
        """Return how many records were lost since this was asked last, and why."""


class TraceWriter:
    """Writes records to a sink.

    Args:
        sink: Where they go; the caller's, who closes it.
        guest: Whose bus it is, for people.
        application: What is writing.
    """

    def __init__(self, sink: Sink, *, guest: str = "", application: str = "vmbus") -> None:
        self.guest = guest
        self.application = application
        self.number = 0
        """Of the last record."""
        self._sink = sink
        self._begun = False
        self._interfaces: dict[object, int] = {}
        """Numbers in this section: by name, and for channels by relid and life."""
        self._channels: dict[tuple[int, int], tuple[str, str]] = {}
        """What each channel's life is, and its description."""
        self._lives: dict[int, int] = {}

    def open_channel(self, relid: int, what: str, description: str = "") -> int:
        """Say what a channel is whose life begins. Cannot block.

        Args:
            relid: Its number.
            what: Its class in a word, such as ``scsi``.
            description: For people.

        Returns:
            Which life of this relid it is, from 1.
        """
        life = self._lives.get(relid, 0) + 1
        self._lives[relid] = life
        self._channels[relid, life] = what, description
        return life

    def name_channel(self, relid: int, life: int, what: str, description: str = "") -> None:
        """Say what a channel is whose life has a number already. Cannot block."""
        self._lives[relid] = max(life, self._lives.get(relid, 0))
        self._channels[relid, life] = what, description

    def close_channel(self, relid: int, life: int) -> None:
        """Forget what a channel is; no record of it follows. Cannot block."""
        self._channels.pop((relid, life), None)

    def put(self, record: Record) -> None:
        """Write a record, which gets the next number if it has none. Blocks as writing does."""
        if not record.number:
            record.number = self.number + 1
        self.write(
            record.kind, record.way, record.relid, record.life, record.data,
            time_ns=record.time_ns, flags=record.flags, ref=record.ref,
            offset=record.offset, total=record.total,
            length=record.length, comment=record.comment, number=record.number,
        )  # fmt: skip

    def write(
        self,
        kind: int,
        way: int,
        relid: int,
        life: int,
        data: bytes,
        *,
        time_ns: int,
        flags: int = 0,
        ref: int = 0,
        offset: int = 0,
        total: int = 0,
        length: int | None = None,
        comment: str = "",
        number: int = 0,
    ) -> None:
        """Write a record, as :class:`Record` describes them. Blocks as writing does."""
        sink = self._sink
        if sink.full or not self._begun:
            self._begin(time_ns)
        key: object = (relid, life) if kind in _OF_CHANNELS else _INTERFACES.get(kind, META)  # type: ignore[call-overload]
        interface = self._interfaces.get(key)
        if interface is None:
            interface = self._describe(key, time_ns)
        lost, why = sink.take_lost()
        if lost:
            self._tell_gap(lost, why, time_ns)
        self.number = number or self.number + 1
        header = _pack_header(
            MAGIC, VERSION, kind, flags, relid, life, self.number, ref, offset, total
        )
        sink.write(
            pack_packet(
                interface,
                time_ns,
                header + data,
                length=None if length is None else len(header) + length,
                flags=way,
                comment=text_option(COMMENT, comment)[1] if comment else b"",
            ),
            1,
        )

    def gap(self, lost: int, why: str, time_ns: int | None = None) -> None:
        """Say that records are missing here, which nobody has seen. Blocks as writing does."""
        if not self._begun:
            self._begin(time_ns or time.time_ns())
        self._tell_gap(lost, why, time_ns or time.time_ns())

    def _tell_gap(self, lost: int, why: str, time_ns: int) -> None:
        interface = self._interfaces.get(META)
        if interface is None:
            interface = self._describe(META, time_ns)
        # Their numbers are theirs, as far as they would have had some.
        self.number += 1
        header = _pack_header(MAGIC, VERSION, Kind.GAP, 0, 0, 0, self.number, lost, 0, 0)
        text = why.encode()
        _, comment = text_option(COMMENT, f"{lost} records are missing: {why}")
        self._sink.write(pack_packet(interface, time_ns, header + text, comment=comment), 0)

    def _begin(self, time_ns: int) -> None:
        self._interfaces = {}
        self._begun = True
        self._sink.begin(time_ns)
        options = [
            text_option(SECTION_OS, platform.platform()),
            text_option(SECTION_APPLICATION, self.application),
        ]
        if self.guest:
            options.insert(0, text_option(SECTION_HARDWARE, self.guest))
        self._sink.write(pack_section(options), 0)

    def _describe(self, key: object, time_ns: int) -> int:
        if len(self._interfaces) >= SECTION_INTERFACES:
            self._begin(time_ns)
        description = ""
        if isinstance(key, tuple):
            relid, life = key
            what, description = self._channels.get((relid, life), ("unknown", ""))
            name = channel_interface(relid, life, what)
        else:
            name = str(key)
        options = [text_option(INTERFACE_NAME, name)]
        if description:
            options.append(text_option(INTERFACE_DESCRIPTION, description))
        number = self._interfaces[key] = len(self._interfaces)
        self._sink.write(pack_interface(LINKTYPE, options), 0)
        return number
