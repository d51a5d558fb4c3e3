"""TAP interfaces, real ones, in a namespace of the test's own."""

import errno
import fcntl
import os
import select
import socket
import struct
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from netvsp.endpoint import EndpointError
from netvsp.endpoints import tap as tap_module, tun
from netvsp.endpoints.specs import open_endpoint
from netvsp.frames.frame import (
    GSO_TCPV4,
    GSO_UDP,
    MAX_FRAME,
    NEEDS_CHECKSUM,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    Frame,
    Offload,
)
from netvsp.frames.offload import pack_virtio
from netvsp.testing import ListeningPort
from netvsp.testing.frames import GuestFrame, Packet, sum_is_right
from tests.support.network import ip, packet_socket, setting
from tests.support.patience import until, waits
from tests.support.turns import counting
from vmbus.errors import ConfigError
from vmbus.plugins.remarks import remarks

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("namespace")]

QUIET = ("ipv6/conf/default/disable_ipv6", 1)
SOL_PACKET, PACKET_VNET_HDR = 263, 15
HOST = bytes.fromhex("02000000aa01")


@asynccontextmanager
async def running(spec, port=None):
    """An endpoint that runs, and its port; nothing of the kernel's own comes in."""
    setting(*QUIET)
    endpoint, port = await open_endpoint(spec), port or ListeningPort()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await until(lambda: port.up is not None)
        await trio.testing.wait_all_tasks_blocked()
        yield endpoint, port
        nursery.cancel_scope.cancel()
    await endpoint.aclose()


async def arrived(port, count):
    await until(lambda: len(port.frames) >= count)
    assert len(port.frames) == count
    return port.frames


async def received(sock, count):
    """Return that many frames of a packet socket, those of others left out."""
    found: list[bytes] = []
    sock.setblocking(False)
    while len(found) < count:
        await trio.lowlevel.wait_readable(sock)
        data, where = sock.recvfrom(1 << 17)
        if where[2] != socket.PACKET_OUTGOING:
            found.append(data)
    return found


async def test_frames_go_both_ways():
    async with running("tap:t0") as (endpoint, port):
        with packet_socket("t0") as sock:
            sent = [Packet(payload=bytes([n]) * 40 * n).build() for n in range(1, 30)]
            assert endpoint.transmit(0, [Frame(each) for each in sent]) == len(sent)
            assert await received(sock, len(sent)) == sent
            for each in sent:
                sock.send(each)
            assert [frame.tobytes() for frame in await arrived(port, len(sent))] == sent
            assert {frame.offload for frame in port.frames} == {None}


async def test_a_frame_is_one_write_out_of_the_guests_memory(monkeypatch):
    written = []

    def writev(fd, pieces):
        written.append(pieces)
        return os_writev(fd, pieces)

    os_writev = os.writev
    async with running("tap:t0") as (endpoint, _port):
        with packet_socket("t0") as sock:
            monkeypatch.setattr(os, "writev", writev)
            made = GuestFrame(Packet(payload=bytes(range(256)) * 5).build())
            assert endpoint.transmit(0, [made.frame]) == 1
            made.spoil()
            assert await received(sock, 1) == [made.data]
    ((header, head, *rest),) = written
    assert len(header) == 12
    assert head is made.frame.head
    assert all(one is other for one, other in zip(rest, made.frame.rest, strict=True))


async def test_a_frame_in_more_pieces_than_a_write_takes_is_joined():
    async with running("tap:t0") as (endpoint, _port):
        with packet_socket("t0") as sock:
            data = Packet(payload=bytes(1400)).build()
            made = GuestFrame(data, None, [1] * (len(data) - 256))
            assert endpoint.transmit(0, [made.frame]) == 1
            assert await received(sock, 1) == [data]


