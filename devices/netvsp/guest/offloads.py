"""Which offloads a driver switches on, and how it spreads what it receives.

Sources: linux/drivers/net/hyperv/rndis_filter.c (``rndis_netdev_set_hwcaps``,
``rndis_set_rss_param_msg``), freebsd/sys/dev/hyperv/netvsc/hn_rndis.c (``hn_rndis_conf_offload``,
``hn_rndis_conf_rss``), openbsd/sys/dev/pv/if_hvn.c (``hvn_set_capabilities``).
"""

from __future__ import annotations

from netvsp.guest.habits import NetworkHabits, Offloads
from netvsp.wire import ndis, nvsp

_TCP4 = ndis.CSUM_TCP | ndis.CSUM_TCP_OPTIONS
_TCP6 = ndis.CSUM_TCP | ndis.CSUM_TCP_OPTIONS | ndis.LSO_IP6_EXTENSIONS
_OLD_SIZE = 22
"""Bytes of the parameters before NDIS 6.30."""
_NEW_SIZE = 28
HASH_KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)
"""The example of Microsoft's description of receive-side scaling, which is what drivers use."""
_LINUX_HASH = (
    ndis.HASH_TOEPLITZ | ndis.HASH_IPV4 | ndis.HASH_TCP_IPV4 | ndis.HASH_IPV6 | ndis.HASH_TCP_IPV6
)


def query_revision(habits: NetworkHabits, version: int) -> int:
    """Return the revision of offload capabilities that a driver asks for. Cannot block."""
    if version >= nvsp.VERSION_5:
        return 3
    if habits.offloads is Offloads.LINUX and version < nvsp.VERSION_4:
        return 1
    return 2


def choose(
    habits: NetworkHabits, found: ndis.OffloadCapabilities, version: int
) -> ndis.OffloadParameters:
    """Return what a driver switches on, of what there is. Cannot block."""
    if habits.offloads is Offloads.LINUX:
        return _linux(found, version)
    if habits.offloads is Offloads.EACH:
        return _each(found)
    udp = ndis.CSUM_BOTH if version >= nvsp.VERSION_5 else ndis.NO_CHANGE
    both = ndis.CSUM_BOTH
    return ndis.OffloadParameters(
        ipv4=both, tcp_ipv4=both, tcp_ipv6=both, udp_ipv4=udp, udp_ipv6=udp
    )


def _linux(found: ndis.OffloadCapabilities, version: int) -> ndis.OffloadParameters:
    tcp4 = found.tx_ipv4 & _TCP4 == _TCP4
    tcp6 = found.tx_ipv6 & _TCP6 == _TCP6
    udp = version >= nvsp.VERSION_5
    coalesce = found.rsc_ipv4 and found.rsc_ipv6
    return ndis.OffloadParameters(
        ipv4=ndis.CSUM_DISABLED,  # always done in the kernel
        tcp_ipv4=ndis.CSUM_BOTH * tcp4,
        udp_ipv4=ndis.CSUM_BOTH * bool(udp and tcp4 and found.tx_ipv4 & ndis.CSUM_UDP),
        tcp_ipv6=ndis.CSUM_BOTH * tcp6,
        udp_ipv6=ndis.CSUM_BOTH * bool(udp and tcp6 and found.tx_ipv6 & ndis.CSUM_UDP),
        lso_v2_ipv4=ndis.OFFLOAD_ENABLED * bool(tcp4 and found.lso_max_size),
        lso_v2_ipv6=ndis.OFFLOAD_ENABLED * (tcp6 and found.lso_ipv6),
        rsc_ipv4=ndis.OFFLOAD_ENABLED * coalesce,
        rsc_ipv6=ndis.OFFLOAD_ENABLED * coalesce,
    )


def _each(found: ndis.OffloadCapabilities) -> ndis.OffloadParameters:
    def way(tx: int, rx: int, bits: int, rx_bits: int) -> int:
        sends, receives = tx & bits == bits, bool(rx & rx_bits)
        if sends and receives:
            return ndis.CSUM_BOTH
        return ndis.CSUM_TX if sends else ndis.CSUM_RX if receives else ndis.NO_CHANGE

    tx4, rx4, tx6, rx6 = found.tx_ipv4, found.rx_ipv4, found.tx_ipv6, found.rx_ipv6
    return ndis.OffloadParameters(
        ipv4=way(tx4, rx4, ndis.CSUM_IP | ndis.CSUM_IP_OPTIONS, ndis.CSUM_IP),
        tcp_ipv4=way(tx4, rx4, _TCP4, ndis.CSUM_TCP),
        udp_ipv4=way(tx4, rx4, ndis.CSUM_UDP, ndis.CSUM_UDP),
        tcp_ipv6=way(tx6, rx6, _TCP6, ndis.CSUM_TCP),
        udp_ipv6=way(tx6, rx6, ndis.CSUM_UDP | ndis.LSO_IP6_EXTENSIONS, ndis.CSUM_UDP),
        lso_v2_ipv4=ndis.OFFLOAD_ENABLED * bool(found.lso_max_size),
        rsc_ipv4=ndis.OFFLOAD_ENABLED * found.rsc_ipv4,
        rsc_ipv6=ndis.OFFLOAD_ENABLED * found.rsc_ipv6,
    )


def build_parameters(habits: NetworkHabits, chosen: ndis.OffloadParameters, version: int) -> bytes:
    """Return TCP_OFFLOAD_PARAMETERS as a driver writes it. Cannot block."""
    old = version < nvsp.VERSION_5
    revision = 2 if old and habits.offloads is not Offloads.LINUX else 3
    return ndis.build_offload_parameters(
        chosen, revision=revision, size=_OLD_SIZE if old else _NEW_SIZE
    )


def build_scaling(
    habits: NetworkHabits, found: ndis.RssCapabilities, table: tuple[int, ...], *, flags: int = 0
) -> bytes:
    """Return GEN_RECEIVE_SCALE_PARAMETERS as a driver writes it. Cannot block."""
    information = _LINUX_HASH
    if habits.offloads is not Offloads.LINUX:
        information = ndis.HASH_TOEPLITZ
        if found.flags & ndis.RSS_TCP_IPV4:
            information |= ndis.HASH_IPV4 | ndis.HASH_TCP_IPV4
        if found.flags & ndis.RSS_TCP_IPV6:
            information |= ndis.HASH_IPV6 | ndis.HASH_TCP_IPV6
    return ndis.build_rss_parameters(
        flags=flags,
        hash_information=information,
        table=table,
        key=HASH_KEY,
        key_first=habits.key_first,
    )
