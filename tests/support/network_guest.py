"""A guest at an endpoint: asks for an address, looks names up, pings. Its packets are scapy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from netvsp.endpoint import Endpoint
from netvsp.frames.frame import Frame, format_mac
from netvsp.testing import ListeningPort
from tests.support.patience import LOOK, PATIENCE

EVERYBODY = "ff:ff:ff:ff:ff:ff"


class NetworkGuest:
    """One station.

    Args:
        endpoint: Whose ``run`` is under way with ``port``.
        port: Where its frames go.
    """

    def __init__(self, endpoint: Endpoint, port: ListeningPort) -> None:
        self.endpoint = endpoint
        self.port = port
        self.mac = format_mac(port.mac)
        self.address = "0.0.0.0"
        self.router = ""
        self.resolvers: list[str] = []
        self._macs: dict[str, str] = {}
        self._number = 0

    def send(self, packet: Packet) -> None:
        """Send a packet from here."""
        data = bytes(packet)
        assert self.endpoint.transmit(0, [Frame(data.ljust(60, b"\0"))]) == 1

    async def wait(self, wanted: Callable[[Packet], object]) -> Packet:
        """Return the first packet that is wanted, and forget what came before it."""
        with trio.fail_after(PATIENCE):
            while True:
                while self.port.frames:
                    packet = Ether(self.port.frames.pop(0).tobytes())
                    if wanted(packet):
                        return packet
                await trio.sleep(LOOK)

    async def ask(self, packet: Packet, wanted: Callable[[Packet], object]) -> Packet:
        """Send a packet and return the answer."""
        self.send(packet)
        return await self.wait(wanted)

    async def get_address(self) -> dict[str, object]:
        """Go through DHCP; return the options of the lease."""
        offer = await self._dhcp([("message-type", "discover")])
        options = options_of(offer)
        assert options["message-type"] == 2
        given = offer[BOOTP].yiaddr
        lease = await self._dhcp(
            [
                ("message-type", "request"),
                ("requested_addr", given),
                ("server_id", options["server_id"]),
            ]
        )
        options = options_of(lease)
        assert options["message-type"] == 5
        assert lease[BOOTP].yiaddr == given
        self.address = given
        self.router = str(options["router"])
        return options

    async def _dhcp(self, options: list[Any], **fields: Any) -> Packet:
        self._number += 1
        number = self._number
        packet = (
            Ether(src=self.mac, dst=EVERYBODY)
            / IP(src=self.address, dst="255.255.255.255")
            / UDP(sport=68, dport=67)
            / BOOTP(chaddr=self.port.mac, xid=number, **fields)
            / DHCP(options=[*options, "end"])
        )
        return await self.ask(packet, lambda p: DHCP in p and p[BOOTP].xid == number)

    async def mac_of(self, address: str) -> str:
        """Ask who has an address."""
        if address not in self._macs:
            ask = ARP(op=1, hwsrc=self.mac, psrc=self.address, pdst=address)
            answer = await self.ask(
                Ether(src=self.mac, dst=EVERYBODY) / ask,
                lambda p: ARP in p and p[ARP].op == 2 and p[ARP].psrc == address,
            )
            assert answer[Ether].dst == self.mac
            self._macs[address] = answer[ARP].hwsrc
        return self._macs[address]

    async def ip(self, address: str, *, near: bool = True) -> Packet:
        """Return the headers of a packet to an address, by the router unless it is near."""
        mac = await self.mac_of(address if near else self.router)
        return Ether(src=self.mac, dst=mac) / IP(src=self.address, dst=address)

    async def ping(self, address: str, *, near: bool = True, payload: bytes = b"ping") -> Packet:
        """Return the answer to a ping, whatever it is."""
        packet = await self.ip(address, near=near) / ICMP(id=7, seq=1) / Raw(payload)
        return await self.ask(packet, lambda p: ICMP in p)

    async def look_up(self, name: str, kind: str, resolver: str, *, near: bool = True) -> Packet:
        """Return the answer of a name server."""
        self._number += 1
        number = self._number
        packet = (
            await self.ip(resolver, near=near)
            / UDP(sport=4000 + number, dport=53)
            / DNS(id=number, rd=1, qd=DNSQR(qname=name, qtype=kind))
        )
        answer = await self.ask(packet, lambda p: DNS in p and p[DNS].id == number)
        assert answer[UDP].dport == 4000 + number
        assert answer[IP].src == resolver
        found: Packet = answer[DNS]
        return found


def options_of(packet: Packet) -> dict[str, object]:
    """Return the DHCP options of a packet."""
    return {each[0]: each[1] for each in packet[DHCP].options if isinstance(each, tuple)}


def sums_are_right(packet: Packet) -> bool:
    """Whether scapy would write the same sums."""
    copy = packet.copy()
    for layer in (IP, UDP, ICMP):
        if layer in copy:
            del copy[layer].chksum
    return bytes(copy) == bytes(packet)