@pytest.mark.parametrize("address", ["192.0.2.2/24", "2001:db8::2/64"])
async def test_a_sum_that_is_left_to_do_is_good_enough_for_the_host(address):
    own = address.partition("/")[0]
    async with running("tap:t0") as (endpoint, _port):
        setting("ipv6/conf/t0/disable_ipv6", 0)
        ip(f"link set t0 address {HOST.hex(':')}", f"address add {address} dev t0 nodad")
        family = socket.AF_INET6 if ":" in own else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.bind((own, 5000))
            packet = Packet(
                target_mac=HOST,
                source=own[:-1] + "1",
                target=own,
                target_port=5000,
                payload=b"some text" * 100,
            )
            data, offload = packet.build_partial()
            assert not sum_is_right(data)

            def came() -> bool:
                # Whenever the host has got round to its address.
                assert endpoint.transmit(0, [GuestFrame(data, offload).frame]) == 1
                return bool(select.select([sock], [], [], 0)[0])

            await until(came)
            assert sock.recv(1 << 16) == packet.payload


@pytest.fixture
async def routed():
    """An endpoint, and the descriptor of a TAP without offloads to which the host forwards."""
    setting(*QUIET)
    setting("ipv4/ip_forward", 1)
    setting("ipv6/conf/all/forwarding", 1)
    endpoint = await open_endpoint("tap:t0")
    far = os.open(tun.DEVICE, os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", b"t1", 0x1002)  # IFF_TAP | IFF_NO_PI
    fcntl.ioctl(far, 0x400454CA, request)  # TUNSETIFF
    ip("link set t1 up", f"link set t0 address {HOST.hex(':')}")
    for name, v4, v6 in (
        ("t0", "192.0.2.2", "2001:db8::2"),
        ("t1", "198.51.100.1", "2001:db8:1::1"),
    ):
        setting(f"ipv6/conf/{name}/disable_ipv6", 0)
        ip(f"address add {v4}/24 dev {name}", f"address add {v6}/64 dev {name} nodad")
    for far_address in ("198.51.100.9", "2001:db8:1::9"):
        ip(f"neigh add {far_address} dev t1 lladdr 02:00:00:00:bb:01")
    yield endpoint, far
    await endpoint.aclose()
    os.close(far)


async def forwarded(far, protocol, size):
    """Return the frames of a protocol that come out of a TAP until they have so many bytes."""
    found: list[bytes] = []
    while len(b"".join(payload_of(each, protocol) for each in found)) < size:
        await trio.lowlevel.wait_readable(far)
        data = os.read(far, 1 << 17)
        if data[23 if data[12] == 8 else 20] == protocol:
            found.append(data)
    return found


def payload_of(frame, protocol):
    network = 20 if frame[12:14] == b"\x08\0" else 40
    return frame[14 + network + (20 if protocol == PROTOCOL_TCP else 8) :]


@pytest.mark.parametrize("protocol", [PROTOCOL_TCP, PROTOCOL_UDP])
@pytest.mark.parametrize("version", [4, 6])
async def test_a_segment_that_is_forwarded_arrives_in_pieces_with_right_sums(
    routed, protocol, version
):
    endpoint, far = routed
    if version == 4:
        source, target = "192.0.2.15", "198.51.100.9"
    else:
        source, target = "2001:db8::15", "2001:db8:1::9"
    payload = os.urandom(60_000)
    packet = Packet(
        target_mac=HOST, source=source, target=target, protocol=protocol, payload=payload
    )
    made = GuestFrame(*packet.build_partial(1400))
    assert endpoint.info.offloads.tcp_segments
    assert endpoint.info.offloads.udp_segments
    assert endpoint.transmit(0, [made.frame]) == 1
    made.spoil()
    pieces = await forwarded(far, protocol, len(payload))
    assert len(pieces) == -(-len(payload) // 1400)
    assert all(sum_is_right(piece) for piece in pieces)
    assert b"".join(payload_of(piece, protocol) for piece in pieces) == payload


async def test_a_sum_that_is_left_to_do_is_done_when_it_is_forwarded(routed):
    endpoint, far = routed
    packet = Packet(target_mac=HOST, target="198.51.100.9", payload=b"x" * 1000)
    assert endpoint.transmit(0, [GuestFrame(*packet.build_partial()).frame]) == 1
    (frame,) = await forwarded(far, PROTOCOL_UDP, 1000)
    assert sum_is_right(frame)


async def test_a_segment_of_the_hosts_comes_in_whole():
    async with running("tap:t0") as (_endpoint, port):
        with packet_socket("t0") as sock:
            sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            for protocol in (PROTOCOL_TCP, PROTOCOL_UDP):
                packet = Packet(protocol=protocol, payload=os.urandom(50_000))
                data, offload = packet.build_partial(1000)
                sock.send(pack_virtio(offload)[:10] + data)
            first, second = await arrived(port, 2)
    assert first.offload.gso_type == GSO_TCPV4
    assert second.offload.gso_type == GSO_UDP
    for frame in (first, second):
        assert frame.offload.flags & NEEDS_CHECKSUM
        assert frame.offload.gso_size == 1000
        assert len(frame) > 50_000
    assert second.tobytes() == data


async def test_a_sum_that_the_host_leaves_to_us_is_said():
    async with running("tap:t0") as (_endpoint, port):
        ip(
            "address add 192.0.2.2/24 dev t0",
            "neigh add 192.0.2.15 dev t0 lladdr 00:15:5d:01:02:03",
        )
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"hello", ("192.0.2.15", 7))
            (frame,) = await arrived(port, 1)
    assert frame.offload == Offload(NEEDS_CHECKSUM, 0, 0, 0, 34, 6)
    assert frame.tobytes().endswith(b"hello")


async def test_more_large_segments_than_there_are_buffers_come_in_unharmed():
    async with running("tap:t0") as (_endpoint, port):
        with packet_socket("t0") as sock:
            sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            sent = []
            for _ in range(2 * tap_module.LARGE + 3):
                data, offload = Packet(payload=os.urandom(60_000)).build_partial(1000)
                sock.send(pack_virtio(offload)[:10] + data)
                sent.append(data)
            frames = await arrived(port, len(sent))
    assert [frame.tobytes() for frame in frames] == sent


async def test_all_queues_carry_frames_both_ways():
    async with running("tap:[queues=4]t0") as (endpoint, port):
        assert endpoint.info.queues == 4
        with packet_socket("t0") as sock:
            for queue in range(4):
                flow = Packet(source_port=5000 + queue, payload=bytes([queue]) * 20).build()
                assert endpoint.transmit(queue, [Frame(flow)]) == 1
                assert await received(sock, 1) == [flow]
            # The kernel spreads what it does not know over all of them.
            for number in range(200):
                sock.send(Packet(target_port=number, source_port=number).build())
            await arrived(port, 200)


async def test_a_turn_is_bounded():
    async with running("tap:t0", ListeningPort(room=0)) as (_endpoint, port):
        with packet_socket("t0") as sock, counting(os, "readv") as work:
            for number in range(300):
                sock.send(Packet(source_port=number).build())
            port.make_room()
            await until(lambda: len(port.frames) >= 300)
    assert work.most_in_step <= tap_module.TURN


async def test_what_finds_no_room_waits_and_comes_in_order():
    async with running("tap:t0", ListeningPort(room=1)) as (_endpoint, port):
        with packet_socket("t0") as sock:
            sent = [Packet(source_port=number).build() for number in range(100)]
            for each in sent:
                sock.send(each)
            for count in range(1, 20):
                await arrived(port, count)
                await trio.testing.wait_all_tasks_blocked()
                assert len(port.frames) == count
                port.make_room(1)
            port.make_room()
            assert [frame.tobytes() for frame in await arrived(port, 100)] == sent


async def test_what_was_meant_for_an_earlier_guest_is_forgotten():
    setting(*QUIET)
    endpoint = await open_endpoint("tap:[queues=2]t0")
    with packet_socket("t0") as sock:
        for number in range(300):
            sock.send(Packet(source_port=number).build())
        port = ListeningPort()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, port)
            await until(lambda: port.up)
            await trio.testing.wait_all_tasks_blocked()
            last = Packet(payload=b"of this life").build()
            sock.send(last)
            assert [frame.tobytes() for frame in await arrived(port, 1)] == [last]
            nursery.cancel_scope.cancel()
    await endpoint.aclose()


