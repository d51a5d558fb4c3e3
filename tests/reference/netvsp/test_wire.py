"""The layouts of NVSP and RNDIS declared a second time, with construct, and proven equal."""

from __future__ import annotations

import struct
from typing import Any

import construct as c
import pytest
from hypothesis import given, strategies as st

from netvsp import oid_answers, placing
from netvsp.frames import frame
from netvsp.wire import ndis, nvsp, ppi, rndis

U8, U16, U32, U64 = c.Int8ul, c.Int16ul, c.Int32ul, c.Int64ul


def words(*names: str) -> list[Any]:
    return [name / U32 for name in names]


def octets(*names: str) -> list[Any]:
    return [name / U8 for name in names]


NVSP_TYPE = c.Padding(4)
NVSP = {
    "type": (nvsp._TYPE, c.Struct(*words("msg_type"))),
    "init": (nvsp._INIT, c.Struct(NVSP_TYPE, *words("min", "max"))),
    "init-complete": (
        nvsp._INIT_COMPLETE,
        c.Struct(*words("msg_type", "negotiated", "max_mdl_chain", "status")),
    ),
    "ndis-version": (nvsp._NDIS_VERSION, c.Struct(NVSP_TYPE, *words("major", "minor"))),
    "ndis-config": (
        nvsp._NDIS_CONFIG,
        c.Struct(NVSP_TYPE, "mtu" / U32, c.Padding(4), "capabilities" / U64),
    ),
    "buffer": (nvsp._BUFFER, c.Struct(NVSP_TYPE, "gpadl_handle" / U32, "id" / U16)),
    "revoke": (nvsp._REVOKE, c.Struct(NVSP_TYPE, "id" / U16)),
    "receive-buffer-complete": (
        nvsp._RECEIVE_BUFFER_COMPLETE,
        c.Struct(
            *words("msg_type", "status", "sections"),
            *words("offset", "sub_alloc_size", "sub_alloc_count", "end_offset"),
        ),
    ),
    "send-buffer-complete": (
        nvsp._SEND_BUFFER_COMPLETE,
        c.Struct(*words("msg_type", "status", "section_size")),
    ),
    "rndis-packet": (
        nvsp.RNDIS_PACKET,
        c.Struct(*words("msg_type", "channel_type", "section_index", "section_size")),
    ),
    "rndis-packet-complete": (
        nvsp.RNDIS_PACKET_COMPLETE,
        c.Struct(*words("msg_type", "status")),
    ),
    "data-path": (nvsp._DATA_PATH, c.Struct(NVSP_TYPE, *words("active"))),
    "subchannel": (nvsp._SUBCHANNEL, c.Struct(NVSP_TYPE, *words("op", "count"))),
    "subchannel-complete": (
        nvsp._SUBCHANNEL_COMPLETE,
        c.Struct(*words("msg_type", "status", "count")),
    ),
    "send-table": (nvsp._SEND_TABLE, c.Struct(*words("msg_type", "count", "offset"))),
}

