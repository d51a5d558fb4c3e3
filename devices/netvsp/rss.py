"""Receive-side scaling: which of the guest's channels a frame belongs on.

The hash is Microsoft's Toeplitz hash: for each bit of addresses and ports that is set, 32 bits of
the key from that bit on. Here each byte is looked up in a table of its place, and what has been
found for a flow is remembered. Source: "RSS hashing functions" of the WDK, whose examples are the
tests; linux/drivers/net/hyperv/rndis_filter.c (rndis_set_rss_param_msg).
"""

from __future__ import annotations

from netvsp.frames.frame import ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTOCOL_TCP
from netvsp.wire.ndis import (
    HASH_IPV4,
    HASH_IPV6,
    HASH_IPV6_EX,
    HASH_TCP_IPV4,
    HASH_TCP_IPV6,
    HASH_TCP_IPV6_EX,
)

MAX_FLOWS = 4096
"""Flows whose hash is remembered; then all are forgotten."""
_LONGEST = 36
"""Bytes of two IPv6 addresses and two ports."""


class Toeplitz:
    """The hash for one key.

    Args:
        key: 40 bytes; what is missing is zero.
    """

    def __init__(self, key: bytes) -> None:
        number = int.from_bytes(key.ljust(_LONGEST + 4, b"\0")[: _LONGEST + 4], "big")
        width = 8 * (_LONGEST + 4)
        self._tables: list[list[int]] = []
        for place in range(_LONGEST):
            table = [0]
            for bit in range(7, -1, -1):  # from the lowest bit of the byte on
                window = number >> (width - 32 - 8 * place - bit) & 0xFFFFFFFF
                table += [each ^ window for each in table]
            self._tables.append(table)

    def hash(self, data: bytes) -> int:
        """Return the 32-bit hash of up to 36 bytes. Cannot block."""
        result = 0
        for table, byte in zip(self._tables, data, strict=False):
            result ^= table[byte]
        return result


class Scaling:
    """Key, kinds of hash and indirection table as the guest has set them.

    Args:
        key: 40 bytes.
        kinds: ``HASH_*`` of :mod:`netvsp.wire.ndis`.
        table: Numbers of channels; not empty.
    """

    def __init__(self, key: bytes, kinds: int, table: tuple[int, ...]) -> None:
        self.key = key
        self.kinds = kinds
        self.table = table
        self._toeplitz: Toeplitz | None = None
        """Made for the first frame: a guest can set another key more often than it gets one."""
        self._tcp_v4 = bool(kinds & HASH_TCP_IPV4)
        self._v4 = bool(kinds & (HASH_IPV4 | HASH_TCP_IPV4))
        self._tcp_v6 = bool(kinds & (HASH_TCP_IPV6 | HASH_TCP_IPV6_EX))
        self._v6 = bool(kinds & (HASH_IPV6 | HASH_IPV6_EX | HASH_TCP_IPV6))
        self._flows: dict[bytes, int] = {}

    def hash(self, head: bytes) -> int:
        """Return the hash of a frame by its headers, 0 if it has none. Cannot block.

        Args:
            head: From its destination address on, without a VLAN tag.
        """
        ethertype = head[12:14]
        if ethertype == ETHERTYPE_IPV4 and len(head) >= 34:
            # Parts of a packet do not all have ports.
            if self._tcp_v4 and head[23] == PROTOCOL_TCP and not (head[20] & 0x3F or head[21]):
                start = 14 + 4 * (head[14] & 0xF)
                if len(head) >= start + 4 >= 38:
                    return self._look_up(head[26:34] + head[start : start + 4])
            if self._v4:
                return self._look_up(head[26:34])
        elif ethertype == ETHERTYPE_IPV6 and len(head) >= 54:
            if self._tcp_v6 and head[20] == PROTOCOL_TCP and len(head) >= 58:
                return self._look_up(head[22:58])
            if self._v6:
                return self._look_up(head[22:54])
        return 0

    def _look_up(self, flow: bytes) -> int:
        found = self._flows.get(flow)
        if found is None:
            if len(self._flows) >= MAX_FLOWS:
                self._flows.clear()
            if self._toeplitz is None:
                self._toeplitz = Toeplitz(self.key)
            found = self._flows[flow] = self._toeplitz.hash(flow)
        return found