async def test_an_interface_that_is_deleted_is_the_end():
    setting(*QUIET)
    endpoint = await open_endpoint("tap:t0")
    with pytest.RaisesGroup(pytest.RaisesExc(EndpointError, match="the interface t0 was deleted")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, ListeningPort())
            await trio.testing.wait_all_tasks_blocked()
            ip("link del t0")
    assert endpoint.transmit(0, [Frame(bytes(60))] * 3) == 3
    await endpoint.wait_writable(0)
    with pytest.raises(EndpointError, match="was deleted"):
        await endpoint.run(ListeningPort())
    await endpoint.aclose()


async def test_the_link_follows_the_interface():
    async with running("tap:t0") as (endpoint, port):
        assert port.up is True
        ip("link set t0 down")
        await until(lambda: port.up is False)
        assert endpoint.transmit(0, [Frame(Packet().build())]) == 1
        assert endpoint.snapshot() == {"interface": "t0", "up": False, "dropped": {"EIO": 1}}
        ip("link set t0 name t9")
        ip("link set t9 up")
        await until(lambda: port.up is True)
        assert endpoint.snapshot()["interface"] == "t9"


async def test_a_frame_that_the_kernel_refuses_is_dropped_and_counted():
    async with running("tap:t0") as (endpoint, _port):
        good = Frame(Packet().build())
        bad = Frame(good.head, (), Offload(NEEDS_CHECKSUM, 0, 0, 0, 60_000, 16))
        with packet_socket("t0") as sock:
            assert endpoint.transmit(0, [bad, good]) == 2
            assert await received(sock, 1) == [good.head]
        assert endpoint.snapshot()["dropped"] == {"EINVAL": 1}


