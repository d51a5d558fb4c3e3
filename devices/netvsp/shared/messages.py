"""What goes over a line between a switch and those who are connected to it in other processes.

A line is a Unix socket, SOCK_SEQPACKET: it ends, and keeps messages apart. All numbers are little
endian. A message begins with its kind::

    offset  0  1  2  3  4  5  6  7
            kind  0  count  0  0  0  0

====== ========== ========================================================================
kind   name       what follows
====== ========== ========================================================================
1      FRAMES     ``count`` records, then the bytes of as many frames, without a gap
2      STATION    ``count`` is 1 if somebody is there: his address, six bytes; 0: nobody is
3      ADD        ``count`` addresses of six bytes: stations of the sender's own ports
4      REMOVE     the same: they are there no more
5      INFO       a JSON object: what the switch's end of the line has counted
6      HELLO      between switches only; see :mod:`netvsp.shared.meeting`
7      PROOF      the same
====== ========== ========================================================================

A record has 24 bytes::

    0   u32  length of the frame in bytes, 14 to 65 593
    4   u32  number of its flow
    8   u16  tag control information
    10  u16  header_length, bytes   | as in struct virtio_net_hdr;
    12  u16  gso_size               | all zero if nothing is left to do
    14  u16  csum_start             |
    16  u16  csum_offset            |
    18  u8   what is true of it: 1 it has a tag, 2 from an isolated port, 4 from an uplink
    19  u8   flags, and             |
    20  u8   gso_type, as above     |
    21  u8   0
    22  u16  0

Neither end trusts the other: behind each may be a guest that has taken its process over. So what
arrives is checked as if a guest had sent it, and nothing that arrives carries descriptors.
"""

from __future__ import annotations

import enum
import errno
import json
import struct
from collections.abc import Sequence
from typing import Any

from netvsp.frames.frame import (
    DATA_VALID,
    ETHERNET_HEADER,
    ETHERTYPE_VLAN,
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    MAX_FRAME,
    NEEDS_CHECKSUM,
    VLAN_TAG,
    Buffer,
    Frame,
    Offload,
)
from netvsp.switch.port import QUEUE_FULL
from netvsp.switch.switch import Crossing
from vmbus.errors import PeerProtocolError

MAX_FRAMES = 64
"""In one message."""
MAX_DATA = 128 << 10
"""Bytes of the frames of one message; a socket's buffer takes 208 KiB of one."""
MAX_STATIONS = 256
"""Addresses in one message."""
MAX_INFO = 16 << 10
"""Bytes of what a switch tells of its counters."""
LONGEST = MAX_FRAME + 40 + VLAN_TAG
"""Bytes of a frame: a segment of IPv6 does not count its header, and may have a tag."""

HEADER = struct.Struct("<BxHxxxx")
RECORD = struct.Struct("<IIHHHHHBBBBH")
MAX_MESSAGE = HEADER.size + MAX_FRAMES * RECORD.size + MAX_DATA

_TAGGED, _ISOLATED, _UPLINK = 1, 2, 4
"""The last two are Crossing.origin, one bit higher."""
_MIN_MSS = 48
_ADDRESS = 6
_PIECES = 1000
"""sendmsg(2) takes 1024 (UIO_MAXIOV)."""


class Kind(enum.IntEnum):
    """First byte of a message."""

    FRAMES = 1
    STATION = 2
    ADD = 3
    REMOVE = 4
    INFO = 5
    HELLO = 6
    PROOF = 7


def broken(text: str) -> PeerProtocolError:
    """Return what to raise at somebody who breaks the rules. Cannot block."""
    return PeerProtocolError(f"switch: {text}", errno=errno.EPROTO, fatal=True)


def kind_untrusted(data: Buffer) -> tuple[Kind, int]:
    """Return kind and count of a message. Cannot block. Raises PeerProtocolError."""
    if len(data) < HEADER.size:
        raise broken(f"a message of {len(data)} bytes")
    kind, count = HEADER.unpack_from(data)
    if not Kind.FRAMES <= kind <= Kind.PROOF:
        raise broken(f"a message of kind {kind}")
    return Kind(kind), count


