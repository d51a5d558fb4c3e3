"""From the guest to the network: frames with several VLAN tags."""

from __future__ import annotations

import pytest

from netvsp.endpoint import Offloads
from netvsp.link import AdapterConfig
from netvsp.wire import ppi
from tests.support.net_frames import Shape, packet
from tests.support.net_guest import MAC, PEER, Network, message_of, plain_frame, running


@pytest.mark.parametrize("offloads", [Offloads(), Offloads(vlan=True)])
async def test_a_segment_with_two_tags_is_cut(offloads):
    """A VLAN on top of another one: linux leaves the inner tag in the frame."""
    network = Network(offloads)
    whole = packet(Shape(4, "tcp", "inside"), bytes(6000))
    items = {ppi.LARGE_SEND: ppi.pack_large_send(ppi.LargeSend(1000, 38, False)), ppi.VLAN: 7 << 4}
    information = b"".join(ppi.build_item(*each) for each in items.items())
    async with running(network) as (guest, adapter):
        await guest.exchange(guest.pages([(0, message_of(whole, information))]))
        assert guest.host.complaints == []
        assert adapter.statistics.transmit.dropped == {}
    assert len(network.frames) == 6
    for sent in network.frames:
        outer = sent.untagged()
        assert outer.tci == 7
        inner = outer.head if offloads.vlan else outer.tobytes()
        assert inner[12:18] == whole[12:18]
        assert len(inner) == 18 + 40 + 1000


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("config", "outer", "inner"),
    [
        ({"vlan": 5}, 0, "8100 0007"),
        ({"vlan": 5}, 0x2000, "8100 0007"),
        ({"vlan": 5}, 0, "88a8 0007"),
        ({"trunk": frozenset({0, 5})}, 0x2000, "8100 0007"),
    ],
)
async def test_no_tag_is_hidden_behind_another_one(config, outer, inner, beside):
    network = Network()
    frame = MAC + bytes.fromhex(inner) + plain_frame(60)[12:]
    tag = b"\x81\0" + outer.to_bytes(2, "big")
    item = ppi.build_item(ppi.VLAN, ppi.pack_vlan(ppi.vlan_of_tci(outer)))
    message = message_of(PEER + frame, item) if beside else message_of(PEER + MAC + tag + frame[6:])
    async with running(network, config=AdapterConfig(**config)) as (guest, adapter):
        await guest.exchange(guest.section(0, message))
        assert network.frames == []
        assert adapter.statistics.transmit.dropped == {"vlan": 1}


async def test_a_tag_that_counts_may_have_another_one_behind_it():
    network = Network()
    frame = PEER + MAC + bytes.fromhex("8100 0005 8100 0007") + plain_frame(60)[12:]
    async with running(network, config=AdapterConfig(trunk=frozenset({5}))) as (guest, _adapter):
        await guest.exchange(guest.section(0, message_of(frame)))
        assert network.bytes() == [frame]
