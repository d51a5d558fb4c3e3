"""How each network driver comes up, and what it does not stand while it does."""

from __future__ import annotations

import dataclasses
import struct

import pytest
import trio

from netvsp.guest import HABITS, AttachError, RndisError
from netvsp.guest.habits import LINUX
from netvsp.wire import ndis, nvsp, oids, ppi, rndis
from tests.support.fake_nic_host import ADDRESS, frame_message, plugged
from tests.support.ids import plain
from vmbus.guest import (
    DPDK,
    FREEBSD,
    ILLUMOS,
    LINUX_6_1,
    LINUX_NEW,
    MACOS,
    NETBSD,
    OPENBSD,
    PERSONALITIES,
    UEFI,
    GuestPanic,
)

DRIVERS = [each for each in PERSONALITIES.values() if each.key in HABITS]
LINUX_STEPS = [
    "INITIALIZE",
    "QUERY GEN_MAXIMUM_FRAME_SIZE",
    "QUERY E802_3_PERMANENT_ADDRESS",
    "QUERY GEN_FRIENDLY_NAME",
    "QUERY TCP_OFFLOAD_HARDWARE_CAPABILITIES",
    "SET TCP_OFFLOAD_PARAMETERS",
    "QUERY GEN_MEDIA_CONNECT_STATUS",
    "QUERY GEN_LINK_SPEED",
    "QUERY GEN_RECEIVE_SCALE_CAPABILITIES",
    "SUBCHANNEL",
    "SET GEN_RECEIVE_SCALE_PARAMETERS",
    "SET GEN_RECEIVE_SCALE_PARAMETERS",
]
BSD_STEPS = [
    "INITIALIZE",
    "QUERY TCP_OFFLOAD_HARDWARE_CAPABILITIES",
    "SET TCP_OFFLOAD_PARAMETERS",
    "QUERY GEN_RECEIVE_SCALE_CAPABILITIES",
    "SUBCHANNEL",
    "SET GEN_RECEIVE_SCALE_PARAMETERS",
    "SET GEN_CURRENT_PACKET_FILTER",
    "QUERY E802_3_PERMANENT_ADDRESS",
    "QUERY GEN_MAXIMUM_FRAME_SIZE",
    "QUERY GEN_MEDIA_CONNECT_STATUS",
]
HVN_STEPS = ["INITIALIZE", "SET TCP_OFFLOAD_PARAMETERS", "QUERY E802_3_PERMANENT_ADDRESS"]
TCP_FRAME = (
    bytes(12)
    + struct.pack(">HBBHIBBH8x", 0x0800, 0x45, 0, 1040, 0, 64, 6, 0)
    + struct.pack(">HHIIBBHHH", 1, 2, 0, 0, 0x50, 0x10, 0, 0, 0)
    + bytes(1000)
)
BEGIN = ["INIT", "SEND_NDIS_CONFIG", "SEND_NDIS_VERSION", "SEND_RECEIVE_BUFFER", "SEND_SEND_BUFFER"]
ORDERS = {
    "linux-6.1": BEGIN + LINUX_STEPS,
    "linux-new": BEGIN + LINUX_STEPS,
    "linux-5.10": BEGIN + LINUX_STEPS,
    "freebsd": BEGIN + BSD_STEPS,
    "illumos": BEGIN + BSD_STEPS,
    "openbsd": BEGIN[:4] + HVN_STEPS,
    "netbsd": BEGIN[:4] + HVN_STEPS,
    "dpdk": [
        *BEGIN,
        "INITIALIZE",
        "SET GEN_CURRENT_PACKET_FILTER",
        "QUERY GEN_MAXIMUM_FRAME_SIZE",
        "QUERY E802_3_PERMANENT_ADDRESS",
        "QUERY GEN_RECEIVE_SCALE_CAPABILITIES",
        "QUERY TCP_OFFLOAD_HARDWARE_CAPABILITIES",
        "SET TCP_OFFLOAD_PARAMETERS",
        "SUBCHANNEL",
        "SET GEN_RECEIVE_SCALE_PARAMETERS",
    ],
    "macos": [
        "INIT",
        *BEGIN[2:],
        "INITIALIZE",
        "SET GEN_CURRENT_PACKET_FILTER",
        "QUERY E802_3_PERMANENT_ADDRESS",
        "QUERY GEN_MEDIA_CONNECT_STATUS",
    ],
    "uefi": [
        *BEGIN,
        "INITIALIZE",
        "QUERY E802_3_CURRENT_ADDRESS",
        "QUERY E802_3_CURRENT_ADDRESS",
    ],
}