RNDIS_HEAD = words("type", "length")
RNDIS = {
    "header": (rndis.HEADER, c.Struct(*RNDIS_HEAD)),
    "packet": (
        rndis.PACKET_HEADER,
        c.Struct(
            *RNDIS_HEAD,
            *words("data_offset", "data_len"),
            *words("oob_data_offset", "oob_data_len", "num_oob_data_elements"),
            *words("per_pkt_info_offset", "per_pkt_info_len", "vc_handle", "reserved"),
        ),
    ),
    "initialize": (
        rndis._INITIALIZE,
        c.Struct(*RNDIS_HEAD, *words("req_id", "major_ver", "minor_ver", "max_xfer_size")),
    ),
    "initialize-complete": (
        rndis._INITIALIZE_REPLY,
        c.Struct(
            *RNDIS_HEAD,
            *words("req_id", "status", "major_ver", "minor_ver", "dev_flags", "medium"),
            *words("max_pkt_per_msg", "max_xfer_size", "pkt_alignment_factor"),
            *words("af_list_offset", "af_list_size"),
        ),
    ),
    "id": (rndis._ID, c.Struct(*RNDIS_HEAD, *words("req_id"))),
    "request": (
        rndis._REQUEST,
        c.Struct(
            *RNDIS_HEAD,
            *words("req_id", "oid", "info_buflen", "info_buf_offset", "dev_vc_handle"),
        ),
    ),
    "query-complete": (
        rndis._QUERY_REPLY,
        c.Struct(*RNDIS_HEAD, *words("req_id", "status", "info_buflen", "info_buf_offset")),
    ),
    "set-complete": (rndis._STATUS_REPLY, c.Struct(*RNDIS_HEAD, *words("req_id", "status"))),
    "indicate-status": (
        rndis._INDICATE,
        c.Struct(*RNDIS_HEAD, *words("status", "status_buflen", "status_buf_offset")),
    ),
    "config-parameter": (
        rndis._PARAMETER,
        c.Struct(
            *words("name_offset", "name_length", "type", "value_offset", "value_length"),
        ),
    ),
}

ITEM = words("size", "type", "ppi_offset")
PPI = {
    "item": (ppi._ITEM, c.Struct(*ITEM)),
    "value": (ppi._VALUE_ITEM, c.Struct(*ITEM, *words("value"))),
    "packet-id": (
        ppi._PACKET_ID_ITEM,
        c.Struct(*ITEM, *octets("ver", "flag"), "pkt_id" / U16),
    ),
}

OBJECT = [*octets("type", "revision"), "size" / U16]
NDIS = {
    "object": (ndis.OBJECT_HEADER, c.Struct(*OBJECT)),
    "offload": (
        ndis._OFFLOAD,
        c.Struct(
            *OBJECT,
            *words("ip4_txenc", "ip4_txcsum", "ip4_rxenc", "ip4_rxcsum"),
            *words("ip6_txenc", "ip6_txcsum", "ip6_rxenc", "ip6_rxcsum"),
            *words("lsov1_encap", "lsov1_maxsize", "lsov1_minsegs", "lsov1_opts"),
            *words("ipsec1_encap", "ipsec1_ah_esp", "ipsec1_xport_tun", "ipsec1_ip4_opts"),
            *words("ipsec1_flags", "ipsec1_ip4_ah", "ipsec1_ip4_esp"),
            *words("lso_ip4_encap", "lso_ip4_maxsz", "lso_ip4_minsg"),
            *words("lso_ip6_encap", "lso_ip6_maxsz", "lso_ip6_minsg", "lso_ip6_opts"),
            *words("flags", "ipsec2_encap"),
            *octets("ip6", "ip4opt", "ip6ext", "ah", "esp", "ah_esp"),
            *octets("xport", "tun", "xport_tun", "lso", "extseq"),
            c.Padding(1),
            *words("udp_esp", "auth", "crypto", "sa_caps"),
            *octets("rsc_ip4", "rsc_ip6"),
            c.Padding(2),
            *words("encap_flags", "encap_maxhdr"),
        ),
    ),
    "offload-parameters": (
        ndis._PARAMETERS,
        c.Struct(
            *OBJECT,
            *octets("ip_v4", "tcp_ip_v4", "udp_ip_v4", "tcp_ip_v6", "udp_ip_v6"),
            *octets("lso_v1", "ip_sec_v1", "lso_v2_ipv4", "lso_v2_ipv6"),
            *octets("tcp_connection_ip_v4", "tcp_connection_ip_v6"),
            c.Padding(1),
            *words("flags"),
            *octets("ip_sec_v2", "ip_sec_v2_ip_v4", "rsc_ip_v4", "rsc_ip_v6"),
            *octets("encapsulated_packet_task_offload", "encapsulation_types"),
            c.Padding(2),
        ),
    ),
    "rss-capabilities": (
        ndis._RSS_CAPABILITIES,
        c.Struct(
            *OBJECT,
            *words("cap_flag", "num_int_msg", "num_recv_que"),
            "num_indirect_tabent" / U16,
        ),
    ),
    "rss-parameters": (
        ndis._RSS_PARAMETERS,
        c.Struct(
            *OBJECT,
            "flag" / U16,
            "base_cpu_number" / U16,
            *words("hashinfo"),
            "indirect_tabsize" / U16,
            c.Padding(2),
            *words("indirect_taboffset"),
            "hashkey_size" / U16,
            c.Padding(2),
            *words("hashkey_offset"),
        ),
    ),
    "link-state": (
        oid_answers._LINK_STATE,
        c.Struct(
            *OBJECT,
            *words("media_connect_state", "media_duplex_state"),
            c.Padding(4),
            "xmit_link_speed" / U64,
            "rcv_link_speed" / U64,
            *words("pause_functions", "auto_negotiation_flags"),
        ),
    ),
}
OTHERS = {
    "transfer-pages": (
        placing._layout(4),
        c.Struct(
            *(name / U16 for name in ("type", "data_offset8", "length8", "flags")),
            "transaction_id" / U64,
            *(name / U16 for name in ("set_id", "sender_owns_set")),
            *words("range_count", "byte_count", "byte_offset", "other_count", "other_offset"),
        ),
    ),
    "virtio-net": (
        frame.VIRTIO_HEADER,
        c.Struct(
            *octets("flags", "gso_type"),
            *(name / U16 for name in ("hdr_len", "gso_size", "csum_start", "csum_offset", "n")),
        ),
    ),
}

