"""Every endpoint keeps the contract."""

import pytest

from netvsp.endpoints.specs import open_endpoint
from netvsp.endpoints.wrapper import EndpointWrapper
from netvsp.testing import check_endpoint
from netvsp.testing.frames import PEER, Packet
from netvsp.testing.port import MAC
from tests.support.network import ip, namespace as namespace, packet_socket, setting


@pytest.mark.parametrize("spec", ["null:", "loopback:", "loopback:[as-is]"])
async def test_a_simple_endpoint_keeps_the_contract(spec):
    await check_endpoint(lambda: open_endpoint(spec))


async def test_a_wrapper_keeps_the_contract():
    async def make():
        return EndpointWrapper(await open_endpoint("loopback:"))

    await check_endpoint(make)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "[queues=4]"])
@pytest.mark.parametrize("up", [True, False])
async def test_a_tap_keeps_the_contract(namespace, options, up, no_descriptor_is_leaked):
    setting("ipv6/conf/default/disable_ipv6", 1)
    ip("tuntap add dev t0 mode tap" + " multi_queue" * bool(options))
    ip("link set t0 mtu 65521")
    if up:
        ip("link set t0 up")

    def provoke(_endpoint):
        with packet_socket("t0") as sock:
            for number in range(40):
                sock.send(Packet(source_mac=PEER, target_mac=MAC, source_port=number).build())

    await check_endpoint(lambda: open_endpoint(f"tap:{options}t0"), provoke=provoke if up else None)