@pytest.mark.parametrize("personality", DRIVERS, ids=plain)
async def test_each_driver_comes_up_in_its_own_order(personality):
    async with plugged(personality, vps=3) as (adapter, nic):
        assert nic.log == ORDERS[personality.key]
        assert adapter.address == ADDRESS
        assert adapter.version == adapter.habits.versions[0]
        several = adapter.habits.max_channels > 1
        assert len(adapter.channels) == len(adapter.open_channels) == (3 if several else 1)
        assert nic.receive_id == adapter.habits.receive_id
        assert adapter.link


@pytest.mark.parametrize("personality", DRIVERS, ids=plain)
async def test_each_driver_takes_memory_in_its_own_size(personality):
    habits = HABITS[personality.key]
    async with plugged(personality, pages=20000, receive_size=None, send_size=None) as (_, nic):
        # macOS knows version 1 only.
        old = habits.versions[0] <= nvsp.VERSION_2
        assert len(nic.receive) * 4096 == (habits.receive_size_old if old else habits.receive_size)
        assert len(nic.send) * 4096 == habits.send_size


async def test_an_old_version_has_a_smaller_receive_buffer():
    def old(nic):
        nic.versions = {nvsp.VERSION_1}

    async with plugged(pages=10000, prepare=old, receive_size=None) as (adapter, nic):
        assert adapter.version == nvsp.VERSION_1
        assert len(nic.receive) * 4096 == 15 << 20
        assert nic.log[:8] == ["INIT"] * 6 + BEGIN[2:4]


@pytest.mark.parametrize(
    ("personality", "payloads"),
    [
        (LINUX_6_1, (1514, 0xAC, (6, 30), 40)),
        (FREEBSD, (1500, 0x88, (6, 30), 32)),
        (ILLUMOS, (1500, 0x08, (6, 30), 32)),
        (OPENBSD, (9216, 0x08, (6, 30), 32)),
        (DPDK, (1514, 0x0C, (6, 30), 40)),
        (UEFI, (1514, 0, (6, 0), 32)),
    ],
    ids=plain,
)
async def test_what_each_driver_says_of_itself(personality, payloads):
    mtu, capabilities, version, size = payloads
    async with plugged(personality) as (_adapter, nic):
        config, ndis_version = nic.payloads[1:3]
        assert nvsp.parse_ndis_config_untrusted(config) == (mtu, capabilities)
        assert nvsp.parse_ndis_version_untrusted(ndis_version) == version
        assert {len(each) for each in nic.payloads} == {size}


@pytest.mark.parametrize(
    ("personality", "ids", "requests"),
    [
        (LINUX_6_1, [1] * 5, [1, 2, 3]),
        (FREEBSD, None, [1 << 16, 2 << 16, 3 << 16]),
        (OPENBSD, [1, 2, 3, 4, 1, 2, 3], [1, 2, 3]),
        (NETBSD, [1, 2, 3, 4, 1, 2, 3], [1, 2, 3]),
        (DPDK, [0] * 13, [1, 2, 3]),
        (MACOS, [1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3]),
        (UEFI, [1, 2, 3, 4, 5, 6, 7, 8], [0xBEEF, 0xFAAD, 0xFCAD]),
    ],
    ids=plain,
)
async def test_each_driver_numbers_in_its_own_way(personality, ids, requests):
    async with plugged(personality, sub_channels=0) as (_adapter, nic):
        assert nic.control_ids[: len(requests)] == requests
        # What wants no completion has id 0.
        bare = {"SEND_NDIS_CONFIG", "SEND_NDIS_VERSION"}
        found = [
            number
            for name, number in nic.ids
            if name not in bare or HABITS[personality.key].asks_completions
        ]
        if ids is not None:
            assert found[: len(ids)] == ids[: len(found)]


