"""What drivers switch on, of what a device can do."""

from __future__ import annotations

import pytest

from netvsp.guest.habits import FREEBSD, LINUX, OPENBSD
from netvsp.guest.offloads import build_parameters, build_scaling, choose, query_revision
from netvsp.wire import ndis, nvsp
from tests.support.fake_nic_host import EVERYTHING

NOTHING = ndis.OffloadCapabilities()


@pytest.mark.parametrize(
    ("habits", "version", "revision"),
    [
        (LINUX, nvsp.VERSION_1, 1),
        (LINUX, nvsp.VERSION_2, 1),
        (LINUX, nvsp.VERSION_4, 2),
        (LINUX, nvsp.VERSION_5, 3),
        (FREEBSD, nvsp.VERSION_1, 2),
        (FREEBSD, nvsp.VERSION_6_1, 3),
    ],
)
def test_the_revision_goes_with_the_version(habits, version, revision):
    assert query_revision(habits, version) == revision


def test_linux_never_leaves_the_sum_of_an_ip_header():
    chosen = choose(LINUX, EVERYTHING, nvsp.VERSION_6_1)
    assert chosen == ndis.OffloadParameters(
        ipv4=1, tcp_ipv4=4, udp_ipv4=4, tcp_ipv6=4, udp_ipv6=4,
        lso_v2_ipv4=2, lso_v2_ipv6=2, rsc_ipv4=2, rsc_ipv6=2,
    )  # fmt: skip
    assert choose(LINUX, NOTHING, nvsp.VERSION_6_1) == ndis.OffloadParameters(ipv4=1)
    old = choose(LINUX, EVERYTHING, nvsp.VERSION_4)
    assert (old.udp_ipv4, old.udp_ipv6, old.tcp_ipv4) == (0, 0, 4)


def test_linux_takes_all_of_tcp_or_nothing():
    some = ndis.OffloadCapabilities(
        tx_ipv4=ndis.CSUM_TCP | ndis.CSUM_UDP, lso_max_size=65535, rsc_ipv4=True
    )
    assert choose(LINUX, some, nvsp.VERSION_6_1) == ndis.OffloadParameters(ipv4=1)


def test_freebsd_takes_each_in_the_direction_in_which_it_is():
    chosen = choose(FREEBSD, EVERYTHING, nvsp.VERSION_6_1)
    assert (chosen.ipv4, chosen.tcp_ipv4, chosen.udp_ipv6) == (4, 4, 4)
    assert (chosen.lso_v2_ipv4, chosen.lso_v2_ipv6) == (2, 0)
    some = ndis.OffloadCapabilities(tx_ipv4=ndis.CSUM_UDP, rx_ipv6=ndis.CSUM_TCP)
    assert choose(FREEBSD, some, nvsp.VERSION_5) == ndis.OffloadParameters(udp_ipv4=2, tcp_ipv6=3)


def test_openbsd_wants_everything_without_asking():
    both = ndis.OffloadParameters(ipv4=4, tcp_ipv4=4, tcp_ipv6=4)
    assert choose(OPENBSD, NOTHING, nvsp.VERSION_4) == both
    assert choose(OPENBSD, NOTHING, nvsp.VERSION_5).udp_ipv6 == 4


@pytest.mark.parametrize(
    ("habits", "version", "revision", "size"),
    [
        (LINUX, nvsp.VERSION_4, 3, 22),
        (FREEBSD, nvsp.VERSION_4, 2, 22),
        (LINUX, nvsp.VERSION_5, 3, 28),
        (OPENBSD, nvsp.VERSION_5, 3, 28),
    ],
)
def test_parameters_have_the_length_that_the_driver_sends(habits, version, revision, size):
    chosen = choose(habits, EVERYTHING, version)
    data = build_parameters(habits, chosen, version)
    assert len(data) == size
    assert ndis.parse_object_untrusted(data) == (ndis.OBJECT_DEFAULT, revision, size)
    assert ndis.parse_offload_parameters_untrusted(data).tcp_ipv4 == 4


def test_scaling_parameters_are_in_the_order_of_the_driver():
    found = ndis.RssCapabilities(ndis.RSS_TOEPLITZ | ndis.RSS_TCP_IPV4, 1, 4, 128)
    table = tuple(range(4)) * 32
    ours = build_scaling(LINUX, found, table)
    theirs = build_scaling(FREEBSD, found, table)
    assert len(ours) == len(theirs) == 40 + 512 + 40
    assert ndis.parse_object_untrusted(ours)[2] == 40
    assert ndis.parse_object_untrusted(theirs)[2] == len(theirs)
    first, second = map(ndis.parse_rss_parameters_untrusted, (ours, theirs))
    assert first.table == second.table == table
    assert first.key == second.key
    assert theirs[40:80] == ours[-40:] == first.key
    assert first.hash_information == 0x1701
    assert second.hash_information == 0x301
    off = build_scaling(LINUX, found, table, flags=ndis.RSS_DISABLE)
    assert ndis.parse_rss_parameters_untrusted(off).flags == ndis.RSS_DISABLE
