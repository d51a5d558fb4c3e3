"""An adapter's life: up and down, changes, the end in each driver's own order."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from netvsp.guest import HABITS, AttachError, RndisError, attach
from netvsp.wire import nvsp, oids, rndis
from tests.support.fake_host import offer
from tests.support.fake_nic_host import ADDRESS, SUB_ALLOCATION, Nic, plugged
from tests.support.patience import waits
from vmbus.guest import (
    DPDK,
    FREEBSD,
    HAIKU,
    LINUX_5_10,
    LINUX_6_1,
    LINUX_NEW,
    MACOS,
    NETBSD,
    OPENBSD,
    PERSONALITIES,
    UEFI,
    GuestPanic,
    HostRefusedError,
)
from vmbus.wire.guids import CLASS_NIC
from vmbus.wire.versions import Version

settle = trio.testing.wait_all_tasks_blocked
FRAME = bytes(range(60))
DRIVERS = [each for each in PERSONALITIES.values() if each.key in HABITS]


def in_order(nic: Nic) -> list[str]:
    """Have NVSP, RNDIS and control messages in one log from now on; return it."""
    nic.log = []
    nic.host.log = nic.log
    return nic.log


def names(log) -> list[str]:
    return [each if isinstance(each, str) else each.NAME for each in log]


# -- up and down -----------------------------------------------------------------------------------


@pytest.mark.parametrize("personality", DRIVERS, ids=str)
async def test_up_and_down(personality):
    async with plugged(personality) as (adapter, nic):
        assert not adapter.is_up
        await adapter.up()
        assert adapter.is_up
        assert nic.filter == adapter.habits.up_filter != 0
        await adapter.down()
        assert not adapter.is_up
        assert nic.filter == 0
        await adapter.up()
        nic.frame(FRAME)
        assert (await adapter.receive()).data == FRAME
        assert adapter.counters.late == 0


async def test_some_drivers_look_at_the_link_when_they_go_up():
    async with plugged(DPDK) as (adapter, nic):
        assert nic.log[-1] != "QUERY GEN_LINK_SPEED"
        nic.objects[oids.GEN_MEDIA_CONNECT_STATUS] = struct.pack("<I", 1)
        await adapter.up()
        assert nic.log[-2:] == ["QUERY GEN_MEDIA_CONNECT_STATUS", "QUERY GEN_LINK_SPEED"]
        assert not adapter.link
        assert adapter.events.speed == 100_000_000


async def test_a_refused_filter_leaves_the_adapter_as_it_was():
    with pytest.raises(GuestPanic, match="before the packet filter was set"):
        async with plugged() as (adapter, nic):
            nic.statuses[oids.GEN_CURRENT_PACKET_FILTER] = rndis.STATUS_FAILURE
            with pytest.raises(RndisError, match="SET GEN_CURRENT_PACKET_FILTER"):
                await adapter.up()
            assert not adapter.is_up
            await settle()
            nic.frame(FRAME)
            await settle()


async def test_down_waits_until_the_host_has_read_all():
    async with plugged() as (adapter, nic):
        await adapter.up()
        channel = nic.host.channels[1]

        def stop(channel, packet, answer=nic.packet):
            answer(channel, packet)
            channel.serving = nic.filter != 0

        nic.host.on_packet = stop

        async def down():
            await adapter.down()
            assert channel.incoming.words[0] == channel.incoming.words[1]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(down)
            while channel.serving:
                await trio.lowlevel.checkpoint()
            await adapter.channels[0].send(nvsp.build_data_path(0))
            for _ in range(100):
                await trio.lowlevel.checkpoint()
            nic.host.on_packet = nic.packet
            channel.serving = True
            channel.drain()


# -- changes ---------------------------------------------------------------------------------------


async def test_linux_changes_its_address():
    """rndis_filter_set_device_mac."""
    async with plugged() as (adapter, nic):
        new = bytes.fromhex("02aabbccddee")
        await adapter.set_address(new)
        assert adapter.address == new
        oid, data = nic.sets[-1]
        assert oid == oids.GEN_RNDIS_CONFIG_PARAMETER
        assert struct.unpack_from("<5I", data) == (20, 28, 2, 48, 24)
        assert data[20:].decode("utf-16-le") == "NetworkAddress02aabbccddee"
        nic.statuses[oid] = rndis.STATUS_FAILURE
        with pytest.raises(RndisError, match="SET GEN_RNDIS_CONFIG_PARAMETER"):
            await adapter.set_address(ADDRESS)
        assert adapter.address == new
    async with plugged(FREEBSD) as (adapter, nic):
        with pytest.raises(ValueError, match="does not change the address"):
            await adapter.set_address(ADDRESS)


@pytest.mark.parametrize("personality", [LINUX_6_1, LINUX_5_10, FREEBSD, DPDK], ids=str)
async def test_a_new_mtu_is_a_new_life_on_the_same_channel(personality):
    async with plugged(personality, vps=2, mtu=1000) as (adapter, nic):
        await adapter.up()
        first = adapter.open_channels[0].offer.relid
        nic.objects[oids.GEN_MAXIMUM_FRAME_SIZE] = struct.pack("<I", 9000)
        nic.host.handlers["CLOSECHANNEL"] = lambda item: closed(nic, item)
        before = list(nic.log)
        nic.log.clear()
        nic.payloads.clear()
        await adapter.set_mtu(1400)
        assert adapter.open_channels[0].offer.relid == first
        assert adapter.is_up
        assert adapter.mtu == 1400
        assert sorted(adapter.open_channels) == [0, 1]
        config = nvsp.parse_ndis_config_untrusted(
            next(each for each in nic.payloads if each[0] == nvsp.SEND_NDIS_CONFIG)
        )
        assert config[0] == 1400 + adapter.habits.config_header
        again = nic.log[nic.log.index("INIT") :]
        assert again[: len(before)] == before[: len(again)]
        nic.frame(bytes(1414))
        assert len((await adapter.receive()).data) == 1414
        assert await adapter.send(bytes(1414)) == nvsp.SUCCESS


def closed(nic, item):
    """A host's sub-channels are gone when the first channel is closed; they are offered anew."""
    nic.host.on_closechannel(item)
    if item.relid == 1:
        for each in [each for each in nic.host.offers if each.relid != 1]:
            nic.host.rescind(each.relid)