async def test_old_versions_are_offered_after_newer_ones():
    def old(nic):
        nic.versions = {nvsp.VERSION_4, nvsp.VERSION_2}

    async with plugged(prepare=old) as (adapter, nic):
        assert adapter.version == nvsp.VERSION_4
        assert nic.log[:5] == ["INIT"] * 4 + ["SEND_NDIS_CONFIG"]
        assert nvsp.parse_ndis_version_untrusted(nic.payloads[5]) == (6, 1)
        assert "SUBCHANNEL" not in nic.log
        (parameters,) = [data for oid, data in nic.sets if oid == oids.TCP_OFFLOAD_PARAMETERS]
        assert len(parameters) == 22


def refuse(oid):
    return lambda nic: nic.statuses.update({oid: rndis.STATUS_NOT_SUPPORTED})


def answer(kind, payload):
    return lambda nic: nic.answers.update({kind: payload})


def reply(key, *messages):
    return lambda nic: nic.replies.update({key: list(messages)})


@pytest.mark.parametrize(
    ("personality", "prepare", "reason"),
    [
        (UEFI, lambda nic: nic.versions.discard(nvsp.VERSION_5), "refuses all NVSP versions"),
        (
            LINUX_6_1,
            answer(nvsp.SEND_RECEIVE_BUFFER, nvsp.build_receive_buffer_complete(nvsp.FAILURE)),
            "SEND_RECEIVE_BUFFER: status 2",
        ),
        (
            LINUX_6_1,
            answer(nvsp.SEND_SEND_BUFFER, nvsp.build_send_buffer_complete(nvsp.BUSY)),
            "SEND_SEND_BUFFER: status 6",
        ),
        (LINUX_6_1, refuse(oids.TCP_OFFLOAD_HARDWARE_CAPABILITIES), "CAPABILITIES: refused"),
        (LINUX_6_1, refuse(oids.TCP_OFFLOAD_PARAMETERS), "PARAMETERS: RNDIS status 0xc00000bb"),
        (FREEBSD, refuse(oids.GEN_RECEIVE_SCALE_PARAMETERS), "SET GEN_RECEIVE_SCALE_PARAMETERS"),
        (
            LINUX_6_1,
            reply(
                rndis.INITIALIZE,
                rndis.build_initialize_reply(
                    0, rndis.STATUS_FAILURE, max_packets=1, max_transfer=0, alignment=0
                ),
            ),
            "RNDIS INITIALIZE: status 0xc0000001",
        ),
    ],
    ids=plain,
)
async def test_a_refused_step_is_told(personality, prepare, reason):
    with pytest.raises(AttachError, match=reason):
        async with plugged(personality, vps=2, prepare=prepare):
            pass


async def test_a_device_without_an_address_is_told():
    with pytest.raises(RndisError, match=r"QUERY E802_3_PERMANENT_ADDRESS.*0xc00000bb"):
        async with plugged(prepare=refuse(oids.E802_3_PERMANENT_ADDRESS)):
            pass


@pytest.mark.parametrize(
    "oid",
    [
        oids.GEN_MAXIMUM_FRAME_SIZE,
        oids.GEN_FRIENDLY_NAME,
        oids.GEN_MEDIA_CONNECT_STATUS,
        oids.GEN_LINK_SPEED,
        oids.GEN_RECEIVE_SCALE_CAPABILITIES,
        oids.GEN_RECEIVE_SCALE_PARAMETERS,
    ],
)
async def test_linux_does_without_many_things(oid):
    async with plugged(vps=2, prepare=refuse(oid)) as (adapter, _nic):
        assert adapter.address == ADDRESS
        assert adapter.scaling_table == () or oid != oids.GEN_RECEIVE_SCALE_PARAMETERS


