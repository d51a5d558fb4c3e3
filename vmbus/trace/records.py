"""Records of a trace: what was seen on a bus, each as one packet of a pcapng file.

A record is a header of 40 bytes, and the bytes as they were on the bus. Its interface says what it
is about: ``vmbus:control``, ``vmbus:signals``, ``vmbus:memory``, ``vmbus:meta``, and one for each
life of a channel, ``vmbus:channel/RELID.LIFE/CLASS``. Whoever reads traces needs the header only;
the names are for people. ``docs/reference/trace-format.md`` is the specification.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from vmbus.errors import TraceError

LINKTYPE = 147
"""LINKTYPE_USER0: for private use, until this has a number of its own."""
MAGIC = b"VMBT"
VERSION = 1
HEADER = struct.Struct("<4sBBHIIQQII")
"""magic, version, kind, flags, relid, life, number, ref, offset, total; little-endian."""
HEADER_SIZE = 40
assert HEADER.size == HEADER_SIZE
MAX_DATA = 192 << 10
"""Bytes of one record behind the header; memory is cut into pieces of that. Wireshark takes packets
of 262 144 bytes."""


class Kind(IntEnum):
    """What a record is."""

    MESSAGE = 1
    """A control message: the payload of a SynIC message of type 1."""
    SIGNAL = 2
    """One side has rung the other's doorbell for a channel. No bytes."""
    PACKET = 3
    """A packet of a ring, from its descriptor to its padding, without the trailer."""
    RAW = 4
    """Bytes of a ring that are no packet."""
    MEMORY = 5
    """Guest memory that a packet points to, or a piece of it."""
    OPEN = 6
    """A channel is open: what it is, as JSON. Its packets follow."""
    CLOSE = 7
    """A channel is over. No bytes."""
    META = 8
    """About the bus and the capture, as JSON."""
    NOTE = 9
    """Text for people."""
    FAULT = 10
    """The guest broke a rule here: text."""
    GAP = 11
    """Records are missing here: ``ref`` is how many, and the text says why."""
    CHANGE = 12
    """What follows is not what the guest (host) sent, but what was made of it: text."""


class Flag(IntFlag):
    """Of a record."""

    CUT = 1
    """Not all bytes are here, because nobody wanted more; the packet's length says how many."""
    REDACTED = 2
    """Bytes were replaced, because they are nobody else's business."""
    HOST_WROTE = 4
    """MEMORY: the host has written it; else it has read it."""
    HOSTS_PACKET = 8
    """MEMORY: the packet is one of the host's, and follows; else it is one of the guest's."""


class Way(IntEnum):
    """Which way a record went; the numbers are those of pcapng's directions."""

    NONE = 0
    TO_HOST = 1
    """Inbound, as the host sees it."""
    TO_GUEST = 2


CONTROL = "vmbus:control"
SIGNALS = "vmbus:signals"
MEMORY = "vmbus:memory"
META = "vmbus:meta"
FIXED_INTERFACES = (CONTROL, SIGNALS, MEMORY, META)
CHANNEL = "vmbus:channel/"


def channel_interface(relid: int, life: int, what: str) -> str:
    """Return the name of the interface of a channel's life. Cannot block."""
    return f"{CHANNEL}{relid}.{life}/{what}"


class Record:
    """One record.

    Attributes:
        number: Counts from 1 in the order in which things were seen, in all files of a capture. It
            stays what it is when a trace is filtered or split.
        time_ns: Nanoseconds since 1970.
        kind: What it is; of a newer version of the format perhaps a number that is none.
        way: Which way it went.
        flags: See there.
        relid: Of the channel; 0: none.
        life: Which life of that relid it was, from 1; 0: none.
        ref: MEMORY: transaction id of the packet. SIGNAL, GAP: how many. Else 0.
        offset: MEMORY: where ``data`` begins in all that the packet points to, in bytes.
        total: MEMORY: bytes of all that.
        data: The bytes; ``length`` says how many there were.
        comment: What it means, in a line for people.
        position: Where it is in its file, in bytes; 0 if in none.
    """

    __slots__ = (
        "comment",
        "data",
        "flags",
        "kind",
        "length",
        "life",
        "number",
        "offset",
        "position",
        "ref",
        "relid",
        "time_ns",
        "total",
        "way",
    )

    def __init__(
        self,
        kind: int,
        data: bytes = b"",
        *,
        way: Way = Way.NONE,
        time_ns: int = 0,
        number: int = 0,
        flags: int = 0,
        relid: int = 0,
        life: int = 0,
        ref: int = 0,
        offset: int = 0,
        total: int = 0,
        length: int | None = None,
        comment: str = "",
        position: int = 0,
    ) -> None:
        self.kind = kind
        self.data = data
        self.way = way
        self.time_ns = time_ns
        self.number = number
        self.flags = flags
        self.relid = relid
        self.life = life
        self.ref = ref
        self.offset = offset
        self.total = total
        self.length = len(data) if length is None else length
        self.comment = comment
        self.position = position

    @property
    def kind_name(self) -> str:
        """Its kind as a word."""
        try:
            return Kind(self.kind).name
        except ValueError:
            return f"KIND_{self.kind}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return NotImplemented
        return all(
            getattr(self, name) == getattr(other, name)
            for name in self.__slots__
            if name != "position"
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        where = f" {self.relid}.{self.life}" if self.relid else ""
        return f"<Record {self.number} {self.kind_name}{where} {self.length} bytes>"


def pack_record(record: Record) -> bytes:
    """Return a record as the bytes of a packet. Cannot block."""
    return (
        HEADER.pack(
            MAGIC, VERSION, record.kind, record.flags, record.relid, record.life, record.number,
            record.ref, record.offset, record.total,
        )
        + record.data
    )  # fmt: skip


def parse_record_untrusted(data: bytes, position: int = 0) -> Record:
    """Parse what :func:`pack_record` makes; times, way, length and comment are the packet's.

    Cannot block.

    Raises:
        TraceError: It is none, or of another version of the format.
    """
    if len(data) < HEADER_SIZE or data[:4] != MAGIC:
        raise TraceError("a packet that is no record of a trace", position)
    _, version, kind, flags, relid, life, number, ref, offset, total = HEADER.unpack_from(data)
    if version != VERSION:
        raise TraceError(f"a record of version {version}; {VERSION} is known", position)
    return Record(
        kind, data[HEADER_SIZE:], flags=flags, relid=relid, life=life, number=number, ref=ref,
        offset=offset, total=total, position=position,
    )  # fmt: skip