async def test_linux_comes_back_with_whole_sub_allocations():
    """netvsc_devinfo_get: sections times their size, in whole pages."""

    def prepare(nic):
        nic.sub_allocation = 1728

    async with plugged(prepare=prepare) as (adapter, nic):
        assert len(nic.receive) == 32
        await adapter.reopen()
        assert len(nic.receive) == 32
        assert nic.count == 32 * 4096 // 1728
        nic.sub_allocation = 40000
        await adapter.reopen()
        assert len(nic.receive) == 32
        await adapter.reopen()
        assert len(nic.receive) == 30  # 3 times 40000 bytes
    async with plugged(FREEBSD, prepare=prepare) as (adapter, nic):
        nic.sub_allocation = 40000
        await adapter.reopen()
        await adapter.reopen()
        assert len(nic.receive) == 32


async def test_freebsd_comes_back_with_the_same_version_only():
    async with plugged(FREEBSD) as (adapter, nic):
        nic.versions = {nvsp.VERSION_5}
        with pytest.raises(AttachError, match="refuses all NVSP versions"):
            await adapter.reopen()
        assert nic.log[-1] == "INIT"
    async with plugged(LINUX_6_1) as (adapter, nic):
        nic.versions = {nvsp.VERSION_5}
        await adapter.reopen()
        assert adapter.version == nvsp.VERSION_5


async def test_the_number_of_channels_can_be_changed():
    async with plugged(vps=4) as (adapter, nic):
        nic.host.handlers["CLOSECHANNEL"] = lambda item: closed(nic, item)
        assert len(adapter.channels) == 4
        await adapter.reopen(sub_channels=1)
        assert len(adapter.channels) == 2
        assert adapter.scaling_table == (0, 1) * 64
        await adapter.reopen(sub_channels=0)
        assert len(adapter.channels) == 1
        assert not adapter.scaling_table
        assert adapter.receiver.allowed == {0}
        await adapter.reopen()
        assert len(adapter.channels) == 1
        await adapter.reopen(sub_channels=3)
        assert len(adapter.channels) == 4
        assert not adapter.is_up