@pytest.mark.parametrize(
    "oid", [oids.TCP_OFFLOAD_PARAMETERS, oids.TCP_OFFLOAD_HARDWARE_CAPABILITIES]
)
async def test_freebsd_does_without_offloads(oid):
    async with plugged(FREEBSD, prepare=refuse(oid)) as (adapter, _nic):
        assert ndis.OFFLOAD_ENABLED not in dataclasses.astuple(adapter.sender.offloads)
        with pytest.raises(ValueError, match="not been asked to cut segments"):
            await adapter.send(TCP_FRAME, segment=500)


async def test_what_the_device_says_is_kept():
    def prepare(nic):
        nic.objects[oids.GEN_MAXIMUM_FRAME_SIZE] = struct.pack("<I", 1400)
        nic.objects[oids.GEN_MEDIA_CONNECT_STATUS] = struct.pack("<I", 1)

    async with plugged(prepare=prepare, mtu=9000) as (adapter, _nic):
        assert adapter.mtu == 1400
        assert not adapter.link
        assert adapter.events.speed == 100_000_000
        assert adapter.friendly_name == "left port"
        assert adapter.offloads.lso_max_size == 65535


@pytest.mark.parametrize(
    ("personality", "prepare", "reason"),
    [
        (
            LINUX_6_1,
            answer(nvsp.INIT, nvsp.build_init_complete(nvsp.VERSION_5, nvsp.SUCCESS)),
            "0x50000 agreed on, 0x60001 was offered",
        ),
        (LINUX_6_1, answer(nvsp.INIT, bytes(12)), "NVSP: 0 where INIT_COMPLETE"),
        (OPENBSD, answer(nvsp.SEND_NDIS_CONFIG, bytes(8)), "SEND_NDIS_CONFIG: completed with 8"),
        (
            LINUX_6_1,
            answer(nvsp.SUBCHANNEL, nvsp.build_subchannel_complete(nvsp.SUCCESS, 2)),
            "2 granted, 1 were asked for",
        ),
        (LINUX_6_1, lambda nic: setattr(nic, "alignment", 13), "a multiple of 1 << 13"),
        (LINUX_6_1, lambda nic: setattr(nic, "max_packets", 0), "0 packets in a message"),
        (
            LINUX_6_1,
            answer(nvsp.SEND_RNDIS_PACKET, nvsp.build_rndis_packet_complete(nvsp.FAILURE)),
            "completed with NVSP status 2",
        ),
        (
            LINUX_6_1,
            lambda nic: nic.objects.update({oids.GEN_LINK_SPEED: bytes(2)}),
            "GEN_LINK_SPEED: 2 bytes",
        ),
        (
            LINUX_6_1,
            lambda nic: nic.objects.update({oids.E802_3_PERMANENT_ADDRESS: bytes(8)}),
            "8 bytes, 6 were asked for",
        ),
        (LINUX_6_1, lambda nic: setattr(nic, "section_size", 60), "sections of 60 bytes"),
        (LINUX_6_1, lambda nic: setattr(nic, "sub_allocation", 60), "sub-allocations of 60 bytes"),
        (LINUX_6_1, lambda nic: setattr(nic, "offered", 2), "2 sub-channels offered, 1 wanted"),
    ],
    ids=plain,
)
async def test_a_wrong_step_crashes_the_guest(personality, prepare, reason):
    with pytest.raises(GuestPanic, match=reason):
        async with plugged(personality, vps=2, prepare=prepare):
            await trio.testing.wait_all_tasks_blocked()


