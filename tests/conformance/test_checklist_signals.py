"""The rows of the acceptance checklist about doorbells, monitor pages, hypercalls and the machine.

What a row asks for, and who suffers without it, stands in ``docs/reference/checklist.md``. The
guest here has no habits: it posts bytes and looks at every message, flag and index that comes back.
"""

from __future__ import annotations

from tests.support.patience import until
from tests.support.worlds import (
    ALL,
    MONITOR_1,
    MONITOR_2,
    RAW_RING_PFN,
    EchoDevice,
    RawGuest,
    numbers,
    ready,
    world,
)
from vmbus.engine.channels import connection_id_of
from vmbus.guest import PERSONALITIES, UEFI
from vmbus.host.channel import Channel
from vmbus.server import DeviceSetup
from vmbus.server.devices import make_devices
from vmbus.wire import messages as m
from vmbus.wire.packets import IN_BAND, build_packet
from vmbus.wire.synic import CpuidLeaf, HvStatus, Msr


async def test_row_28_monitored_offers_have_ids_of_their_own_below_128():
    async with world(*(EchoDevice(n, monitor=100) for n in range(130))) as there:
        guest = RawGuest(there)
        offers = await guest.connect()
        monitored = [offer for offer in offers if offer.monitor_allocated]
        assert sorted(offer.monitor_id for offer in monitored) == list(range(128))
        assert len(offers) == 130


async def test_row_28_no_monitor_id_where_there_is_no_page_to_poll():
    async with world(EchoDevice(1, monitor=100), EchoDevice(2)) as there:
        guest = RawGuest(there)
        await guest.contact(monitor_page_1=0, monitor_page_2=0)
        offers = [guest.parse(raw) for raw in (await guest.post(m.RequestOffers()))[:-1]]
        assert [offer.monitor_allocated for offer in offers] == [False, False]
        await guest.contact()
        offers = [guest.parse(raw) for raw in (await guest.post(m.RequestOffers()))[:-1]]
        assert [offer.monitor_allocated for offer in offers] == [True, False]


async def test_row_28_a_bit_in_the_monitor_page_is_a_doorbell():
    device = EchoDevice(1, monitor=100)
    async with world(device) as there:
        guest = await ready(there)
        seen: list[int] = []
        device.on_packet = lambda channel, packet: seen.append(packet.transaction_id)
        await guest.open()
        packet = build_packet(IN_BAND, bytes(8), transaction_id=9)
        there.machine.memory.write((RAW_RING_PFN + 1) * 4096, packet + bytes(8))
        there.machine.memory.page(RAW_RING_PFN).cast("I")[0] = len(packet) + 8
        words = there.machine.memory.page(MONITOR_2 >> 12).cast("I")
        await there.settle()
        assert seen == []
        words[2] |= 1
        await until(lambda: seen)
        assert words[2] == 0
        assert there.machine.memory.page(MONITOR_1 >> 12)[8] == 0


async def test_row_30_both_forms_of_the_hypercall_and_both_message_ports_work():
    device = EchoDevice(1)
    async with world(device) as there:
        guest = await ready(there)
        await guest.open()
        connection = connection_id_of(1)
        assert guest.synic.signal(connection, fast=True) == 0
        assert guest.synic.signal(connection, fast=False) == 0
        for port in (1, 4):
            raw = guest.build(m.GpadlTeardown(relid=1, gpadl=99))
            assert guest.post_bytes(raw, port) == 0
            assert numbers(await guest.receive()) == [12]
        assert guest.post_bytes(raw, 3) == HvStatus.INVALID_CONNECTION_ID


