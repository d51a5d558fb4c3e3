"""RNDIS control requests: each kind, what a guest sets, and what makes no sense."""

from __future__ import annotations

import struct

import pytest

from netvsp.control import ALIGNMENT, MAX_PACKETS, Control, State
from netvsp.link import AdapterConfig, Link
from netvsp.statistics import AdapterStatistics
from netvsp.wire import ndis, nvsp, oids, rndis
from tests.support.net_guest import MAC
from vmbus.errors import GuestProtocolError

KEY = bytes(range(40))
KINDS = 0x1701


def make(*, version: int = nvsp.VERSION_6_1, up: bool = True, **options) -> Control:
    link = Link(MAC, mtu=9000, speed=10**10)
    control = Control(AdapterConfig(**options), link, AdapterStatistics())
    control.version = version
    control.coalesces = True
    if up:
        reply = control.request_untrusted(rndis.build_initialize(1, 0x4000))
        assert rndis.parse_initialize_reply_untrusted(reply).status == 0
    return control


def query(control: Control, oid: int, buffer: bytes = b"") -> tuple[int, bytes]:
    reply = control.request_untrusted(rndis.build_request(rndis.QUERY, 9, oid, buffer))
    kind, length = rndis.parse_header_untrusted(reply)
    assert (kind, length) == (rndis.QUERY | rndis.COMPLETE, len(reply))
    found = rndis.parse_query_reply_untrusted(reply)
    assert found.request_id == 9
    return found.status, found.buffer


def change(control: Control, oid: int, buffer: bytes) -> int:
    reply = control.request_untrusted(rndis.build_request(rndis.SET, 9, oid, buffer))
    assert rndis.parse_header_untrusted(reply) == (rndis.SET | rndis.COMPLETE, 16)
    number, status = rndis.parse_status_reply_untrusted(reply)
    assert number == 9
    return status


def scale(control: Control, table=(0, 1), *, flags: int = 0, kinds: int = KINDS, key=KEY) -> int:
    return change(
        control,
        oids.GEN_RECEIVE_SCALE_PARAMETERS,
        ndis.build_rss_parameters(flags=flags, hash_information=kinds, table=table, key=key),
    )


def test_initialize_agrees_on_what_drivers_keep_to():
    control = make(up=False)
    reply = control.request_untrusted(rndis.build_initialize(77, 0x4000))
    assert rndis.parse_initialize_reply_untrusted(reply) == (
        77, 0, 1, 0, 1, 0, MAX_PACKETS, 0x4000, ALIGNMENT
    )  # fmt: skip
    assert control.state is State.READY


def test_another_major_version_is_not_agreed_on():
    control = make(up=False)
    message = struct.pack("<6I", 2, 24, 5, 2, 0, 0x4000)
    reply = rndis.parse_initialize_reply_untrusted(control.request_untrusted(message))
    assert (reply.request_id, reply.status) == (5, rndis.STATUS_BAD_VERSION)
    assert control.state is State.DOWN


def test_before_initialize_everything_fails_but_keepalive():
    control = make(up=False)
    assert query(control, oids.GEN_LINK_SPEED) == (rndis.STATUS_FAILURE, b"")
    assert change(control, oids.GEN_CURRENT_PACKET_FILTER, bytes(4)) == rndis.STATUS_FAILURE
    reply = control.request_untrusted(rndis.build_id_message(rndis.KEEPALIVE, 6))
    assert reply == struct.pack("<4I", rndis.KEEPALIVE | rndis.COMPLETE, 16, 6, 0)


