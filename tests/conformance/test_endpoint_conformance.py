"""Every endpoint keeps the contract."""

import itertools

import pytest

from netvsp.endpoints.specs import open_endpoint
from netvsp.endpoints.wrapper import EndpointWrapper
from netvsp.frames.frame import BROADCAST, Frame
from netvsp.frames.internet import build_arp
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


async def test_the_network_that_is_built_in_keeps_the_contract():
    await check_endpoint(lambda: open_endpoint("nat:[with=built-in]"))


@pytest.mark.root
@pytest.mark.slow
async def test_a_network_by_passt_keeps_the_contract(namespace, no_descriptor_is_leaked):
    setting("ipv6/conf/default/disable_ipv6", 1)
    ip("tuntap add dev out mode tap", "link set out up", "address add 192.0.2.5/24 dev out")
    ip("route add default via 192.0.2.1")

    def provoke(endpoint):
        ask = build_arp(1, MAC, b"\xc0\0\2\5", bytes(6), b"\xc0\0\2\1", target_mac=BROADCAST)
        endpoint.transmit(0, [Frame(ask)])

    await check_endpoint(lambda: open_endpoint("nat:[with=passt]"), provoke=provoke)


async def test_a_capture_keeps_the_contract(tmp_path, no_descriptor_is_leaked):
    numbers = itertools.count()
    await check_endpoint(
        lambda: open_endpoint(f"pcap:[write={tmp_path}/{next(numbers)}]loopback:[as-is]")
    )
    await check_endpoint(lambda: open_endpoint(f"pcap:[read={tmp_path}/0]null:"))


async def test_a_script_keeps_the_contract(tmp_path):
    path = tmp_path / "echo.py"
    path.write_text("def answer(frame):\n    return frame\n")
    await check_endpoint(lambda: open_endpoint(f"script:{path}"))
