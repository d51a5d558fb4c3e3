"""NDIS objects: what RNDIS asks about offloads and receive-side scaling, and sets.

An object begins with type u8, revision u8, size u16. How long one is depends on its revision, which
drivers choose by the NVSP version: they name revision and size in the query, and believe nothing
longer than that (FreeBSD and DPDK take the receive-side scaling capabilities at 18 bytes only).

Sources: linux/drivers/net/hyperv/hyperv_net.h (``struct ndis_offload`` and what is around it);
freebsd/sys/net/rndis.h and sys/dev/hyperv/netvsc/ndis.h; ntddndis.h of the WDK.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import NamedTuple

from vmbus.errors import GuestProtocolError

OBJECT_DEFAULT = 0x80
OBJECT_RSS_CAPABILITIES = 0x88
OBJECT_RSS_PARAMETERS = 0x89
OBJECT_OFFLOAD = 0xA7

OBJECT_HEADER = struct.Struct("<BBH")
"""type, revision, size."""

# Sizes of the offload capabilities, by revision.
OFFLOAD_SIZES = {1: 112, 2: 144, 3: 156}
ENCAPSULATION_8023 = 2

# Checksum capabilities; the same bits are IPv6 extension headers and options where it is about v6.
CSUM_IP_OPTIONS = 0x001
CSUM_TCP_OPTIONS = 0x004
CSUM_TCP = 0x010
CSUM_UDP = 0x040
CSUM_IP = 0x100
LSO_IP6_EXTENSIONS = 0x001
LSO_TCP6_OPTIONS = 0x004

_OFFLOAD = struct.Struct("<BBH 8I 4I 7I 7I I I11Bx4I BB2x II")
assert _OFFLOAD.size == OFFLOAD_SIZES[3]

# Values of the offload parameters.
NO_CHANGE = 0
CSUM_DISABLED = 1
CSUM_TX = 2
CSUM_RX = 3
CSUM_BOTH = 4
OFFLOAD_DISABLED = 1
OFFLOAD_ENABLED = 2

_PARAMETERS = struct.Struct("<BBH 11Bx I BBBBBB2x")
assert _PARAMETERS.size == 28
_SHORTEST_PARAMETERS = 20
"""Up to and including the flags; what follows depends on the revision, and counts as no change."""

# Receive-side scaling.
RSS_SIGNALLED_INTERRUPTS = 0x01000000
RSS_CLASSIFICATION_ISR = 0x02000000
RSS_CLASSIFICATION_DPC = 0x04000000
RSS_TCP_IPV4 = 0x00000100
RSS_TCP_IPV6 = 0x00000200
RSS_TCP_IPV6_EX = 0x00000400
RSS_TOEPLITZ = 0x00000001
RSS_TABLE_ENTRIES = 128
RSS_KEY_SIZE = 40
_RSS_CAPABILITIES = struct.Struct("<BBH III H")
assert _RSS_CAPABILITIES.size == 18
_RSS_PARAMETERS = struct.Struct("<BBH HH I H2x I H2x I")
_RSS_PARAMETERS_SIZE = 40
"""Of the fixed part; masks of processors, which nobody uses, are the rest of it."""
assert _RSS_PARAMETERS.size == 28

RSS_BASE_CPU_UNCHANGED = 1 << 0
RSS_HASH_INFO_UNCHANGED = 1 << 1
RSS_TABLE_UNCHANGED = 1 << 2
RSS_KEY_UNCHANGED = 1 << 3
RSS_DISABLE = 1 << 4

HASH_TOEPLITZ = 0x00000001
HASH_IPV4 = 0x00000100
HASH_TCP_IPV4 = 0x00000200
HASH_IPV6 = 0x00000400
HASH_IPV6_EX = 0x00000800
HASH_TCP_IPV6 = 0x00001000
HASH_TCP_IPV6_EX = 0x00002000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OffloadCapabilities:
    """What the device can do with a frame: ``TCP_OFFLOAD_HARDWARE_CAPABILITIES``."""

    tx_ipv4: int = 0
    """``CSUM_*``: sums that it fills in for the guest."""
    rx_ipv4: int = 0
    """``CSUM_*``: sums that it looks at for the guest."""
    tx_ipv6: int = 0
    rx_ipv6: int = 0
    lso_max_size: int = 0
    """Bytes of the longest TCP segment that it cuts; 0: none."""
    lso_min_segments: int = 0
    lso_ipv6: bool = False
    """It cuts those of IPv6, too."""
    rsc_ipv4: bool = False
    """It hands over several segments as one."""
    rsc_ipv6: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OffloadParameters:
    """What a guest switches on and off: ``TCP_OFFLOAD_PARAMETERS``. 0 means: as it is."""

    ipv4: int = NO_CHANGE
    tcp_ipv4: int = NO_CHANGE
    udp_ipv4: int = NO_CHANGE
    tcp_ipv6: int = NO_CHANGE
    udp_ipv6: int = NO_CHANGE
    lso_v2_ipv4: int = NO_CHANGE
    lso_v2_ipv6: int = NO_CHANGE
    rsc_ipv4: int = NO_CHANGE
    rsc_ipv6: int = NO_CHANGE


class RssCapabilities(NamedTuple):
    """``GEN_RECEIVE_SCALE_CAPABILITIES``."""

    flags: int
    interrupts: int
    queues: int
    table_entries: int


class RssParameters(NamedTuple):
    """``GEN_RECEIVE_SCALE_PARAMETERS``."""

    flags: int
    """``RSS_*_UNCHANGED``, :data:`RSS_DISABLE`."""
    hash_information: int
    """``HASH_*``."""
    table: tuple[int, ...]
    """Channels; empty if it is unchanged."""
    key: bytes


def parse_object_untrusted(data: bytes) -> tuple[int, int, int]:
    """Return type, revision and size of an object. Raises GuestProtocolError below 4 bytes."""
    kind, revision, size = _unpack(OBJECT_HEADER, data, "object")
    return kind, revision, size


def build_offload_capabilities(capabilities: OffloadCapabilities, revision: int = 3) -> bytes:
    """Return the object, in as many bytes as its revision has. Cannot block."""
    c = capabilities
    v4, v6 = bool(c.lso_max_size), bool(c.lso_max_size and c.lso_ipv6)
    whole = _OFFLOAD.pack(
        OBJECT_OFFLOAD,
        revision,
        OFFLOAD_SIZES[revision],
        _encapsulation(c.tx_ipv4),
        c.tx_ipv4,
        _encapsulation(c.rx_ipv4),
        c.rx_ipv4,
        _encapsulation(c.tx_ipv6),
        c.tx_ipv6,
        _encapsulation(c.rx_ipv6),
        c.rx_ipv6,
        *(0, 0, 0, 0),  # large send, version 1
        *(0, 0, 0, 0, 0, 0, 0),  # IPsec, version 1
        _encapsulation(v4),
        c.lso_max_size if v4 else 0,
        c.lso_min_segments if v4 else 0,
        _encapsulation(v6),
        c.lso_max_size if v6 else 0,
        c.lso_min_segments if v6 else 0,
        LSO_IP6_EXTENSIONS | LSO_TCP6_OPTIONS if v6 else 0,
        0,
        *(0,) * 16,  # IPsec, version 2
        c.rsc_ipv4,
        c.rsc_ipv6,
        *(0, 0),  # encapsulated packets
    )
    return whole[: OFFLOAD_SIZES[revision]]


def _encapsulation(present: object) -> int:
    return ENCAPSULATION_8023 if present else 0


def parse_offload_capabilities_untrusted(data: bytes) -> OffloadCapabilities:
    """Return what an object of offload capabilities says, of any revision. Cannot block.

    Raises:
        GuestProtocolError: It is not one, or too short for its revision.
    """
    kind, revision, size = parse_object_untrusted(data)
    needed = OFFLOAD_SIZES.get(min(revision, 3), 0)
    if kind != OBJECT_OFFLOAD or not needed or size > len(data) or size < needed:
        raise GuestProtocolError(
            f"NDIS object {kind:#x}, revision {revision}, of {size} bytes in {len(data)}",
            field="size",
        )
    f = _OFFLOAD.unpack(data[:size].ljust(_OFFLOAD.size, b"\0")[: _OFFLOAD.size])
    return OffloadCapabilities(
        tx_ipv4=f[4],
        rx_ipv4=f[6],
        tx_ipv6=f[8],
        rx_ipv6=f[10],
        lso_max_size=f[23],
        lso_min_segments=f[24],
        lso_ipv6=bool(f[25]),
        rsc_ipv4=bool(f[46]),
        rsc_ipv6=bool(f[47]),
    )


def build_offload_query(revision: int) -> bytes:
    """Return the object that a driver puts into its query: a header, zero-filled. Cannot block."""
    size = OFFLOAD_SIZES[revision]
    return OBJECT_HEADER.pack(OBJECT_OFFLOAD, revision, size).ljust(size, b"\0")


def build_offload_parameters(
    parameters: OffloadParameters, *, revision: int = 3, size: int = _PARAMETERS.size
) -> bytes:
    """Return the object in ``size`` bytes: Linux sends 22 up to NVSP 4. Cannot block."""
    p = parameters
    return _PARAMETERS.pack(
        OBJECT_DEFAULT,
        revision,
        size,
        p.ipv4,
        p.tcp_ipv4,
        p.udp_ipv4,
        p.tcp_ipv6,
        p.udp_ipv6,
        0,
        0,
        p.lso_v2_ipv4,
        p.lso_v2_ipv6,
        0,
        0,
        0,
        0,
        0,
        p.rsc_ipv4,
        p.rsc_ipv6,
        0,
        0,
    )[:size]


def parse_offload_parameters_untrusted(data: bytes) -> OffloadParameters:
    """Return what a guest wants of the offloads. Cannot block.

    Raises:
        GuestProtocolError: Not such an object, shorter than 20 bytes, or than it says.
    """
    kind, revision, size = parse_object_untrusted(data)
    if kind != OBJECT_DEFAULT or not revision or not _SHORTEST_PARAMETERS <= size <= len(data):
        raise GuestProtocolError(
            f"offload parameters: NDIS object {kind:#x}, revision {revision}, of {size} bytes in "
            f"{len(data)}",
            field="size",
        )
    f = _PARAMETERS.unpack(data[:size].ljust(_PARAMETERS.size, b"\0")[: _PARAMETERS.size])
    return OffloadParameters(
        ipv4=f[3],
        tcp_ipv4=f[4],
        udp_ipv4=f[5],
        tcp_ipv6=f[6],
        udp_ipv6=f[7],
        lso_v2_ipv4=f[10],
        lso_v2_ipv6=f[11],
        rsc_ipv4=f[17],
        rsc_ipv6=f[18],
    )


def build_rss_capabilities(capabilities: RssCapabilities) -> bytes:
    """Return the object: exactly 18 bytes. Cannot block."""
    size = _RSS_CAPABILITIES.size
    return _RSS_CAPABILITIES.pack(OBJECT_RSS_CAPABILITIES, 2, size, *capabilities)


def build_rss_query() -> bytes:
    """Return the object that a driver puts into its query. Cannot block."""
    size = _RSS_CAPABILITIES.size
    return OBJECT_HEADER.pack(OBJECT_RSS_CAPABILITIES, 2, size).ljust(size, b"\0")


def parse_rss_capabilities_untrusted(data: bytes) -> RssCapabilities:
    """Return what the capabilities say. Raises GuestProtocolError if it is not such an object."""
    fields = _unpack(_RSS_CAPABILITIES, data, "receive-side scaling capabilities")
    if fields[0] != OBJECT_RSS_CAPABILITIES or fields[1] < 2:
        raise GuestProtocolError(
            f"NDIS object {fields[0]:#x}, revision {fields[1]}", field="hdr.type"
        )
    return RssCapabilities._make(fields[3:])


def build_rss_parameters(
    *,
    flags: int,
    hash_information: int,
    table: tuple[int, ...],
    key: bytes,
    key_first: bool = False,
) -> bytes:
    """Return the object, with its table and key behind it. Cannot block.

    Args:
        flags: ``RSS_*``.
        hash_information: ``HASH_*``.
        table: Channels, up to 128.
        key: 40 bytes.
        key_first: As FreeBSD has it: the key before the table, and a size that is that of all
            (hn_rndis_conf_rss). Else it is that of the fixed part, and the table comes first.
    """
    fixed = _RSS_PARAMETERS_SIZE
    whole = fixed + 4 * len(table) + len(key)
    entries = struct.pack(f"<{len(table)}I", *table)
    return _RSS_PARAMETERS.pack(
        OBJECT_RSS_PARAMETERS,
        2,
        whole if key_first else fixed,
        flags,
        0,
        hash_information,
        len(entries),
        fixed + len(key) if key_first else fixed,
        len(key),
        fixed if key_first else fixed + len(entries),
    ).ljust(fixed, b"\0") + (key + entries if key_first else entries + key)


def parse_rss_parameters_untrusted(data: bytes) -> RssParameters:
    """Return what a guest wants of receive-side scaling. Cannot block.

    Raises:
        GuestProtocolError: Not such an object, too short, or table or key are not in it, too long,
            or no whole entries.
    """
    fields = _unpack(_RSS_PARAMETERS, data, "receive-side scaling parameters")
    kind, revision, _size, flags, _cpu, information, size, offset, key_size, key_offset = fields
    if kind != OBJECT_RSS_PARAMETERS or not revision:
        raise GuestProtocolError(f"NDIS object {kind:#x}, revision {revision}", field="hdr.type")
    table: tuple[int, ...] = ()
    key = b""
    if not flags & (RSS_TABLE_UNCHANGED | RSS_DISABLE):
        part = _part(data, offset, size, 4 * RSS_TABLE_ENTRIES, "indirect_tab")
        if size & 3:
            raise GuestProtocolError(
                f"receive-side scaling: a table of {size} bytes", field="indirect_tabsize"
            )
        table = struct.unpack(f"<{size // 4}I", part)
    if not flags & (RSS_KEY_UNCHANGED | RSS_DISABLE):
        key = _part(data, key_offset, key_size, RSS_KEY_SIZE, "hashkey_")
    return RssParameters(flags, information, table, key)


def _part(data: bytes, offset: int, size: int, most: int, name: str) -> bytes:
    if size > most or offset < _RSS_PARAMETERS.size or offset + size > len(data):
        raise GuestProtocolError(
            f"receive-side scaling: {size} bytes at {offset} of {len(data)}, at most {most}",
            field=f"{name}size",
        )
    return data[offset : offset + size]


def _unpack(layout: struct.Struct, data: bytes, name: str) -> tuple[int, ...]:
    if len(data) < layout.size:
        raise GuestProtocolError(
            f"NDIS {name} of {len(data)} bytes, needs {layout.size}", field="size"
        )
    return layout.unpack_from(data)
