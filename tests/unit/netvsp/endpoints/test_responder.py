"""The network that is built in, asked by a guest whose packets are scapy's."""

import socket
import threading
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6ND_RS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from netvsp.endpoints import responder
from netvsp.endpoints.responder import MAX_LOOKUPS, MAX_REPLIES, ResponderEndpoint
from netvsp.frames.frame import Frame
from netvsp.testing import ListeningPort
from tests.support.network_guest import NetworkGuest, options_of, sums_are_right
from tests.support.patience import until, waits


@asynccontextmanager
async def guest_of(room=None):
    endpoint, port = ResponderEndpoint(), ListeningPort(room=room)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await trio.testing.wait_all_tasks_blocked()
        yield NetworkGuest(endpoint, port)
        nursery.cancel_scope.cancel()
    await endpoint.aclose()


async def test_a_guest_gets_an_address_a_router_and_a_resolver():
    async with guest_of() as guest:
        options = await guest.get_address()
    assert guest.address == "10.0.2.15"
    assert options["subnet_mask"] == "255.255.255.0"
    assert options["router"] == options["server_id"] == "10.0.2.2"
    assert options["name_server"] == "10.0.2.3"
    assert options["interface-mtu"] == 1500
    assert options["lease_time"] == 86400


async def test_there_is_no_ipv6():
    """Neither router nor neighbour nor echo, as the documentation says."""
    asked = [
        IPv6(dst="ff02::2") / ICMPv6ND_RS(),
        IPv6(dst="ff02::1:ff00:2") / ICMPv6ND_NS(tgt="fe80::2"),
        IPv6(dst="ff02::1") / ICMPv6EchoRequest(),
    ]
    async with guest_of() as guest:
        for each in asked:
            frame = Frame(bytes(Ether(src=guest.mac, dst="33:33:00:00:00:02") / each))
            assert guest.endpoint.transmit(0, [frame]) == 1
        await trio.testing.wait_all_tasks_blocked()
        assert guest.port.frames == []
        assert guest.endpoint.snapshot()["refused"] == 0


async def test_a_client_that_hears_everybody_only_is_answered_like_that():
    async with guest_of() as guest:
        discover = [("message-type", "discover")]
        heard = await guest._dhcp(discover, flags=0x8000)
        alone = await guest._dhcp(discover)
    assert heard[Ether].dst == "ff:ff:ff:ff:ff:ff"
    assert heard[IP].dst == "255.255.255.255"
    assert alone[Ether].dst == guest.mac
    assert alone[IP].dst == "10.0.2.15"
    assert sums_are_right(heard)
    assert len(heard[UDP].payload) >= 300


async def test_another_address_is_refused_and_another_server_left_alone():
    async with guest_of() as guest:
        refused = await guest._dhcp([("message-type", "request"), ("requested_addr", "10.9.9.9")])
        assert options_of(refused)["message-type"] == 6
        assert refused[BOOTP].yiaddr == "0.0.0.0"
        guest.address = "10.0.2.15"
        informed = await guest._dhcp([("message-type", "inform")], ciaddr="10.0.2.15")
        assert options_of(informed)["message-type"] == 5
        assert "lease_time" not in options_of(informed)
        again = await guest._dhcp([("message-type", "request")], ciaddr="10.0.2.15")
        assert options_of(again)["message-type"] == 5
        other = [("message-type", "request"), ("server_id", "10.9.9.9")]
        with trio.move_on_after(0):
            await guest._dhcp(other, ciaddr="10.0.2.15")
        await trio.testing.wait_all_tasks_blocked()
        assert not guest.port.frames


async def test_the_gateway_and_the_resolver_answer_ping():
    async with guest_of() as guest:
        await guest.get_address()
        for address in ("10.0.2.2", "10.0.2.3"):
            answer = await guest.ping(address, payload=b"how are you" * 30)
            assert (answer[ICMP].type, answer[ICMP].id, answer[ICMP].seq) == (0, 7, 1)
            assert answer[Raw].load == b"how are you" * 30
            assert answer[IP].src == address
            assert sums_are_right(answer)


@pytest.mark.parametrize("what", [ICMP(), TCP(dport=80, flags="S"), UDP(dport=123)])
async def test_whoever_is_not_there_is_said_to_be_out_of_reach(what):
    async with guest_of() as guest:
        await guest.get_address()
        packet = await guest.ip("198.51.100.1", near=False) / what
        answer = await guest.ask(packet, lambda p: ICMP in p)
    assert (answer[ICMP].type, answer[ICMP].code) == (3, 13)
    assert answer[IP].src == "10.0.2.2"
    assert answer[ICMP].payload.dst == "198.51.100.1"


