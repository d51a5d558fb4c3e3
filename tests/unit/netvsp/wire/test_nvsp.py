"""NVSP messages: the bytes that drivers send and take, and refusals."""

from __future__ import annotations

import struct

import pytest

from netvsp.wire import nvsp
from tests.support.ids import plain
from vmbus.errors import GuestProtocolError


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


BUILT = [
    (nvsp.build_init(nvsp.VERSION_1, nvsp.VERSION_6_1), words(1, 2, 0x60001)),
    (nvsp.build_init_complete(nvsp.VERSION_5, nvsp.SUCCESS), words(2, 0x50000, 34, 1)),
    (nvsp.build_ndis_version(6, 30), words(100, 6, 30)),
    (nvsp.build_ndis_config(1514, nvsp.CAPABILITY_8021Q), words(125, 1514, 0, 8, 0)),
    (nvsp.build_ndis_config(1514, 1 << 32 | 0x88), words(125, 1514, 0, 0x88, 1)),
    (nvsp.build_buffer(nvsp.SEND_RECEIVE_BUFFER, 0xE1E10, 0xCAFE), words(101, 0xE1E10, 0xCAFE)),
    (nvsp.build_buffer(nvsp.SEND_SEND_BUFFER, 7, 0), words(104, 7, 0)),
    (nvsp.build_revoke(nvsp.REVOKE_RECEIVE_BUFFER, 0xCAFE), words(103, 0xCAFE)),
    (nvsp.build_revoke(nvsp.REVOKE_SEND_BUFFER, 0), words(106, 0)),
    (
        nvsp.build_receive_buffer_complete(nvsp.SUCCESS, 2048, 100),
        words(102, 1, 1, 0, 2048, 100, 204800),
    ),
    (nvsp.build_receive_buffer_complete(nvsp.FAILURE), words(102, 2, 1, 0, 0, 0, 0)),
    (nvsp.build_send_buffer_complete(nvsp.SUCCESS, 6144), words(105, 1, 6144)),
    (nvsp.build_rndis_packet(nvsp.CHANNEL_CONTROL), words(107, 1, 0xFFFFFFFF, 0)),
    (nvsp.build_rndis_packet(nvsp.CHANNEL_DATA, 3, 99), words(107, 0, 3, 99)),
    (nvsp.build_data_path(nvsp.DATA_PATH_VF), words(129, 1)),
    (nvsp.build_subchannel(7), words(133, 1, 7)),
    (nvsp.build_subchannel_complete(nvsp.SUCCESS, 3), words(133, 1, 3)),
    (nvsp.build_vf_association(allocated=True, serial=9), words(128, 1, 9)),
    (nvsp.build_oid_query_complete(0xC00000BB), words(132, 0xC00000BB)),
]


@pytest.mark.parametrize(("built", "wanted"), BUILT, ids=lambda each: f"{each[0]}")
def test_a_message_has_its_fields_where_drivers_have_them(built, wanted):
    """linux: sizeof(struct nvsp_message) with version 6.1; UEFI has room for 32 of an answer."""
    short = built[0] in {nvsp.INIT_COMPLETE, 102, 105}
    assert built == wanted.ljust(32 if short else 40, b"\0")


def test_a_completed_rndis_packet_has_8_bytes():
    """linux: struct recv_comp_msg; FreeBSD looks for no more."""
    assert nvsp.build_rndis_packet_complete(nvsp.SUCCESS) == words(108, 1)


PARSED = [
    (nvsp.parse_type_untrusted, words(100), 100),
    (nvsp.parse_init_untrusted, words(1, 2, 0x60001), (2, 0x60001)),
    (nvsp.parse_init_complete_untrusted, words(2, 0x50000, 34, 3), (0x50000, 3)),
    (nvsp.parse_ndis_version_untrusted, words(100, 6, 30), (6, 30)),
    (nvsp.parse_ndis_config_untrusted, words(125, 1514, 99, 0x28, 1), (1514, 1 << 32 | 0x28)),
    (nvsp.parse_buffer_untrusted, words(101, 5) + b"\xfe\xca", (5, 0xCAFE)),
    (nvsp.parse_revoke_untrusted, words(103) + b"\xfe\xca", 0xCAFE),
    (
        nvsp.parse_receive_buffer_complete_untrusted,
        words(102, 1, 1, 0, 2048, 100, 204800),
        (1, 1, 0, 2048, 100, 204800),
    ),
    (nvsp.parse_send_buffer_complete_untrusted, words(105, 1, 6144), (1, 6144)),
    (nvsp.parse_rndis_packet_untrusted, words(107, 0, 3, 99), (0, 3, 99)),
    (nvsp.parse_rndis_packet_complete_untrusted, words(108, 2), 2),
    (nvsp.parse_data_path_untrusted, words(129, 1), 1),
    (nvsp.parse_subchannel_untrusted, words(133, 1, 7), (1, 7)),
    (nvsp.parse_subchannel_complete_untrusted, words(133, 1, 3), (1, 3)),
    (
        nvsp.parse_send_table_untrusted,
        words(134, 16, 40).ljust(40, b"\0") + words(*range(16)),
        tuple(range(16)),
    ),
]


@pytest.mark.parametrize(("parse", "data", "wanted"), PARSED, ids=plain)
def test_each_message_is_read_and_refused_if_it_is_a_byte_too_short(parse, data, wanted):
    assert parse(data) == wanted
    assert parse(data + b"junk") == wanted
    with pytest.raises(GuestProtocolError) as caught:
        parse(data[:-1])
    assert caught.value.field in {"length8", "offset"}
    with pytest.raises(GuestProtocolError):
        parse(b"")


@pytest.mark.parametrize(
    "header", [(134, 15, 40), (134, 17, 40), (134, 16, 41), (134, 16, 1 << 31)]
)
def test_a_send_table_that_is_not_there_is_refused(header):
    with pytest.raises(GuestProtocolError, match="entries at byte"):
        nvsp.parse_send_table_untrusted(words(*header).ljust(104, b"\0"))


def test_a_send_table_is_where_linux_looks_for_it():
    """linux: netvsc_send_table takes it from byte 40 with version 6 and before."""
    table = tuple(number % 3 for number in range(16))
    built = nvsp.build_send_table(table)
    assert len(built) == 40 + 64
    assert struct.unpack_from("<16I", built, 40) == table
    assert nvsp.parse_send_table_untrusted(built) == table
    with pytest.raises(ValueError, match="16 entries, not 3"):
        nvsp.build_send_table((0, 1, 2))


def test_versions_are_in_order_and_have_names():
    assert list(nvsp.VERSIONS) == sorted(nvsp.VERSIONS)
    assert set(nvsp.VERSION_NAMES) == set(nvsp.VERSIONS)
    assert nvsp.MESSAGE_NAMES[nvsp.SUBCHANNEL] == "SUBCHANNEL"
