"""Arbitrary bytes for everything that parses vstor packets."""

from __future__ import annotations

import contextlib

from hypothesis import given, strategies as st

from storvsp import wire
from vmbus.errors import GuestProtocolError


@given(data=st.binary(max_size=100), start=st.integers(0, 40), end=st.none() | st.integers(0, 100))
def test_only_the_protocol_error_escapes_from_packets(data, start, end):
    for parse in (
        wire.parse_packet_untrusted,
        wire.parse_srb_untrusted,
        wire.parse_srb_reply_untrusted,
    ):
        with contextlib.suppress(GuestProtocolError):
            parse(data, start, end)


@given(body=st.binary(max_size=60))
def test_only_the_protocol_error_escapes_from_bodies(body):
    for parse in (
        wire.parse_properties_untrusted,
        wire.parse_protocol_version_untrusted,
        wire.parse_sub_channels_untrusted,
        wire.parse_fibre_channel_untrusted,
    ):
        with contextlib.suppress(GuestProtocolError):
            parse(body)


@given(data=st.binary(min_size=48, max_size=64))
def test_short_packets_read_as_if_zero_filled(data):
    assert wire.parse_packet_untrusted(data) == wire.parse_packet_untrusted(data.ljust(64, b"\0"))


@given(
    cdb=st.binary(min_size=1, max_size=16),
    data_in=st.integers(0, 2),
    length=st.integers(0, 2**32 - 1),
    address=st.tuples(*[st.integers(0, 255)] * 3),
    size=st.sampled_from([48, 64]),
)
def test_what_a_driver_builds_the_controller_reads(cdb, data_in, length, address, size):
    path, target, lun = address
    packet = wire.build_srb(
        cdb,
        data_in=data_in,
        transfer_length=length,
        path=path,
        target=target,
        lun=lun,
        size=size,
    )
    srb = wire.parse_srb_untrusted(packet)
    assert srb.cdb[: srb.cdb_length] == cdb
    assert (srb.path, srb.target, srb.lun) == address
    assert (srb.data_in, srb.transfer_length, srb.length) == (data_in, length, size - 12)