async def test_who_waits_for_a_full_queue_is_woken(monkeypatch):
    async with running("tap:t0") as (endpoint, _port):
        full = BlockingIOError(errno.EAGAIN, "")
        monkeypatch.setattr(os, "writev", lambda *_: (_ for _ in ()).throw(full))
        assert endpoint.transmit(0, [Frame(Packet().build())] * 3) == 0
        monkeypatch.undo()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(endpoint.wait_writable, 0)


async def test_who_waits_when_the_interface_goes_down_is_woken(monkeypatch):
    async with running("tap:t0") as (endpoint, port):
        # A queue that is full, as far as anybody can tell.
        monkeypatch.setattr(trio.lowlevel, "wait_writable", lambda _fd: trio.sleep_forever())
        assert await waits(lambda: endpoint.wait_writable(0))
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(endpoint.wait_writable, 0)
            await trio.testing.wait_all_tasks_blocked()
            ip("link set t0 down")
        assert port.up is False


# -- opening ---------------------------------------------------------------------------------------


async def test_a_new_interface_is_up_and_goes_with_the_endpoint():
    endpoint = await open_endpoint("tap:new%d")
    assert endpoint.snapshot()["interface"] == "new0"
    assert tun.is_up("new0")
    await endpoint.aclose()
    with pytest.raises(OSError):
        socket.if_nametoindex("new0")


async def test_an_interface_that_was_made_for_us_stays_as_it_is():
    ip("tuntap add dev t0 mode tap", "link set t0 mtu 4000")
    for spec in ("tap:t0", "tap:t0"):
        with remarks() as said:
            endpoint = await open_endpoint(spec)
        assert said == [
            "tap:t0: the interface is down; the guest's link is down until: ip link set t0 up"
        ]
        assert endpoint.info.mtu == 4000
        assert endpoint.info.queues == 1
        assert not tun.is_up("t0")
        await endpoint.aclose()
    assert socket.if_nametoindex("t0")