TWINS = [
    pytest.param(layout, twin, id=f"{family}-{name}")
    for family, layouts in (
        ("nvsp", NVSP), ("rndis", RNDIS), ("ppi", PPI), ("ndis", NDIS), ("other", OTHERS),
    )
    for name, (layout, twin) in layouts.items()
]  # fmt: skip


@pytest.mark.parametrize(("layout", "twin"), TWINS)
@given(data=st.data())
def test_both_declarations_read_and_write_the_same_bytes(layout, twin, data):
    assert layout.size == twin.sizeof()
    raw = data.draw(st.binary(min_size=layout.size, max_size=layout.size))
    values = layout.unpack(raw)
    parsed = twin.parse(raw)
    names = [sub.name for sub in twin.subcons if sub.name]
    assert len(names) == len(set(names))
    assert values == tuple(parsed[name] for name in names)
    assert layout.pack(*values) == twin.build(dict(zip(names, values, strict=True)))


@pytest.mark.parametrize("module", [nvsp, rndis, ppi, ndis])
def test_no_layout_is_without_its_twin(module):
    declared = {id(value) for value in vars(module).values() if isinstance(value, struct.Struct)}
    assert declared <= {id(each.values[0]) for each in TWINS}


def test_the_named_tuples_have_the_fields_of_their_layouts():
    for fields, (_layout, twin), skipped in (
        (nvsp.ReceiveSection._fields, NVSP["receive-buffer-complete"], 1),
        (nvsp.RndisPacket._fields, NVSP["rndis-packet"], 1),
        (nvsp.NdisConfig._fields, NVSP["ndis-config"], 0),
    ):
        names = [sub.name for sub in twin.subcons if sub.name]
        assert list(fields) == names[skipped:]


def test_objects_are_cut_where_a_revision_ends():
    """linux: NDIS_OFFLOAD_SIZE, _6_0, _6_1; VERSION_4_OFFLOAD_SIZE is no whole revision."""
    twin = NDIS["offload"][1]
    names = [sub.name for sub in twin.subcons]
    for revision, last in ((1, "flags"), (2, "sa_caps"), (3, "encap_maxhdr")):
        head = twin.subcons[: names.index(last) + 1]
        assert sum(each.sizeof() for each in head) == ndis.OFFLOAD_SIZES[revision]