async def test_linux_is_satisfied_with_the_channels_that_it_gets():
    """Its table is older than the answer, so it names channels that are not there."""

    def prepare(nic):
        nic.grant = 1

    async with plugged(vps=4, prepare=prepare) as (adapter, nic):
        assert adapter.granted == 1
        assert len(adapter.channels) == 2
        data = [data for oid, data in nic.sets if oid == oids.GEN_RECEIVE_SCALE_PARAMETERS]
        off, on = map(ndis.parse_rss_parameters_untrusted, data)
        assert off.flags == ndis.RSS_DISABLE
        assert on.table == (0, 1, 2, 3) * 32
        assert adapter.sender.table == (0, 1) * 8
    async with plugged(FREEBSD, vps=4, prepare=prepare) as (adapter, nic):
        assert adapter.scaling_table == (0, 1) * 64


@pytest.mark.parametrize(
    "prepare",
    [
        lambda nic: setattr(nic, "grant", 0),
        answer(nvsp.SUBCHANNEL, nvsp.build_subchannel_complete(nvsp.FAILURE, 0)),
        lambda nic: nic.objects.pop(oids.GEN_RECEIVE_SCALE_CAPABILITIES),
    ],
)
async def test_without_sub_channels_there_is_one_channel(prepare):
    async with plugged(vps=4, prepare=prepare) as (adapter, nic):
        nic.host.offers = nic.host.offers[:1]
        assert len(adapter.channels) == 1
        assert "SET GEN_RECEIVE_SCALE_PARAMETERS" not in nic.log


@pytest.mark.parametrize(("queues", "vps", "count"), [(1, 4, 1), (2, 4, 2), (64, 16, 8), (8, 1, 1)])
async def test_as_many_channels_are_asked_for_as_are_of_use(queues, vps, count):
    async with plugged(LINUX_NEW, vps=vps, queues=queues) as (adapter, _nic):
        assert len(adapter.channels) == count


async def test_sub_channels_that_do_not_open_are_done_without():
    async with plugged(vps=4, only={2}) as (adapter, _nic):
        assert sorted(adapter.open_channels) == [0, 2]
        assert adapter.granted == 3
        assert adapter.receiver.allowed == {0, 2}
        assert adapter.sender.pick(1)[0] == 0
        assert adapter.sender.pick(2)[0] == 2


async def test_no_message_may_come_before_initialize():
    def prepare(nic):
        def early(message, payload, channel, answer=nic._nvsp):
            done = answer(message, payload, channel)
            if message == nvsp.SEND_SEND_BUFFER:
                nic.indicate(rndis.STATUS_MEDIA_CONNECT)
            return done

        nic._nvsp = early

    with pytest.raises(GuestPanic, match="an RNDIS message before INITIALIZE"):
        async with plugged(prepare=prepare):
            pass


async def test_dpdk_takes_a_notice_for_an_answer():
    def prepare(nic):
        def early(message, payload, channel, answer=nic._nvsp):
            if message == nvsp.SUBCHANNEL:
                nic.notify(nvsp.build_vf_association(allocated=True, serial=1))
            return answer(message, payload, channel)

        nic._nvsp = early

    with pytest.raises(GuestPanic, match="SEND_VF_ASSOCIATION where an answer was due"):
        async with plugged(DPDK, vps=2, prepare=prepare):
            pass
    async with plugged(vps=2, prepare=prepare) as (adapter, _nic):
        assert adapter.events.virtual_function == (True, 1)


async def test_habits_can_be_given():
    habits = dataclasses.replace(LINUX, versions=(nvsp.VERSION_2,))
    async with plugged(habits=habits) as (adapter, nic):
        assert adapter.version == nvsp.VERSION_2
        await adapter.up()
        tag = ppi.build_item(ppi.VLAN, 0x10)
        nic.deliver([frame_message(bytes(60), tag)])
        assert (await adapter.receive()).vlan == ppi.Vlan(1, 0, canonical=False)
