"""User-mode networks: passt's, in a namespace whose outside is ours, and which one there is."""

import contextlib
import os
import socket
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Raw

from netvsp.endpoint import EndpointError
from netvsp.endpoints import nat, passt
from netvsp.endpoints.nat import parse_forwards
from netvsp.endpoints.passt import Forward, PasstEndpoint, find_passt, resolvers
from netvsp.endpoints.responder import ResponderEndpoint
from netvsp.endpoints.specs import open_endpoint
from netvsp.frames.frame import Frame, Offload
from netvsp.frames.offload import complete
from netvsp.testing import ListeningPort
from netvsp.testing.frames import GuestFrame, Packet
from tests.support.leaks import count_fds
from tests.support.network import ip, setting
from tests.support.network_guest import NetworkGuest, sums_are_right
from tests.support.patience import until
from vmbus.errors import ConfigError
from vmbus.plugins.remarks import remarks

OURS, ROUTER, RESOLVER = "10.0.2.15", "10.0.2.2", "10.0.2.3"


class Wire(ListeningPort):
    """What one end brings is sent from the other."""

    def __init__(self, other):
        super().__init__()
        self._other = other

    def receive(self, frames):
        # As an adapter does, for an endpoint without offloads.
        for frame in frames:
            self._other.transmit(0, complete(frame))
        return len(frames)

    async def wait_room(self):
        await self._other.wait_writable(0)


async def run(endpoint, other):
    with contextlib.suppress(EndpointError):  # it is closed
        await endpoint.run(Wire(other))


@pytest.fixture
async def outside(namespace, monkeypatch, tmp_path, nursery):
    """A host with one interface; what is behind it is the network that is built in."""
    setting("ipv6/conf/default/disable_ipv6", 1)
    interface = await open_endpoint("tap:out")
    network = ResponderEndpoint()
    nursery.start_soon(run, interface, network)
    nursery.start_soon(run, network, interface)
    ip(f"address add {OURS}/24 dev out", f"route add default via {ROUTER}")
    setting("ipv4/ping_group_range", "0 2147483647")
    (tmp_path / "resolv.conf").write_text(f"nameserver 127.0.0.53\nnameserver {RESOLVER}\n")
    monkeypatch.setattr(passt, "_RESOLVERS", (str(tmp_path / "resolv.conf"),))
    yield
    await interface.aclose()
    await network.aclose()


@asynccontextmanager
async def guest_of(spec):
    endpoint, port = await open_endpoint(spec), ListeningPort()
    assert isinstance(endpoint, PasstEndpoint)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await trio.testing.wait_all_tasks_blocked()
        yield NetworkGuest(endpoint, port)
        nursery.cancel_scope.cancel()
    await endpoint.aclose()


@pytest.mark.root
async def test_a_guest_of_passt_has_an_address_a_router_and_ping(outside):
    async with guest_of("nat:[with=passt]") as guest:
        options = await guest.get_address()
        assert guest.address == OURS
        assert options["router"] == ROUTER
        assert options["name_server"] == RESOLVER
        answer = await guest.ping(ROUTER)
        assert (answer[ICMP].type, answer[IP].src) == (0, ROUTER)
        assert answer[Raw].load == b"ping"
        assert sums_are_right(answer)


@pytest.mark.root
async def test_a_guest_of_passt_looks_names_up(outside, monkeypatch):
    def getaddrinfo(host, port, family, kind):
        assert host == b"host.example"
        assert family == socket.AF_UNSPEC
        return [(socket.AF_INET, kind, 6, "", ("192.0.2.77", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with guest_of("nat:") as guest:
        await guest.get_address()
        answer = await guest.look_up("host.example", "A", RESOLVER)
    assert answer.an[0].rdata == "192.0.2.77"


@pytest.mark.root
async def test_a_forwarded_port_leads_to_the_guest(outside):
    async with guest_of("nat:[tcp=8081,udp=5353:53]") as guest:
        await guest.get_address()
        await guest.ping(ROUTER)  # now it is known
        with trio.socket.socket() as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.connect, ("127.0.0.1", 8081))
                packet = await guest.wait(lambda p: TCP in p and p[TCP].flags == "S")
                assert packet[TCP].dport == 8081
                nursery.cancel_scope.cancel()
        with socket.socket(type=socket.SOCK_DGRAM) as sender:
            sender.sendto(b"hello", ("127.0.0.1", 5353))
            packet = await guest.wait(lambda p: UDP in p and Raw in p and p[Raw].load == b"hello")
            assert packet[UDP].dport == 53


@pytest.mark.root
async def test_a_segment_of_a_connection_passes_whole_and_without_its_sum(outside):
    """The guest of an adapter leaves sums and cutting to us, and passt takes both."""
    payload = os.urandom(30_000)
    async with guest_of("nat:[tcp=8080:80]") as guest:
        await guest.get_address()
        await guest.mac_of(ROUTER)
        async with trio.open_nursery() as nursery:
            with trio.socket.socket() as client:
                nursery.start_soon(client.connect, ("127.0.0.1", 8080))
                syn = await guest.wait(lambda p: TCP in p and p[TCP].flags == "S")
                ports: Any = {"sport": 80, "dport": syn[TCP].sport, "window": 65535}
                ack = {"ack": syn[TCP].seq + 1, **ports}
                head = await guest.ip(syn[IP].src)
                guest.send(head / TCP(flags="SA", seq=100, **ack))
                data = bytes(head / TCP(flags="PA", seq=101, **ack) / Raw(payload))
                made = GuestFrame(data[:50] + b"\0\0" + data[52:], Offload(1, 1, 54, 1400, 34, 16))
                assert guest.endpoint.transmit(0, [made.frame]) == 1
                made.spoil()
                received = b""
                while len(received) < len(payload):
                    received += await client.recv(1 << 16)
    assert received == payload


@pytest.mark.root
async def test_every_life_has_a_passt_of_its_own_and_none_is_left(outside):
    before = count_fds(collect=True)
    endpoint = await open_endpoint("nat:")
    pids = []
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, port := ListeningPort())
            await trio.testing.wait_all_tasks_blocked()
            await until(lambda: endpoint.snapshot()["pid"])
            pids.append(endpoint.snapshot()["pid"])
            await NetworkGuest(endpoint, port).get_address()
            nursery.cancel_scope.cancel()
    assert pids[0] != pids[1]
    await endpoint.aclose()
    assert count_fds() == before
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("frame", "length"),
    [
        (b"\x08\0E\0\0\x20".rjust(18, b"m").ljust(60, b"\0"), 46),
        (b"\x86\xdd\x60\0\0\0\0\x02".rjust(20, b"m").ljust(60, b"\0"), 56),
        (b"\x08\0E\0\0\x20".rjust(18, b"m").ljust(61, b"\0"), 61),
        (b"\x08\0E\0\xff\xff".rjust(18, b"m").ljust(60, b"\0"), 60),
        (b"\x08\x06".rjust(14, b"m").ljust(60, b"\0"), 60),
    ],
)
def test_what_fills_a_short_frame_up_is_cut_off(frame, length):
    assert passt._unpadded(Frame(frame)).head == frame[:length]