# -- frames --------------------------------------------------------------------------------------


def pack_frames(frames: Sequence[Frame]) -> tuple[list[Buffer], int]:
    """Return a message with as many of some frames as it can have. Cannot block.

    Args:
        frames: One at least. What is longer than :data:`LONGEST` is left out.

    Returns:
        Its pieces, those of the frames uncopied, empty if there is nothing to send; and how many
        frames it is done with.
    """
    records: list[bytes] = []
    pieces: list[Buffer] = [b""]
    done = size = 0
    pack = RECORD.pack
    for frame in frames[:MAX_FRAMES]:
        length = len(frame)
        size += length
        if size > MAX_DATA or len(pieces) + len(frame.rest) > _PIECES:
            if done:
                break
            frame = frame.own()  # noqa: PLW2901 - in too many pieces
        done += 1
        if length > LONGEST:
            size -= length
            continue
        tci, offload = frame.tci, frame.offload
        what = 0 if tci is None else _TAGGED
        if isinstance(frame, Crossing):
            what |= frame.origin << 1
        flow = frame.flow & 0xFFFFFFFF
        if offload is None:
            records.append(pack(length, flow, tci or 0, 0, 0, 0, 0, what, 0, 0, 0, 0))
        else:
            flags, gso_type, header_length, gso_size, start, offset = offload
            records.append(
                pack(
                    length, flow, tci or 0, header_length, gso_size, start, offset, what, flags,
                    gso_type, 0, 0,
                )
            )  # fmt: skip
        pieces.append(frame.head)
        if frame.rest:
            pieces += frame.rest
    if not records:
        return [], done
    pieces[0] = HEADER.pack(Kind.FRAMES, len(records)) + b"".join(records)
    return pieces, done


def frames_untrusted(data: memoryview, count: int, *, joint: bool = False) -> list[Frame]:
    """Return the frames of a message, copied. Cannot block.

    Args:
        data: All of it.
        count: As its header says.
        joint: Whether it is from another switch, which says where they came from.

    Returns:
        From another switch, each is a :class:`Crossing`.

    Raises:
        PeerProtocolError: It does not have them, or one is none, or what is left to do for one
            cannot be done.
    """
    if not 1 <= count <= MAX_FRAMES:
        raise broken(f"a message of {count} frames")
    end = len(data)
    at = HEADER.size + count * RECORD.size
    if end < at:
        raise broken(f"{count} frames in {end} bytes")
    most = _TAGGED | _ISOLATED | _UPLINK if joint else _TAGGED
    frames: list[Frame] = []
    for record in RECORD.iter_unpack(data[HEADER.size : at]):
        length, flow, tci, header_length, gso_size, start, offset, what, flags, gso, zero, nil = (
            record
        )
        if not ETHERNET_HEADER <= length <= LONGEST or length > end - at:
            raise broken(f"a frame of {length} bytes where {end - at} are left")
        if zero or nil or what > most or (tci and not what & _TAGGED):
            raise broken("a record with bits that mean nothing")
        head = bytes(data[at : at + length])
        at += length
        offload = None
        if flags or gso:
            offload = Offload(flags, gso, header_length, gso_size, start, offset)
            check_offload_untrusted(head, offload)
        elif header_length or gso_size or start or offset:
            raise broken("fields of an offload that there is not")
        tag = tci if what & _TAGGED else None
        if joint:
            frames.append(Crossing(head, offload, tag, flow, what >> 1))
        else:
            frames.append(Frame(head, (), offload, tag, flow))
    if at != end:
        raise broken(f"{end - at} bytes behind {count} frames")
    return frames


