"""NDIS objects: sizes by revision, values, refusals."""

from __future__ import annotations

import struct

import pytest

from netvsp.wire import ndis
from vmbus.errors import GuestProtocolError

ALL = ndis.OffloadCapabilities(
    tx_ipv4=0x155,
    rx_ipv4=0x154,
    tx_ipv6=0x55,
    rx_ipv6=0x54,
    lso_max_size=62780,
    lso_min_segments=2,
    lso_ipv6=True,
    rsc_ipv4=True,
    rsc_ipv6=True,
)


@pytest.mark.parametrize(("revision", "size"), [(1, 112), (2, 144), (3, 156)])
def test_capabilities_have_the_size_of_their_revision(revision, size):
    """linux: NDIS_OFFLOAD_SIZE_6_0, _6_1 and the whole; longer ones end the probe."""
    built = ndis.build_offload_capabilities(ALL, revision)
    assert len(built) == size
    assert built[:4] == struct.pack("<BBH", 0xA7, revision, size)
    assert struct.unpack_from("<8I", built, 4) == (2, 0x155, 2, 0x154, 2, 0x55, 2, 0x54)
    assert struct.unpack_from("<7I", built, 80) == (2, 62780, 2, 2, 62780, 2, 5)
    found = ndis.parse_offload_capabilities_untrusted(built)
    assert found.tx_ipv4 == 0x155
    assert (found.lso_max_size, found.lso_min_segments, found.lso_ipv6) == (62780, 2, True)
    assert (found.rsc_ipv4, found.rsc_ipv6) == (revision == 3, revision == 3)
    assert revision < 3 or found == ALL
    query = ndis.build_offload_query(revision)
    assert query == built[:4].ljust(size, b"\0")


def test_no_capabilities_are_a_header_and_zeros():
    built = ndis.build_offload_capabilities(ndis.OffloadCapabilities())
    assert built == struct.pack("<BBH", 0xA7, 3, 156).ljust(156, b"\0")
    assert ndis.parse_offload_capabilities_untrusted(built) == ndis.OffloadCapabilities()
    only_v4 = ndis.OffloadCapabilities(lso_max_size=1000, lso_min_segments=2)
    built = ndis.build_offload_capabilities(only_v4)
    assert struct.unpack_from("<7I", built, 80) == (2, 1000, 2, 0, 0, 0, 0)


def header(kind: int, revision: int, size: int, length: int) -> bytes:
    return struct.pack("<BBH", kind, revision, size).ljust(length, b"\0")


@pytest.mark.parametrize(
    "data",
    [
        b"\xa7\1\x70",
        header(0xA6, 1, 112, 112),
        header(0xA7, 0, 112, 112),
        header(0xA7, 1, 111, 112),
        header(0xA7, 1, 112, 111),
        header(0xA7, 2, 143, 156),
        header(0xA7, 3, 155, 156),
        header(0xA7, 9, 155, 156),
        header(0xA7, 3, 0xFFFF, 156),
    ],
)
def test_capabilities_that_are_none_are_refused(data):
    with pytest.raises(GuestProtocolError):
        ndis.parse_offload_capabilities_untrusted(data)


def test_a_later_revision_begins_like_the_third():
    data = ndis.build_offload_capabilities(ALL)
    data = struct.pack("<BBH", 0xA7, 5, 200) + data[4:] + bytes(44)
    assert ndis.parse_offload_capabilities_untrusted(data) == ALL