@pytest.mark.parametrize("personality", [OPENBSD, NETBSD, MACOS, UEFI], ids=str)
async def test_who_does_not_change_its_mtu(personality):
    async with plugged(personality) as (adapter, _nic):
        with pytest.raises(ValueError, match="does not change the MTU"):
            await adapter.set_mtu(1400)


async def test_the_data_path_is_switched():
    async with plugged() as (adapter, nic):
        await adapter.switch_data_path(virtual_function=True)
        await adapter.switch_data_path(virtual_function=False)
        assert nic.log[-2:] == ["SWITCH_DATA_PATH"] * 2
        paths = [nvsp.parse_data_path_untrusted(each) for each in nic.payloads[-2:]]
        assert paths == [nvsp.DATA_PATH_VF, nvsp.DATA_PATH_SYNTHETIC]
    with pytest.raises(GuestPanic, match="SWITCH_DATA_PATH: completed with 8 bytes"):
        async with plugged() as (adapter, nic):
            nic.answers[nvsp.SWITCH_DATA_PATH] = bytes(8)
            await adapter.switch_data_path(virtual_function=True)


# -- the end ---------------------------------------------------------------------------------------

REVOKES = ["REVOKE_RECEIVE_BUFFER", "REVOKE_SEND_BUFFER"]
TEARDOWN = "GPADL_TEARDOWN"
AFTER = ["CLOSECHANNEL", TEARDOWN, TEARDOWN, TEARDOWN]
EARLY = [REVOKES[0], TEARDOWN, REVOKES[1], TEARDOWN, "CLOSECHANNEL", TEARDOWN]
ENDS = {
    "linux-6.1": ["HALT", *REVOKES, *AFTER],
    "linux-new": ["HALT", *REVOKES, *AFTER],
    "linux-5.10": ["HALT", *REVOKES, *AFTER],
    "freebsd": ["HALT", *REVOKES, *AFTER],
    "illumos": ["HALT", *EARLY],
    "openbsd": ["HALT", REVOKES[0], TEARDOWN, "CLOSECHANNEL", TEARDOWN],
    "netbsd": ["HALT", REVOKES[0], TEARDOWN, "CLOSECHANNEL", TEARDOWN],
    "dpdk": [*REVOKES, "HALT", *AFTER],
    "macos": ["CLOSECHANNEL", TEARDOWN],
    "uefi": ["CLOSECHANNEL", TEARDOWN, TEARDOWN, TEARDOWN],
}


@pytest.mark.parametrize("personality", DRIVERS, ids=str)
async def test_each_driver_ends_in_its_own_order(personality):
    async with plugged(personality) as (adapter, nic):
        log = in_order(nic)
        await adapter.close()
        assert names(log) == ENDS[personality.key]
        await adapter.close()
        assert names(log) == ENDS[personality.key]


async def test_linux_takes_its_buffers_back_early_from_an_old_host():
    async with plugged(prepare=lambda nic: setattr(nic.host, "supported", {Version.V3_0})) as (
        adapter,
        nic,
    ):
        log = in_order(nic)
        await adapter.close()
        assert names(log) == ["HALT", *EARLY]


async def test_the_buffers_that_are_revoked_are_named():
    async with plugged() as (adapter, nic):
        await adapter.close()
        first, second = nic.payloads[-2:]
        assert struct.unpack_from("<IH", first) == (nvsp.REVOKE_RECEIVE_BUFFER, 0xCAFE)
        assert struct.unpack_from("<IH", second) == (nvsp.REVOKE_SEND_BUFFER, 0)
        assert all(tid == 0 for name, tid in nic.ids if name in REVOKES)


async def test_closing_waits_for_what_the_driver_still_has():
    async with plugged() as (adapter, nic):
        await adapter.up()
        adapter.receiver.hold()
        nic.frame(FRAME)
        await settle()
        log = in_order(nic)
        assert await waits(adapter.close)
        assert names(log) == ["HALT"]
        adapter.receiver.release()
        await adapter.close()
        assert adapter.receiver.outstanding == 0


async def test_nothing_is_written_to_memory_that_was_taken_back():
    async with plugged() as (adapter, nic):
        await adapter.up()
        await settle()
        await adapter.close()
        assert adapter.guest.ram.dirty_poison() == []
        nic.store(0, b"\1")
        assert adapter.guest.ram.dirty_poison() == [nic.receive[0]]


