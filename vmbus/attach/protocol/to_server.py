"""Payloads that a VMM or an operator sends, and the replies that are not empty.

Everything here is pure. ``decode_untrusted`` raises :class:`PeerProtocolError` and nothing else;
its text names the message, the field and the rule. The tables are in the specification,
``docs/reference/vmbus-user.md``.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import struct
import uuid
from typing import Any, ClassVar, Self

from vmbus.attach.protocol.layout import Field, Layout, Payload, decode_text_untrusted, require
from vmbus.attach.protocol.limits import (
    DIRECT_SINT,
    MAGIC,
    MAX_KIND,
    MAX_NAME,
    MAX_REGIONS,
    VERSION_MAX,
    VERSION_MIN,
    Role,
    check_connection,
    check_flag,
    check_message,
)
from vmbus.errors import PeerProtocolError
from vmbus.memory import PAGE_SIZE


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    """Request 0x01 (section 5.1)."""

    NAME: ClassVar[str] = "HELLO"
    LAYOUT: ClassVar[Layout] = Layout(
        Field("magic", 4),
        Field("version_min", 2),
        Field("version_max", 2),
        Field("features", 8),
        Field("max_vps", 4),
        Field("role", 2),
        Field("name_length", 2),
    )

    version_min: int
    version_max: int
    features: int
    """All bits that the peer offers, known to us or not."""
    max_vps: int
    role: int
    name: str

    @property
    def magic(self) -> int:
        """The constant."""
        return MAGIC

    @property
    def name_length(self) -> int:
        """Bytes of the name in UTF-8."""
        return len(self.name.encode())

    def encode(self) -> bytes:
        """Return the payload."""
        return self.LAYOUT.pack(self) + self.name.encode()

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse; the version range is checked by :func:`choose_version`."""
        values: list[Any] = cls.LAYOUT.unpack_untrusted(cls.NAME, data, exact=False)
        magic, low, high, features, max_vps, role, length = values
        require(magic == MAGIC, f"HELLO: magic is {magic:#x}, must be {MAGIC:#x}")
        require(low <= high, "HELLO: version_min must not be above version_max")
        require(role in {Role.VMM, Role.OPERATOR}, f"HELLO: role {role} must be 0 or 1")
        name = _decode_name_untrusted(cls, data, length)
        return cls(low, high, features, max_vps, role, name)


def _decode_name_untrusted(owner: type[Hello | HelloReply], data: bytes, length: int) -> str:
    tail = data[owner.LAYOUT.size :]
    require(
        len(tail) == length,
        f"{owner.NAME}: name_length is {length} but {len(tail)} bytes follow",
        errno.EMSGSIZE,
    )
    return decode_text_untrusted(f"{owner.NAME}: name", tail, 0, MAX_NAME)