@pytest.mark.root
async def test_a_passt_that_dies_is_the_end(outside):
    endpoint = await open_endpoint("nat:")
    with pytest.RaisesGroup(pytest.RaisesExc(EndpointError, match="passt is gone: ")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, ListeningPort())
            await trio.testing.wait_all_tasks_blocked()
            os.kill(endpoint.snapshot()["pid"], 9)
    assert endpoint.transmit(0, [Frame(Packet().build())]) == 1
    await endpoint.wait_writable(0)
    await endpoint.aclose()


@pytest.mark.root
async def test_a_port_that_is_taken_is_an_error_that_says_so(outside):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 8080))
        other.listen()
        with pytest.raises(ConfigError, match=r"nat:\[tcp=8080:80\]: passt has ended: .*8080"):
            await open_endpoint("nat:[tcp=8080:80]")


@pytest.mark.root
async def test_without_a_network_it_is_the_small_one_and_a_warning(
    namespace, no_descriptor_is_leaked
):
    with remarks() as said:
        endpoint = await open_endpoint("nat:")
    assert isinstance(endpoint, ResponderEndpoint)
    (text,) = said
    assert text.startswith("nat:: passt has ended: ")
    assert text.endswith("reaches nobody")
    await endpoint.aclose()
    with pytest.raises(ConfigError, match="passt has ended"):
        await open_endpoint("nat:[with=passt]")


async def test_without_passt_it_is_the_small_one_and_a_warning(monkeypatch):
    monkeypatch.setattr(nat, "find_passt", lambda: None)
    with remarks() as said:
        endpoint = await open_endpoint("nat:")
    assert isinstance(endpoint, ResponderEndpoint)
    assert said == [f"nat:: the program passt is not installed; {nat.LIMITS}"]
    await endpoint.aclose()


async def test_who_asks_for_the_small_one_is_not_warned():
    with remarks() as said:
        endpoint = await open_endpoint("nat:[with=built-in]")
    assert isinstance(endpoint, ResponderEndpoint)
    assert not said
    await endpoint.aclose()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("nat:[with=built-in,tcp=80]", "ports are forwarded by passt only"),
        ("nat:[tcp=80]", "the program passt is not installed"),
        ("nat:[with=passt]", "the program passt is not installed"),
        ("nat:[with=slirp]", "can be passt or built-in|did you mean|is one of|passt"),
        ("nat:[tcp=0]", "there is no port 0"),
        ("nat:[tcp=80:65536]", "there is no port 65536"),
        ("nat:[tcp=http]", "'http' is not a whole number"),
        ("nat:[tcp=here/80]", "'here' is not an IP address"),
        ("nat:[sctp=80]", "unknown option 'sctp'"),
        ("nat:eth0", "has nothing behind it"),
    ],
)
async def test_what_cannot_be_had_is_said_with_a_reason(monkeypatch, spec, text):
    monkeypatch.setattr(nat, "find_passt", lambda: None)
    with pytest.raises(ConfigError, match=text):
        await open_endpoint(spec)


def test_forwards_are_from_this_host_unless_they_say_something_else():
    assert parse_forwards(None) == []
    assert parse_forwards("8080:80+0.0.0.0/2222:22+::1/53") == [
        Forward("127.0.0.1", 8080, 80),
        Forward("0.0.0.0", 2222, 22),
        Forward("::1", 53, 53),
    ]
    assert str(Forward("127.0.0.1", 8080, 80)) == "127.0.0.1/8080:80"


def test_resolvers_of_this_host_only_are_passed_by(monkeypatch, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    monkeypatch.setattr(passt, "_RESOLVERS", (str(one), str(other)))
    assert resolvers() == []
    one.write_text("# nameserver 1.2.3.4\nnameserver 127.0.0.53\noptions edns0\n")
    other.write_text("search example\nnameserver 192.0.2.1\nnameserver fe80::1%e\nnameserver x\n")
    assert resolvers() == ["192.0.2.1", "fe80::1"]
    one.write_text("nameserver 192.0.2.9\n")
    assert resolvers() == ["192.0.2.9"]


def test_the_program_is_there():
    """The tests need it: .ci/tools installs it."""
    assert find_passt()