def check_offload_untrusted(head: bytes, offload: Offload) -> None:
    """Check that what is said to be left to do for a frame can be done. Cannot block.

    Args:
        head: The whole frame.
        offload: Of it.

    Raises:
        PeerProtocolError: It cannot.
    """
    flags, gso_type, header_length, gso_size, start, offset = offload
    if flags & ~(NEEDS_CHECKSUM | DATA_VALID):
        raise broken(f"offload flags {flags:#x}")
    if not flags & NEEDS_CHECKSUM:
        if gso_type:
            raise broken("a segment whose sum is not to be filled in")
        return
    network = ETHERNET_HEADER + (VLAN_TAG if head[12:14] == ETHERTYPE_VLAN else 0)
    if start < network or start + offset + 2 > len(head):
        raise broken(f"a sum at byte {start} + {offset} of {len(head)}")
    if gso_type == GSO_NONE:
        return
    kind = gso_type & ~GSO_ECN
    if kind not in {GSO_TCPV4, GSO_TCPV6, GSO_UDP} or (kind == GSO_UDP and kind != gso_type):
        raise broken(f"a segment of type {gso_type:#x}")
    version = head[network] >> 4
    if version not in {4, 6} or (kind == GSO_TCPV4 and version != 4):
        raise broken("a segment of another IP version")
    if kind == GSO_TCPV6 and version != 6:
        raise broken("a segment of another IP version")
    least, place = (8, 6) if kind == GSO_UDP else (20, 16)
    if start < network + (40 if version == 6 else 20) or offset != place:
        raise broken(f"a segment whose header is at byte {start}, its sum at {offset}")
    if not start + least <= header_length < len(head):
        raise broken(f"a segment whose headers end at byte {header_length} of {len(head)}")
    if gso_size < _MIN_MSS:
        raise broken(f"a segment to be cut into pieces of {gso_size} bytes")


# -- the others ----------------------------------------------------------------------------------


def pack_station(address: bytes | None) -> bytes:
    """Return a message that says who is there. Cannot block."""
    return HEADER.pack(Kind.STATION, address is not None) + (address or bytes(_ADDRESS))


def station_untrusted(data: Buffer, count: int) -> bytes | None:
    """Return the address of who is there; None: nobody. Raises PeerProtocolError."""
    if len(data) != HEADER.size + _ADDRESS or count > 1:
        raise broken(f"a station in {len(data)} bytes")
    address = bytes(data[HEADER.size :])
    if count and (address[0] & 1 or not any(address)):
        raise broken("an address that no station has")
    return address if count else None


def pack_stations(kind: Kind, addresses: Sequence[bytes]) -> bytes:
    """Return a message of kind ADD or REMOVE, with :data:`MAX_STATIONS` at most. Cannot block."""
    return HEADER.pack(kind, len(addresses)) + b"".join(addresses)


def stations_untrusted(data: Buffer, count: int) -> list[bytes]:
    """Return the addresses of a message of kind ADD or REMOVE. Raises PeerProtocolError."""
    if count > MAX_STATIONS or len(data) != HEADER.size + count * _ADDRESS:
        raise broken(f"{count} stations in {len(data)} bytes")
    body = bytes(data[HEADER.size :])
    found = [body[at : at + _ADDRESS] for at in range(0, len(body), _ADDRESS)]
    if any(each[0] & 1 or not any(each) for each in found):
        raise broken("an address that no station has")
    return found


def pack_info(info: dict[str, Any]) -> bytes:
    """Return a message that tells what has been counted. Cannot block."""
    return HEADER.pack(Kind.INFO, 0) + json.dumps(info).encode()


def info_untrusted(data: Buffer) -> dict[str, Any]:
    """Return what has been counted. Raises PeerProtocolError."""
    if len(data) > MAX_INFO:
        raise broken(f"{len(data)} bytes of counters")
    try:
        info = json.loads(bytes(data[HEADER.size :]))
    except (ValueError, RecursionError) as error:
        raise broken("counters that are no JSON") from error
    if not isinstance(info, dict):
        raise broken("counters that are no object")
    return info


def lost_untrusted(info: dict[str, Any]) -> int:
    """Return how many frames were dropped since the guest did not take them, if it is said.

    Args:
        info: What :func:`info_untrusted` returns.
    """
    found: object = info
    for name in ("port", "dropped", QUEUE_FULL):
        found = found.get(name) if isinstance(found, dict) else None
    return found if type(found) is int and 0 < found < 1 << 64 else 0