def test_halt_has_no_reply_and_forgets_everything():
    calls = []
    control = make()
    control.changed = lambda: calls.append(control.state)
    assert change(control, oids.GEN_CURRENT_PACKET_FILTER, b"\x0d\0\0\0") == 0
    assert scale(control) == 0
    on = ndis.OffloadParameters(rsc_ipv4=2, rsc_ipv6=2)
    assert change(control, oids.TCP_OFFLOAD_PARAMETERS, ndis.build_offload_parameters(on)) == 0
    assert control.filter
    assert control.scaling is not None
    assert control.rsc
    assert control.request_untrusted(rndis.build_id_message(rndis.HALT, 3)) == b""
    assert (control.state, control.filter) == (State.DOWN, 0)
    assert make().scaling is control.scaling
    assert not control.rsc
    assert calls == [State.READY] * 3 + [State.DOWN]
    # Nothing of it is there for the next driver, who may leave unsaid what it has not said.
    control.request_untrusted(rndis.build_initialize(1, 0x4000))
    unchanged = ndis.RSS_TABLE_UNCHANGED | ndis.RSS_KEY_UNCHANGED
    assert scale(control, (), flags=unchanged, key=b"") == 0
    assert control.scaling is not None
    assert (control.scaling.table, control.scaling.key) == ((0,), bytes(40))
    half = ndis.build_offload_parameters(ndis.OffloadParameters(rsc_ipv4=2))
    assert change(control, oids.TCP_OFFLOAD_PARAMETERS, half) == 0
    assert not control.rsc


def test_reset_has_no_id_and_asks_for_the_filter_again():
    control = make()
    assert change(control, oids.GEN_CURRENT_PACKET_FILTER, b"\x0d\0\0\0") == 0
    reply = control.request_untrusted(struct.pack("<III", rndis.RESET, 12, 0))
    assert reply == struct.pack("<4I", rndis.RESET | rndis.COMPLETE, 16, 0, 1)
    assert control.filter == 0
    assert control.state is State.READY


def test_what_is_no_request_is_refused():
    for kind in (rndis.PACKET, rndis.INDICATE_STATUS, rndis.QUERY | rndis.COMPLETE, 0, 99):
        with pytest.raises(GuestProtocolError, match="is not a request"):
            make().request_untrusted(rndis.build_id_message(kind, 1))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        struct.pack("<II", rndis.QUERY, 7),
        struct.pack("<II", rndis.QUERY, 9),
        struct.pack("<II", rndis.QUERY, 8),
        struct.pack("<II", rndis.SET, 8) + bytes(40),
        struct.pack("<II", rndis.KEEPALIVE, 11) + bytes(3),
        struct.pack("<5I", rndis.INITIALIZE, 20, 0, 1, 0),
        struct.pack("<II", rndis.INITIALIZE, 20) + bytes(16),
    ],
)
def test_what_is_too_short_to_be_answered_is_refused(message):
    with pytest.raises(GuestProtocolError):
        make().request_untrusted(message)


@pytest.mark.parametrize("kind", [rndis.QUERY, rndis.SET])
@pytest.mark.parametrize(
    "rest", [(12, 0), (28, 4, 20), (28, 0xFFFFFFFF, 20), (32, 4, 19), (32, 4, 24)]
)
def test_a_request_whose_buffer_is_bad_is_answered(kind, rest):
    """No request is left without its reply: linux waits for ever."""
    length, *where = rest
    message = struct.pack("<IIII", kind, length, 9, oids.GEN_CURRENT_PACKET_FILTER)
    message += struct.pack(f"<{len(where)}I", *where)
    reply = make().request_untrusted(message.ljust(length, b"\0")[:length])
    assert struct.unpack_from("<IIII", reply)[::2] == (kind | rndis.COMPLETE, 9)
    assert struct.unpack_from("<I", reply, 12) == (rndis.STATUS_INVALID_DATA,)


def test_an_oid_that_is_not_known_is_answered():
    control = make()
    assert query(control, 0x12345678) == (rndis.STATUS_NOT_SUPPORTED, b"")
    assert query(control, oids.GEN_RNDIS_CONFIG_PARAMETER)[0] == rndis.STATUS_NOT_SUPPORTED
    assert change(control, 0x12345678, b"") == rndis.STATUS_NOT_SUPPORTED
    assert change(control, oids.E802_3_CURRENT_ADDRESS, MAC) == rndis.STATUS_NOT_SUPPORTED


def test_the_filter_is_what_was_set():
    control = make()
    assert query(control, oids.GEN_CURRENT_PACKET_FILTER) == (0, bytes(4))
    assert change(control, oids.GEN_CURRENT_PACKET_FILTER, b"\x0d\0\0\0junk") == 0
    assert query(control, oids.GEN_CURRENT_PACKET_FILTER) == (0, b"\x0d\0\0\0")
    assert change(control, oids.GEN_CURRENT_PACKET_FILTER, b"\1\0\0") == (
        rndis.STATUS_INVALID_LENGTH
    )
    assert control.filter == 13