async def test_row_31_padding_reserved_bytes_numbers_and_lengths_mean_nothing():
    async with world(EchoDevice(1)) as there:
        guest = await ready(there)
        pfns = range(RAW_RING_PFN, RAW_RING_PFN + 64)
        for message in guest.gpadl(1, 7, pfns):
            raw = bytearray(guest.build(message))
            raw[4:8] = b"\xa5\x5a\xa5\x5a"
            if isinstance(message, m.GpadlBody):
                raw[8:12] = bytes(4)
            raw += b"\xee" * (240 - len(raw))
            assert guest.post_bytes(bytes(raw)) == 0
        (reply,) = await guest.receive()
        assert guest.parse(reply).status == 0
        raw = bytearray(guest.build(guest.open_message(1, 7, 32)))
        raw[4:8] = b"\xff" * 4
        assert guest.post_bytes(bytes(raw).ljust(240, b"\xee")) == 0
        (reply,) = await guest.receive()
        assert guest.parse(reply).status == 0


async def test_row_33_no_flag_before_the_result_of_the_opening():
    """UEFI resets the machine at a flag for a channel that it has not opened."""
    device = EchoDevice(1)

    async def at_once(primary: Channel) -> None:
        for _ in range(3):
            primary.send(bytes(8))
            await primary.flush()

    device.on_run = at_once
    async with world(device) as there:
        guest = await ready(there)
        await guest.post(*guest.gpadl(1, 7, range(RAW_RING_PFN, RAW_RING_PFN + 8)))
        # Replies ahead of the result keep the slot taken for a while.
        for _ in range(4):
            guest.post_bytes(guest.build(m.GpadlTeardown(relid=1, gpadl=99)))
        there.transport.trail.clear()
        replies = await guest.post(guest.open_message(1, 7, 4))
        assert numbers(replies) == [12] * 4 + [6]
        await there.settle()
        kinds = [kind for kind, _ in there.transport.trail]
        assert "flag" in kinds
        last = max(index for index, kind in enumerate(kinds) if kind == "message")
        assert kinds.index("flag") > last


# --- The machine --------------------------------------------------------------------------------


async def test_row_35_the_synic_is_what_firmware_expects_out_of_reset():
    async with world(EchoDevice(1)) as there:
        machine = there.machine
        assert machine.read_msr(0, Msr.SCONTROL) & 1
        for index in range(8):
            machine.write_msr(0, 0x400000B0 + index, 0)
        for sint in range(16):
            machine.write_msr(0, Msr.SINT0 + sint, 1 << 16)
        async with there.boot(UEFI) as guest:
            await guest.connection.connect()
        await there.transport.reset()
        assert machine.read_msr(0, Msr.SCONTROL) & 1
        async with there.boot(UEFI) as guest:
            await guest.connection.connect()


async def test_row_37_cpuid_makes_no_guest_turn_away():
    async with world(EchoDevice(1, monitor=1000)) as there:
        leaf = there.machine.cpuid(CpuidLeaf.FEATURES)
        assert not leaf[1] & 1 << 12
        assert leaf[0] & 0x60 == 0x60
        assert there.machine.cpuid(CpuidLeaf.INTERFACE)[0] == int.from_bytes(b"Hv#1", "little")
        for name in ALL:
            await there.transport.reset()
            async with there.boot(PERSONALITIES[name]) as guest:
                assert len(await guest.connection.connect()) == 1


async def test_row_39_offers_keep_their_order_and_guids_from_life_to_life():
    devices = [EchoDevice(n) for n in (5, 3, 9, 1)]
    async with world(*devices) as there:
        guest = RawGuest(there)
        first = [(offer.relid, offer.instance_id) for offer in await guest.connect()]
        assert [each for _, each in first] == [device.offer.instance_id for device in devices]
        for leave in (m.Unload(), None):
            if leave is not None:
                await guest.post(leave)
            else:
                await there.transport.reset()
                guest = RawGuest(there)
            again = [(offer.relid, offer.instance_id) for offer in await guest.connect()]
            assert again == first


async def test_row_39_a_server_that_starts_again_has_the_same_guids():
    setups = [DeviceSetup("storvsp", ("ram:1M",)), DeviceSetup("storvsp", ("ram:1M",))]
    seen = []
    for _ in range(2):
        made = await make_devices("vm", setups)
        seen.append([each.device.offer.instance_id for each in made])
        for each in made:
            await each.device.aclose()
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 2