async def test_what_is_done_after_the_end():
    async with plugged() as (adapter, nic):
        nic.holding = True

        async def send():
            with pytest.raises(trio.ClosedResourceError):
                await adapter.send(FRAME)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await settle()
            await adapter.close()
        for call in (adapter.receive, adapter.keepalive, lambda: adapter.send(FRAME)):
            with pytest.raises(trio.ClosedResourceError):
                await call()


async def test_an_adapter_that_is_taken_away():
    async with plugged(vps=2) as (adapter, nic):
        await adapter.up()
        nic.holding = True

        async def fails(call):
            with pytest.raises(trio.BrokenResourceError):
                await call()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, adapter.receive)
            nursery.start_soon(fails, lambda: adapter.send(FRAME))
            await settle()
            nic.host.rescind(1)
        await fails(lambda: adapter.send(FRAME))
        await fails(adapter.keepalive)
        await fails(adapter.down)
        await adapter.close()


async def test_who_waits_for_a_section_is_told_of_the_end():
    async with plugged(UEFI) as (adapter, nic):
        nic.holding = True

        async def send():
            with pytest.raises(trio.ClosedResourceError):
                await adapter.send(FRAME)

        async with trio.open_nursery() as nursery:
            for _ in range(9):
                nursery.start_soon(send)
            await settle()
            assert len(nic.packets) == 8
            await adapter.close()


async def test_an_adapter_that_is_taken_away_while_it_is_closed():
    async with plugged() as (adapter, nic):
        nic.host.channels[1].serving = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adapter.close)
            await settle()
            nic.host.rescind(1)
        with pytest.raises(trio.BrokenResourceError):
            await adapter.keepalive()


async def test_an_adapter_that_is_taken_away_while_it_completes():
    async with plugged() as (adapter, nic):
        await adapter.up()
        await settle()
        nic.completions.clear()
        nic.host.channels[1].serving = False
        while adapter.receiver.outstanding < 3:
            nic.frame(FRAME)
            await settle()
        nic.host.rescind(1)
        await settle()
        assert nic.completions == []
        await adapter.close()


# -- attach ----------------------------------------------------------------------------------------


async def test_a_refused_channel_or_buffer():
    def refuse(name, count):
        def prepare(nic):
            seen = []

            def handler(item):
                seen.append(item)
                if len(seen) == count:
                    if name == "OPENCHANNEL":
                        nic.host.send(struct.pack("<IIIII", 6, 0, item.relid, item.open_id, 5))
                    else:
                        nic.host.handlers["GPADL_BODY"] = lambda _item: None
                        nic.host.send(struct.pack("<IIIII", 10, 0, item.relid, item.gpadl, 5))
                    return
                getattr(nic.host, f"on_{name.lower()}")(item)

            nic.host.handlers[name] = handler

        return prepare

    for name, count in [("OPENCHANNEL", 1), ("GPADL_HEADER", 2), ("GPADL_HEADER", 3)]:
        with pytest.raises(HostRefusedError):
            async with plugged(prepare=refuse(name, count)):
                pass


async def test_a_personality_without_a_driver():
    with pytest.raises(KeyError, match="haiku"):
        async with plugged(HAIKU):
            pass


async def test_two_adapters_at_once():
    async with plugged() as (first, nic):
        second_offer = offer(5, class_id=CLASS_NIC)
        nic.host.offers.append(second_offer)
        with pytest.raises(AttachError, match="refuses all"):
            nic.versions = set()
            await attach(
                first.guest, second_offer, ring_pages=8, receive_size=1 << 16, send_size=1 << 15
            )
        assert await first.send(FRAME) == nvsp.SUCCESS


async def test_counters():
    async with plugged(LINUX_NEW) as (adapter, nic):
        await adapter.up()
        for _ in range(3):
            await adapter.send(FRAME)
            nic.frame(FRAME)
            await adapter.receive()
        await settle()
        found = adapter.counters
        assert (found.sent, found.sent_bytes, found.failed) == (3, 180, 0)
        assert (found.received, found.received_bytes, found.late) == (3, 180, 0)
        assert found.completed == found.packets == nic.next_section
        assert SUB_ALLOCATION * nic.count == len(nic.receive) * 4096