def test_what_a_guest_may_tell_us_is_taken():
    for oid in (
        oids.E802_3_MULTICAST_LIST,
        oids.GEN_NETWORK_LAYER_ADDRESSES,
        oids.OFFLOAD_ENCAPSULATION,
        oids.GEN_CURRENT_LOOKAHEAD,
        oids.GEN_PROTOCOL_OPTIONS,
    ):
        assert change(make(), oid, bytes(12)) == 0


@pytest.mark.parametrize(
    ("version", "revision"),
    [
        (nvsp.VERSION_1, 1),
        (nvsp.VERSION_2, 1),
        (nvsp.VERSION_4, 2),
        (nvsp.VERSION_5, 3),
        (nvsp.VERSION_6_1, 3),
    ],
)
def test_capabilities_are_of_the_revision_that_is_asked_for(version, revision):
    """linux: rndis_filter_query_device; a longer answer ends the probe."""
    control = make(version=version)
    asked = oids.TCP_OFFLOAD_HARDWARE_CAPABILITIES
    for buffer in (b"", ndis.build_offload_query(revision), b"\xa7\x09\x00\x01"):
        status, answer = query(control, asked, buffer)
        assert status == 0
        assert ndis.parse_object_untrusted(answer) == (0xA7, revision, len(answer))
        assert len(answer) == ndis.OFFLOAD_SIZES[revision]
    for other in (1, 2, 3):
        assert (
            len(query(control, asked, ndis.build_offload_query(other))[1])
            == (ndis.OFFLOAD_SIZES[other])
        )
    status, current = query(control, oids.TCP_OFFLOAD_CURRENT_CONFIG)
    assert (status, len(current)) == (0, ndis.OFFLOAD_SIZES[revision])
    found = ndis.parse_offload_capabilities_untrusted(current)
    assert found.rsc_ipv4 == found.rsc_ipv6 == (version == nvsp.VERSION_6_1)


def test_capabilities_switch_on_what_linux_knows():
    """linux: rndis_netdev_set_hwcaps looks for all bits of these."""
    found = make().capabilities()
    assert found.tx_ipv4 & 0x14 == 0x14
    assert found.tx_ipv6 & 0x15 == 0x15
    assert found.tx_ipv4 & found.tx_ipv6 & 0x40
    assert found.lso_ipv6
    assert found.lso_max_size == 62780
    assert make(offloads=False).capabilities() == ndis.OffloadCapabilities()


def test_segments_in_parts_need_both_and_version_6_1():
    def after(control: Control, **wanted: int) -> bool:
        parameters = ndis.build_offload_parameters(ndis.OffloadParameters(**wanted))
        assert change(control, oids.TCP_OFFLOAD_PARAMETERS, parameters) == 0
        return control.rsc

    control = make()
    assert not after(control, rsc_ipv4=2)
    assert after(control, rsc_ipv6=2, tcp_ipv4=4)
    assert after(control), "0 is no change"
    assert not after(control, rsc_ipv4=1)
    assert not after(make(version=nvsp.VERSION_6), rsc_ipv4=2, rsc_ipv6=2)
    assert not after(make(offloads=False), rsc_ipv4=2, rsc_ipv6=2)
    control = make()
    assert after(control, rsc_ipv4=2, rsc_ipv6=2)
    control.coalesces = False
    assert not control.rsc, "its driver has to be able to"
    assert not control.capabilities().rsc_ipv4
    assert not control.capabilities().rsc_ipv6
    short = ndis.build_offload_parameters(ndis.OffloadParameters(tcp_ipv4=4), size=22)
    assert change(make(), oids.TCP_OFFLOAD_PARAMETERS, short) == 0
    assert change(make(), oids.TCP_OFFLOAD_PARAMETERS, short[:21]) == rndis.STATUS_INVALID_DATA