@dataclasses.dataclass(frozen=True, slots=True)
class HelloReply:
    """Reply to HELLO."""

    NAME: ClassVar[str] = "HELLO reply"
    LAYOUT: ClassVar[Layout] = Layout(
        Field("magic", 4),
        Field("version", 2),
        Field("max_fds", 2),
        Field("features", 8),
        Field("max_payload", 4),
        Field("post_credits", 2),
        Field("name_length", 2),
    )

    version: int
    max_fds: int
    features: int
    max_payload: int
    post_credits: int
    """POST_MESSAGEs that may be on their way at any moment."""
    name: str

    @property
    def magic(self) -> int:
        """The constant."""
        return MAGIC

    @property
    def name_length(self) -> int:
        """Bytes of the name in UTF-8."""
        return len(self.name.encode())

    def encode(self) -> bytes:
        """Return the payload."""
        return self.LAYOUT.pack(self) + self.name.encode()

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse; that it fits the request is checked by :meth:`check_answers`."""
        values: list[Any] = cls.LAYOUT.unpack_untrusted(cls.NAME, data, exact=False)
        magic, version, max_fds, features, max_payload, credit, length = values
        require(magic == MAGIC, f"HELLO reply: magic is {magic:#x}, must be {MAGIC:#x}")
        require(credit > 0, "HELLO reply: post_credits must not be 0")
        require(max_fds > 0, "HELLO reply: max_fds must not be 0")
        require(max_payload >= PAGE_SIZE, "HELLO reply: max_payload must be at least 4096")
        name = _decode_name_untrusted(cls, data, length)
        return cls(version, max_fds, features, max_payload, credit, name)

    def check_answers(self, request: Hello) -> None:
        """Raise PeerProtocolError unless version and features are within what was offered."""
        require(
            request.version_min <= self.version <= request.version_max,
            f"HELLO reply: version {self.version} was not offered",
            errno.EPROTO,
        )
        require(
            # Plain integers: the complement of an IntFlag forgets the bits it does not know.
            not self.features & ~int(request.features),
            f"HELLO reply: features {self.features:#x} hold bits that were not offered",
            errno.EPROTO,
        )


def choose_version(hello: Hello) -> int:
    """Return the version to speak. Raises PeerProtocolError, EPROTONOSUPPORT, if there is none."""
    version = min(hello.version_max, VERSION_MAX)
    require(
        version >= max(hello.version_min, VERSION_MIN),
        f"HELLO: versions {hello.version_min} to {hello.version_max} are not spoken here, "
        f"{VERSION_MIN} to {VERSION_MAX} are",
        errno.EPROTONOSUPPORT,
    )
    return version


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryRegion(Payload):
    """One entry of SET_MEM_TABLE, and the whole of ADD_MEM (request 0x03)."""

    NAME: ClassVar[str] = "memory region"
    LAYOUT: ClassVar[Layout] = Layout(
        Field("gpa", 8),
        Field("size", 8),
        Field("fd_offset", 8),
        Field("flags", 4),
        Field("fd_index", 4),
    )
    READ_ONLY: ClassVar[int] = 1

    gpa: int
    """First guest physical address, in bytes."""
    size: int
    """Bytes."""
    fd_offset: int
    """Bytes into the file."""
    flags: int
    fd_index: int
    """Which of the frame's descriptors backs the region."""

    @property
    def read_only(self) -> bool:
        """Guest ROM: the server must not write."""
        return bool(self.flags & self.READ_ONLY)

    def check(self) -> None:
        """Whole pages, addresses below 2**52, no unknown flag."""
        for field in ("gpa", "size", "fd_offset"):
            value = getattr(self, field)
            require(
                value % PAGE_SIZE == 0, f"memory region: {field} {value:#x} must be whole pages"
            )
        require(self.size, "memory region: size must not be 0")
        require(self.gpa + self.size <= 1 << 52, "memory region: gpa + size must not exceed 2**52")
        require(self.fd_offset < 1 << 62, "memory region: fd_offset must be below 2**62")
        require(
            not self.flags & ~self.READ_ONLY,
            f"memory region: flags {self.flags:#x} hold unknown bits",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class SetMemTable:
    """Request 0x02: the whole of guest memory at once."""

    NAME: ClassVar[str] = "SET_MEM_TABLE"
    LAYOUT: ClassVar[Layout] = Layout(Field("count", 4), Field("reserved", 4))

    regions: tuple[MemoryRegion, ...]

    @property
    def count(self) -> int:
        """Number of regions."""
        return len(self.regions)

    def encode(self) -> bytes:
        """Return the payload."""
        return self.LAYOUT.pack(self) + b"".join(region.encode() for region in self.regions)

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse; regions must not overlap (EEXIST). The order is free."""
        values: list[Any] = cls.LAYOUT.unpack_untrusted(cls.NAME, data, exact=False)
        (count,) = values
        require(1 <= count <= MAX_REGIONS, f"SET_MEM_TABLE: count {count} must be 1 to 64")
        step = MemoryRegion.LAYOUT.size
        start = cls.LAYOUT.size
        require(
            len(data) == start + count * step,
            f"SET_MEM_TABLE: length is {len(data)}, {count} regions make {start + count * step}",
            errno.EMSGSIZE,
        )
        regions = tuple(
            MemoryRegion.decode_untrusted(data[at : at + step])
            for at in range(start, len(data), step)
        )
        ordered = sorted(regions, key=lambda region: region.gpa)
        for before, after in itertools.pairwise(ordered):
            require(
                before.gpa + before.size <= after.gpa,
                f"SET_MEM_TABLE: regions at {before.gpa:#x} and {after.gpa:#x} overlap",
                errno.EEXIST,
            )
        return cls(regions)


@dataclasses.dataclass(frozen=True, slots=True)
class RemMem(Payload):
    """Request 0x04: one whole region goes away."""

    NAME: ClassVar[str] = "REM_MEM"
    LAYOUT: ClassVar[Layout] = Layout(Field("gpa", 8), Field("size", 8))

    gpa: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class VmInfo(Payload):
    """Request 0x05: what kind of machine this is."""

    NAME: ClassVar[str] = "VM_INFO"
    LAYOUT: ClassVar[Layout] = Layout(
        Field("vp_count", 4),
        Field("page_size", 4),
        Field("vm_id", 16),
        Field("privileges", 8),
        Field("flags", 4),
        Field("reserved", 4),
    )

    vp_count: int
    page_size: int
    vm_id: bytes
    """16 bytes, in the order of the text form (RFC 9562)."""
    privileges: int
    """CPUID leaf 0x40000003: EAX in the low half, EBX in the high half; for logs."""
    flags: int

    @property
    def uuid(self) -> uuid.UUID:
        """The VM's identity."""
        return uuid.UUID(bytes=self.vm_id)

    def check(self) -> None:
        """4 KiB pages, at least one VP, no flag (confidential VMs are not supported)."""
        require(self.vp_count, "VM_INFO: vp_count must not be 0")
        require(self.page_size == PAGE_SIZE, "VM_INFO: page_size must be 4096")
        require(not self.flags, f"VM_INFO: flags {self.flags:#x} must be 0", errno.EOPNOTSUPP)


@dataclasses.dataclass(frozen=True, slots=True)
class SynicState(Payload):
    """Request 0x06 (tier T2): the VP's SynIC MSRs as they will be once this is answered."""

    NAME: ClassVar[str] = "SYNIC_STATE"
    LAYOUT: ClassVar[Layout] = Layout(
        Field("vp", 4),
        Field("reserved", 4),
        Field("scontrol", 8),
        Field("simp", 8),
        Field("siefp", 8),
        Field("sint2", 8),
    )

    vp: int
    scontrol: int
    simp: int
    siefp: int
    sint2: int

    @property
    def flags_page(self) -> int | None:
        """Guest address of the event flag page while flags can be raised, else None.

        SCONTROL bit 0 and SIEFP bit 0 enable, SINT bit 16 masks (TLFS 11.8).
        """
        if self.scontrol & 1 and self.siefp & 1 and not self.sint2 >> 16 & 1:
            return self.siefp & ~(PAGE_SIZE - 1)
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class SetSintFd(Payload):
    """Request 0x07 (tier T2): one eventfd that interrupts the VP; goes with one descriptor."""

    NAME: ClassVar[str] = "SET_SINT_FD"
    LAYOUT: ClassVar[Layout] = Layout(Field("vp", 4), Field("sint", 4))

    vp: int
    sint: int

    def check(self) -> None:
        """Only the VMBus SINT."""
        require(self.sint == DIRECT_SINT, f"SET_SINT_FD: sint {self.sint} must be 2")


_POST = struct.Struct("<IIII")


def decode_post_untrusted(data: bytes) -> tuple[int, int, int, bytes]:
    """Parse POST_MESSAGE into (connection id, message type, VP, payload), without an object.

    The server's path from a guest's hypercall to the bus; otherwise see :class:`PostMessage`.
    """
    require(
        len(data) >= 16, f"POST_MESSAGE: length is {len(data)}, must be at least 16", errno.EMSGSIZE
    )
    connection_id, message_type, vp, size = _POST.unpack_from(data)
    payload = data[16:]
    check_connection("POST_MESSAGE", connection_id)
    check_message("POST_MESSAGE", message_type, size, len(payload))
    return connection_id, message_type, vp, payload


@dataclasses.dataclass(frozen=True, slots=True)
class PostMessage:
    """Async 0x08: the guest called HvPostMessage."""

    NAME: ClassVar[str] = "POST_MESSAGE"
    LAYOUT: ClassVar[Layout] = Layout(
        Field("connection_id", 4), Field("message_type", 4), Field("vp", 4), Field("size", 4)
    )

    connection_id: int
    message_type: int
    vp: int
    payload: bytes

    @property
    def size(self) -> int:
        """Bytes of payload."""
        return len(self.payload)

    def encode(self) -> bytes:
        """Return the payload."""
        return self.LAYOUT.pack(self) + self.payload

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse."""
        return cls(*decode_post_untrusted(data))


@dataclasses.dataclass(frozen=True, slots=True)
class SignalEvent(Payload):
    """Async 0x09: the guest called HvSignalEvent and the VMM has no use for the eventfd."""

    NAME: ClassVar[str] = "SIGNAL_EVENT"
    LAYOUT: ClassVar[Layout] = Layout(
        Field("connection_id", 4), Field("flag", 2), Field("reserved", 2)
    )

    connection_id: int
    flag: int

    def check(self) -> None:
        """Ranges."""
        check_connection(self.NAME, self.connection_id)
        check_flag(self.NAME, self.flag)


@dataclasses.dataclass(frozen=True, slots=True)
class Reset(Payload):
    """Request 0x0a: the guest's life ended.

    For the reason see :class:`~vmbus.attach.protocol.limits.ResetReason`.
    """

    NAME: ClassVar[str] = "RESET"
    LAYOUT: ClassVar[Layout] = Layout(Field("reason", 4))

    reason: int


@dataclasses.dataclass(frozen=True, slots=True)
class Goodbye(Payload):
    """Request 0x10, both ways: orderly end.

    For the reason see :class:`~vmbus.attach.protocol.limits.GoodbyeReason`.
    """

    NAME: ClassVar[str] = "GOODBYE"
    LAYOUT: ClassVar[Layout] = Layout(Field("reason", 4))

    reason: int


@dataclasses.dataclass(frozen=True, slots=True)
class Empty(Payload):
    """PAUSE, RESUME, and the reply to most requests: no payload at all."""

    NAME: ClassVar[str] = "empty message"
    LAYOUT: ClassVar[Layout] = Layout()


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """Request 0x0f: ask the server program about itself."""

    NAME: ClassVar[str] = "QUERY"

    kind: str

    def encode(self) -> bytes:
        """Return the payload."""
        return self.kind.encode()

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse."""
        return cls(decode_text_untrusted("QUERY: kind", data, 1, MAX_KIND))


@dataclasses.dataclass(frozen=True, slots=True)
class JsonObject:
    """COMMAND (request 0x13) and the replies to QUERY and COMMAND: one JSON object, UTF-8."""

    NAME: ClassVar[str] = "JSON object"

    value: dict[str, Any]

    def encode(self) -> bytes:
        """Return the payload, compact. Raises TypeError or ValueError for what is not JSON."""
        return json.dumps(self.value, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def decode_untrusted(cls, data: bytes) -> Self:
        """Parse."""
        try:
            value = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            raise PeerProtocolError("payload: not JSON in UTF-8", errno=errno.EINVAL) from None
        require(isinstance(value, dict), "payload: the JSON must be an object")
        return cls(value)