async def test_a_name_is_looked_up_as_the_host_does_it(monkeypatch):
    found = {
        (socket.AF_INET, "host.example"): ["192.0.2.7", "192.0.2.8"],
        (socket.AF_INET6, "host.example"): ["2001:db8::7"],
        (socket.AF_INET, "old.example"): ["192.0.2.9"],
    }

    def getaddrinfo(name, port, family, kind):
        host = name.decode()
        if host == "broken.example":
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        if host == "empty.example":
            raise socket.gaierror(socket.EAI_NODATA, "it has no address")
        if host not in {name for _, name in found}:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        assert family == socket.AF_UNSPEC
        return [
            (which, kind, 6, "", (each, 0))
            for (which, name), addresses in found.items()
            for each in addresses * 2
            if name == host
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with guest_of() as guest:
        await guest.get_address()
        v4 = await guest.look_up("host.example", "A", "10.0.2.3")
        assert [v4.an[i].rdata for i in range(v4.ancount)] == ["192.0.2.7", "192.0.2.8"]
        assert v4.an[0].rrname == b"host.example."
        v6 = await guest.look_up("host.example", "AAAA", "10.0.2.3")
        assert [v6.an[i].rdata for i in range(v6.ancount)] == ["2001:db8::7"]
        # One that is there, and has no address of that kind, is not unknown: musl, systemd-resolved
        # and busybox take that for the answer to both of their questions.
        for name, kind in (("old.example", "AAAA"), ("empty.example", "A")):
            none = await guest.look_up(name, kind, "10.0.2.3")
            assert (none.rcode, none.ancount) == (0, 0)
        codes = {
            name: (await guest.look_up(name, kind, "10.0.2.3")).rcode
            for name, kind in (
                ("nowhere.example", "A"),
                ("broken.example", "A"),
                ("host.example", "MX"),
                ("two words.example", "A"),
            )
        }
    assert codes == {
        "nowhere.example": 3,
        "broken.example": 2,
        "host.example": 4,
        "two words.example": 3,
    }


@pytest.fixture
def slow_resolver(monkeypatch):
    """One that answers nobody before the test ends."""
    end = threading.Event()

    def getaddrinfo(*_):
        end.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    end.set()


async def look_up_without_end(guest):
    """Ask for as many names as are looked up at a time."""
    await guest.get_address()
    await guest.mac_of("10.0.2.3")
    async with trio.open_nursery() as nursery:
        for number in range(MAX_LOOKUPS):
            nursery.start_soon(guest.look_up, f"n{number}.example", "A", "10.0.2.3")
        await until(lambda: guest.endpoint.snapshot()["looking_up"] == MAX_LOOKUPS)
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("slow_resolver")
async def test_names_that_take_long_are_not_looked_up_without_end():
    async with guest_of() as guest:
        await look_up_without_end(guest)
        assert (await guest.look_up("last.example", "A", "10.0.2.3")).rcode == 2
    assert guest.endpoint.snapshot()["looking_up"] == 0


@pytest.mark.usefixtures("slow_resolver")
async def test_names_that_take_long_take_no_thread_of_anybody_else():
    others = trio.to_thread.current_default_thread_limiter()
    async with guest_of() as guest:
        await look_up_without_end(guest)
        assert others.borrowed_tokens == 0
        assert guest.endpoint._threads.borrowed_tokens == MAX_LOOKUPS
    # Nobody can end them; they count as long as they last.
    assert guest.endpoint._threads.borrowed_tokens == MAX_LOOKUPS


async def test_a_guest_that_does_not_read_has_to_wait():
    ask = bytes(Ether(src="02:00:00:00:00:01") / ARP(pdst="10.0.2.2", psrc="10.0.2.15"))
    frames = [Frame(ask)] * (MAX_REPLIES + 50)
    async with guest_of(room=0) as guest:
        assert guest.endpoint.transmit(0, frames) == MAX_REPLIES
        assert await waits(lambda: guest.endpoint.wait_writable(0))
        guest.port.make_room()
        await guest.endpoint.wait_writable(0)
        assert guest.endpoint.transmit(0, frames[:50]) == 50


async def test_what_makes_no_sense_is_counted_and_not_answered():
    async with guest_of() as guest:
        guest.endpoint.transmit(0, [Frame(bytes(12) + b"\x08\x00" + b"\xff" * 60)] * 3)
        guest.endpoint.transmit(0, [Frame(bytes(12) + b"\x86\xdd" + bytes(60))])
        await trio.testing.wait_all_tasks_blocked()
        assert guest.endpoint.snapshot()["refused"] == 3
        assert not guest.port.frames


def test_a_message_for_nobody_is_not_answered():
    packet = Ether(dst="01:00:5e:00:00:fb") / IP(src="10.0.2.15", dst="224.0.0.251") / UDP()
    assert responder.answer_untrusted(bytes(packet)) is None
    reply = Ether() / IP(src="10.0.2.15", dst="10.0.2.2") / ICMP(type=0)
    assert responder.answer_untrusted(bytes(reply)) is None
    other = Ether() / ARP(pdst="10.0.2.99", psrc="10.0.2.15")
    assert responder.answer_untrusted(bytes(other)) is None


def test_a_lease_given_back_needs_no_answer():
    packet = (
        Ether(src="02:00:00:00:00:01")
        / IP(src="10.0.2.15", dst="10.0.2.2")
        / UDP(sport=68, dport=67)
        / BOOTP(chaddr=b"\2\0\0\0\0\1")
        / DHCP(options=[("message-type", "release"), "end"])
    )
    assert responder.answer_untrusted(bytes(packet)) is None