def test_scaling_is_set_changed_in_part_and_switched_off():
    control = make(max_queues=4)
    assert scale(control, (0, 1, 2, 3) * 32) == 0
    first = control.scaling
    assert first is not None
    assert (first.key, first.kinds, first.table) == (KEY, KINDS, (0, 1, 2, 3) * 32)
    assert scale(control, (3,), flags=ndis.RSS_KEY_UNCHANGED | ndis.RSS_HASH_INFO_UNCHANGED) == 0
    second = control.scaling
    assert second is not None
    assert (second.key, second.kinds, second.table) == (KEY, KINDS, (3,))
    assert scale(control, flags=ndis.RSS_TABLE_UNCHANGED, key=KEY[::-1]) == 0
    third = control.scaling
    assert third is not None
    assert (third.key, third.table) == (KEY[::-1], (3,))
    assert scale(control, flags=ndis.RSS_DISABLE) == 0
    assert control.scaling is None
    assert scale(control, kinds=0) == 0
    assert control.scaling is None, "no kind of hash"


@pytest.mark.parametrize(
    "bad",
    [
        {"table": (0, 4), "key": KEY[::-1]},
        {"table": (), "key": KEY[::-1]},
        {"table": (1,), "kinds": 0x102, "key": KEY[::-1]},
        {"table": (1,), "kinds": 0x1703},
    ],
)
def test_scaling_that_is_refused_changes_nothing(bad):
    control = make(max_queues=4)
    assert scale(control, (0, 1)) == 0
    before = control.scaling
    assert scale(control, **bad) == rndis.STATUS_INVALID_DATA
    assert control.scaling is before
    unchanged = ndis.RSS_TABLE_UNCHANGED | ndis.RSS_KEY_UNCHANGED | ndis.RSS_HASH_INFO_UNCHANGED
    assert scale(control, (), flags=unchanged) == 0
    assert control.scaling is not None
    assert (control.scaling.key, control.scaling.kinds, control.scaling.table) == (
        KEY, KINDS, (0, 1)
    )  # fmt: skip


def test_scaling_parameters_that_are_none_are_answered():
    assert change(make(), oids.GEN_RECEIVE_SCALE_PARAMETERS, b"\x89\2") == (
        rndis.STATUS_INVALID_DATA
    )


@pytest.mark.parametrize("value", ["00155d0a0b0c", "00-15-5D-0A-0B-0C", "00:15:5d:0a:0b:0c"])
def test_a_guest_that_may_chooses_its_address(value):
    """linux: rndis_filter_set_device_mac."""
    parameter = rndis.build_parameter("NetworkAddress", value)
    control = make()
    assert change(control, oids.GEN_RNDIS_CONFIG_PARAMETER, parameter) == (
        rndis.STATUS_NOT_SUPPORTED
    )
    assert control.link.mac == MAC
    control = make(allow_mac_change=True)
    assert change(control, oids.GEN_RNDIS_CONFIG_PARAMETER, parameter) == 0
    assert control.link.mac == bytes.fromhex("00155d0a0b0c")
    assert control.link.permanent_mac == MAC


@pytest.mark.parametrize("value", ["", "00155d0a0b", "01155d0a0b0c", "000000000000", "no address!"])
def test_an_address_that_is_none_is_refused(value):
    control = make(allow_mac_change=True)
    parameter = rndis.build_parameter("networkADDRESS", value)
    assert change(control, oids.GEN_RNDIS_CONFIG_PARAMETER, parameter) == rndis.STATUS_INVALID_DATA
    assert control.link.mac == MAC


def test_other_parameters_are_taken_and_mean_nothing():
    control = make()
    parameter = rndis.build_parameter("*JumboPacket", "9014")
    assert change(control, oids.GEN_RNDIS_CONFIG_PARAMETER, parameter) == 0
    assert change(control, oids.GEN_RNDIS_CONFIG_PARAMETER, parameter[:30]) == (
        rndis.STATUS_INVALID_DATA
    )


def test_what_is_behind_a_message_is_no_part_of_it():
    control = make()
    message = rndis.build_request(rndis.SET, 9, oids.GEN_CURRENT_PACKET_FILTER) + b"\x0d\0\0\0"
    reply = control.request_untrusted(message)
    assert rndis.parse_status_reply_untrusted(reply) == (9, rndis.STATUS_INVALID_LENGTH)