def test_parameters_are_as_long_as_linux_makes_them():
    """linux: 22 bytes up to version 4, then 28; what is not there is no change."""
    wanted = ndis.OffloadParameters(
        ipv4=1, tcp_ipv4=4, udp_ipv4=3, tcp_ipv6=4, udp_ipv6=2,
        lso_v2_ipv4=2, lso_v2_ipv6=1, rsc_ipv4=2, rsc_ipv6=1,
    )  # fmt: skip
    built = ndis.build_offload_parameters(wanted)
    assert built == bytes((0x80, 3, 28, 0, 1, 4, 3, 4, 2, 0, 0, 2, 1, 0, 0, 0)) + bytes(
        (0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0)
    )
    assert ndis.parse_offload_parameters_untrusted(built) == wanted
    short = ndis.build_offload_parameters(wanted, size=22)
    assert len(short) == 22
    found = ndis.parse_offload_parameters_untrusted(short)
    assert (found.tcp_ipv4, found.lso_v2_ipv6) == (4, 1)
    assert (found.rsc_ipv4, found.rsc_ipv6) == (0, 0)
    # What the object says is its size counts, not what is behind it.
    cut = built[:2] + b"\x16\0" + built[4:]
    assert ndis.parse_offload_parameters_untrusted(cut) == found


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\3\x1c",
        header(0x81, 3, 28, 28),
        header(0x80, 0, 28, 28),
        header(0x80, 3, 19, 28),
        header(0x80, 3, 29, 28),
        header(0x80, 3, 20, 19),
    ],
)
def test_parameters_that_are_none_are_refused(data):
    with pytest.raises(GuestProtocolError):
        ndis.parse_offload_parameters_untrusted(data)


def test_scaling_capabilities_have_18_bytes():
    """FreeBSD and DPDK take no other size."""
    built = ndis.build_rss_capabilities(ndis.RssCapabilities(0x07000701, 8, 9, 128))
    assert built == struct.pack("<BBHIIIH", 0x88, 2, 18, 0x07000701, 8, 9, 128)
    assert ndis.parse_rss_capabilities_untrusted(built) == (0x07000701, 8, 9, 128)
    assert ndis.build_rss_query() == built[:4].ljust(18, b"\0")
    for bad in (built[:17], b"\x89" + built[1:], b"\x88\1" + built[2:]):
        with pytest.raises(GuestProtocolError):
            ndis.parse_rss_capabilities_untrusted(bad)


def scaling(
    flags: int = 0, *, size: int = 16, at: int = 40, key: int = 40, key_at: int = 56
) -> bytes:
    """As linux: rndis_set_rss_param_msg, with a table of 4."""
    fixed = struct.pack(
        "<BBHHHIHxxIHxxIIII", 0x89, 2, 40, flags, 0, 0x1701, size, at, key, key_at, 0, 0, 0
    )
    return fixed + struct.pack("<4I", 0, 1, 2, 3) + bytes(range(40))


def test_scaling_parameters_are_those_of_linux():
    found = ndis.parse_rss_parameters_untrusted(scaling())
    assert found == (0, 0x1701, (0, 1, 2, 3), bytes(range(40)))
    built = ndis.build_rss_parameters(
        flags=0, hash_information=0x1701, table=(0, 1, 2, 3), key=bytes(range(40))
    )
    assert built == scaling()


@pytest.mark.parametrize(
    ("flags", "table", "key"),
    [
        (ndis.RSS_TABLE_UNCHANGED, False, True),
        (ndis.RSS_KEY_UNCHANGED, True, False),
        (ndis.RSS_DISABLE, False, False),
    ],
)
def test_what_is_unchanged_is_not_looked_at(flags, table, key):
    where = {"at": 0xFFFFFFFF} if not table else {}
    where |= {"key_at": 0xFFFFFFFF} if not key else {}
    found = ndis.parse_rss_parameters_untrusted(scaling(flags, **where))
    assert (bool(found.table), bool(found.key)) == (table, key)


@pytest.mark.parametrize(
    "data",
    [
        scaling()[:27],
        b"\x88" + scaling()[1:],
        b"\x89\0" + scaling()[2:],
        scaling(size=15),
        scaling(size=516),
        scaling(at=27),
        scaling(at=81),
        scaling(at=0xFFFFFFFF),
        scaling(key=41),
        scaling(key_at=57),
        scaling(key_at=0),
    ],
)
def test_scaling_parameters_that_make_no_sense_are_refused(data):
    with pytest.raises(GuestProtocolError):
        ndis.parse_rss_parameters_untrusted(data)


def test_an_object_begins_with_its_header():
    assert ndis.parse_object_untrusted(b"\xa7\3\x9c\0") == (0xA7, 3, 156)
    with pytest.raises(GuestProtocolError, match="of 3 bytes, needs 4"):
        ndis.parse_object_untrusted(b"\xa7\3\x9c")
