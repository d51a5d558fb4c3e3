"""Guests that do the worst to their network adapter and to the network, each in a process."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator

import trio

from netvsp.guest import attach
from netvsp.guest.adapter import NetvscAdapter
from netvsp.wire import ndis, nvsp, oids, ppi, rndis
from tests.support.house import ROOT
from vmbus.attach.client.machine import attach_machine
from vmbus.guest import LINUX_6_1, boot
from vmbus.partition.soft_machine import SoftMachine
from vmbus.wire.gpa import build_range
from vmbus.wire.guids import CLASS_NIC
from vmbus.wire.packets import COMPLETION, GPA_DIRECT, IN_BAND, RANGES_HEADER, build_packet

PAGE = 4096
KEPT = 4096
"""Packets whose pages stay as they are: long enough for the host to have read them."""
RAM = 160 << 20
SAID = 4
"""Rounds of which an attacker says that it has done them."""


class Attacker:
    """Packets by hand, into the rings of a driver that has come up.

    Args:
        adapter: The driver.
        victim: Address that it sends to.
    """

    def __init__(self, adapter: NetvscAdapter, victim: bytes) -> None:
        self.adapter = adapter
        self.victim = victim
        self.mac = adapter.address
        self.random = random.Random(1)
        self._used: collections.deque[list[int]] = collections.deque()
        self._count = self._rounds = 0

    def message(self, target: bytes, source: bytes, size: int = 60, items: bytes = b"") -> bytes:
        frame = (target + source + b"\x88\xb5").ljust(size, b"x")
        return rndis.build_packet_header(size, items) + frame

    def pages(self, data: bytes, kind: int = nvsp.CHANNEL_DATA) -> bytes:
        """A packet whose message is in pages."""
        ram = self.adapter.guest.ram
        pfns = ram.allocate(-(-len(data) // PAGE), contiguous=False)
        rest = data
        for view in ram.views(pfns):
            part, rest = rest[: len(view)], rest[len(view) :]
            view[: len(part)] = part
        self._used.append(pfns)
        if len(self._used) > KEPT:
            ram.free(self._used.popleft())
        return build_packet(
            GPA_DIRECT,
            nvsp.build_rndis_packet(kind),
            transaction_id=9,
            flags=0,
            header=RANGES_HEADER.pack(0, 1) + build_range(len(data), 0, pfns),
        )

    def request(self, kind: int, oid: int, value: bytes = b"") -> bytes:
        """A packet with a control request, to whose reply the driver does not listen."""
        self.adapter.control.reply = lambda *_: None  # type: ignore[method-assign]
        return self.pages(rndis.build_request(kind, 5, oid, value), nvsp.CHANNEL_CONTROL)

    async def send(self, *packets: bytes, channel: int = 0) -> None:
        for each in packets:
            await self.adapter.channels[channel].send_packet(each)
            self._count += 1
            if not self._count % 64:
                await self.round()

    async def round(self) -> None:
        """Say that it goes on, the first few times; let others have their turn."""
        self._rounds += 1
        if self._rounds <= SAID:
            print("on", flush=True)
        await trio.lowlevel.checkpoint()


async def flood(attacker: Attacker) -> None:
    """Send to the victim whatever goes into the ring."""
    packet = attacker.pages(attacker.message(attacker.victim, attacker.mac, 1000))
    while True:
        await attacker.send(packet)


async def everybody(attacker: Attacker) -> None:
    """Send to all."""
    packet = attacker.pages(attacker.message(b"\xff" * 6, attacker.mac))
    while True:
        await attacker.send(packet)


async def addresses(attacker: Attacker) -> None:
    """Send from ever other addresses, to ever other ones."""
    while True:
        ends = [b"\x02" + attacker.random.randbytes(5) for _ in range(2)]
        source = attacker.mac if attacker.random.randrange(2) else ends[0]
        await attacker.send(attacker.pages(attacker.message(ends[1], source)))


async def rubbish(attacker: Attacker) -> None:
    """Packets of random bytes, page lists, completions of nothing, damaged frames."""
    some = attacker.random
    kinds = [*nvsp.MESSAGE_NAMES, 0, 0xFFFFFFFF]
    number = 0
    while True:
        number += 1
        kind = some.choice([IN_BAND, GPA_DIRECT, COMPLETION, 7, 9, 77])
        body = some.choice(kinds).to_bytes(4, "little") + some.randbytes(some.randrange(60))
        header = b""
        if kind == GPA_DIRECT:
            header = struct.pack("<II", 0, some.randrange(4))
            header += some.randbytes(8 * some.randrange(1, 9))
        packet = build_packet(kind, body, transaction_id=number, header=header, flags=0)
        item = ppi.build_item(some.randrange(4), some.getrandbits(32))
        data = bytearray(attacker.message(attacker.victim, attacker.mac, 200, item))
        data[some.randrange(44)] = some.randrange(256)
        await attacker.send(packet, attacker.pages(bytes(data), some.randrange(3)))


async def restless(attacker: Attacker) -> None:
    """Agree on a version and share buffers without end."""
    adapter = attacker.adapter
    messages = [nvsp.build_init(nvsp.VERSION_6_1, nvsp.VERSION_6_1)]
    for kind, buffer in (
        (nvsp.SEND_RECEIVE_BUFFER, adapter._receive),
        (nvsp.SEND_SEND_BUFFER, adapter._send),
    ):
        assert buffer is not None
        assert buffer.gpadl is not None
        messages.append(nvsp.build_buffer(kind, buffer.gpadl.handle, nvsp.RECEIVE_BUFFER_ID))
    while True:
        for each in messages:
            await attacker.send(build_packet(IN_BAND, each, transaction_id=9, flags=0))


async def reopening(attacker: Attacker) -> None:
    """Close the adapter and open it again, with another MTU and other channels, without end."""
    while True:
        await attacker.adapter.reopen(
            mtu=attacker.random.choice([68, 1500, 9000]),
            sub_channels=attacker.random.randrange(8),
        )
        await attacker.round()


async def deaf(attacker: Attacker) -> None:
    """Take no frame and give nothing back, while asking for replies."""
    attacker.adapter.receiver.hold()
    packet = attacker.request(rndis.QUERY, oids.GEN_SUPPORTED_LIST)
    while True:
        await attacker.send(packet)


async def settings(attacker: Attacker) -> None:
    """Set other keys, tables and filters without end."""
    some = attacker.random
    while True:
        scaling = ndis.build_rss_parameters(
            flags=0,
            hash_information=0x1701,
            table=tuple(some.randrange(9) for _ in range(128)),
            key=some.randbytes(40),
        )
        wants = some.randbytes(4)
        await attacker.send(
            attacker.request(rndis.SET, oids.GEN_RECEIVE_SCALE_PARAMETERS, scaling),
            attacker.request(rndis.SET, oids.GEN_CURRENT_PACKET_FILTER, wants),
        )


async def segments(attacker: Attacker) -> None:
    """Large segments, to be cut into the smallest pieces, on all channels."""
    internet = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, 6, 0, bytes(4), bytes(4))
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x10, 0, 0, 0)
    frame = attacker.victim + attacker.mac + b"\x08\0" + internet + tcp + bytes(60_000)
    large = ppi.pack_large_send(ppi.LargeSend(48, 34, False))
    items = ppi.build_item(ppi.LARGE_SEND, large)
    packet = attacker.pages(rndis.build_packet_header(len(frame), items) + frame)
    while True:
        for channel in range(len(attacker.adapter.channels)):
            await attacker.send(packet, channel=channel)


KINDS: dict[str, Callable[[Attacker], Awaitable[None]]] = {
    each.__name__: each
    for each in (
        flood,
        everybody,
        addresses,
        rubbish,
        restless,
        reopening,
        deaf,
        settings,
        segments,
    )
}
"""What a guest can do."""


@contextlib.contextmanager
def network_guest(
    path: str, name: str, what: str, victim: bytes
) -> Iterator[subprocess.Popen[str]]:
    """A guest in a process of its own that does one of :data:`KINDS`, and says when it begins.

    Args:
        path: Of the server's socket.
        name: Of the guest.
        what: It does.
        victim: Whom it sends to.
    """
    with subprocess.Popen(
        [sys.executable, "-m", __name__, path, name, what, victim.hex()],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'devices'}"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def _main(path: str, name: str, what: str, victim: str) -> None:
    machine = SoftMachine([(0, RAM)])
    async with attach_machine(machine, path, name=name), boot(machine, LINUX_6_1) as guest:
        offers = await guest.connection.connect()
        (offer,) = [each for each in offers if each.class_id == CLASS_NIC]
        adapter = await attach(guest, offer)
        await adapter.up()
        print("ready", flush=True)
        await KINDS[what](Attacker(adapter, bytes.fromhex(victim)))


if __name__ == "__main__":
    _path, _name, _what, _victim = sys.argv[1:]
    trio.run(_main, _path, _name, _what, _victim)