async def test_an_interface_that_is_up_is_not_called_down():
    ip("tuntap add dev t0 mode tap", "link set t0 up")
    with remarks() as said:
        endpoint = await open_endpoint("tap:t0")
    assert not said
    await endpoint.aclose()


async def test_one_with_several_queues_can_be_had_with_one():
    setting(*QUIET)
    ip("tuntap add dev t0 mode tap multi_queue", "link set t0 up")
    async with running("tap:t0") as (endpoint, port):
        assert endpoint.info.queues == 1
        with packet_socket("t0") as sock:
            sock.send(Packet().build())
            await arrived(port, 1)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("tap:", "'' is not the name of an interface"),
        ("tap:abcdefghijklmnop", "is not the name of an interface"),
        ("tap:a/b", "is not the name of an interface"),
        ("tap:lo", "tap:lo: lo is no TAP interface"),
        ("tap:[queues=2]lo", "or one for a single queue"),
        ("tap:[queues=2]one", "or one for a single queue; make it with multi_queue"),
        ("tap:[queues=0]one", "queues=0; 1 to 64 are possible"),
        ("tap:[queues=65]one", "queues=65"),
        ("tap:busy", "busy is in use"),
        ("tap:[queue=2]one", "unknown option 'queue'"),
    ],
)
async def test_what_cannot_be_had_is_said_with_a_reason(spec, text, no_descriptor_is_leaked):
    ip("tuntap add dev one mode tap")
    other = await open_endpoint("tap:busy")
    with pytest.raises(ConfigError, match=text):
        await open_endpoint(spec)
    await other.aclose()


@pytest.mark.parametrize(
    ("new", "text"), [(True, "ip tuntap add dev t0 .* user"), (False, "another user")]
)
async def test_without_the_privilege_it_says_what_to_do(monkeypatch, new, text):
    if not new:
        ip("tuntap add dev t0 mode tap")

    def ioctl(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(ConfigError, match=text):
        await open_endpoint("tap:t0")


@pytest.mark.parametrize(
    ("error", "text"),
    [(FileNotFoundError(2, ""), "the kernel has no TAP"), (PermissionError(13, ""), "by user")],
)
async def test_without_the_device_it_says_so(monkeypatch, error, text):
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(ConfigError, match=text):
        await open_endpoint("tap:t0")


async def test_a_kernel_without_udp_segments_is_good_for_the_rest(monkeypatch):
    ioctl = fcntl.ioctl

    def old(fd, request, argument=0):
        if request == 0x400454D0 and argument & 0x60:
            raise OSError(errno.EINVAL, "")
        return ioctl(fd, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", old)
    endpoint = await open_endpoint("tap:t0")
    assert endpoint.info.offloads.tcp_segments
    assert not endpoint.info.offloads.udp_segments
    await endpoint.aclose()


async def test_closing_ends_what_is_under_way(no_descriptor_is_leaked):
    endpoint = await open_endpoint("tap:[queues=2]t0")
    with pytest.RaisesGroup(pytest.RaisesExc(EndpointError, match="it is closed")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, ListeningPort(room=0))
            await trio.testing.wait_all_tasks_blocked()
            await endpoint.aclose()
    await endpoint.aclose()


async def test_a_frame_of_the_greatest_length_comes_in():
    async with running("tap:t0") as (endpoint, port):
        payload = bytes(MAX_FRAME - 14 - 20 - 20)
        data, offload = Packet(protocol=PROTOCOL_TCP, payload=payload).build_partial(1400)
        assert len(data) == MAX_FRAME
        with packet_socket("t0") as sock:
            sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            assert endpoint.transmit(0, [GuestFrame(data, offload).frame]) == 1
            assert (await received(sock, 1))[0][10:] == data
        del port
