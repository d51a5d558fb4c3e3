"""How the Python guest programs its processors, takes interrupts and manages its RAM."""

from __future__ import annotations

import pytest
import trio

from tests.support.fake_host import RAM_BASE, Machine, message, offer
from vmbus.guest import (
    DPDK,
    FREEBSD,
    LINUX_6_1,
    MACOS,
    OPENBSD,
    UEFI,
    GuestPanic,
    boot,
)
from vmbus.guest.machine import Interrupt
from vmbus.guest.ram import Ram
from vmbus.wire.synic import Msr


async def started(personality, **changes):
    machine = Machine(vps=2)
    for name, value in changes.items():
        setattr(machine, name, value)
    async with boot(machine, personality):
        pass
    return machine


async def test_linux_programs_all_vps_and_takes_them_down_again():
    machine = await started(LINUX_6_1)
    indexes = [index for vp, index, _ in machine.msr_log if vp == 1]
    assert indexes[:5] == [
        Msr.VP_ASSIST_PAGE,
        Msr.SIMP,
        Msr.SIEFP,
        Msr.SINT2,
        Msr.SCONTROL,
    ]
    first = next(value for _, index, value in machine.msr_log if index == Msr.SINT2)
    assert first == 0xF3 | 1 << 17
    assert machine.msrs[1, Msr.SINT2] == 0xF3 | 1 << 16
    assert machine.msrs[0, Msr.GUEST_OS_ID] == machine.msrs[0, Msr.HYPERCALL] == 0


async def test_auto_eoi_follows_the_personality_and_its_deprecation():
    leaves = Machine().leaves | {0x40000004: (1 << 9, 0, 0, 0)}
    for personality, changed, expected in (
        (LINUX_6_1, True, 0),
        (FREEBSD, True, 1 << 17),
        (MACOS, False, 0),
    ):
        machine = await started(personality, **({"leaves": leaves} if changed else {}))
        value = next(value for _, index, value in machine.msr_log if index == Msr.SINT2)
        assert value & 1 << 17 == expected


async def test_freebsd_programs_the_timer_sint_too():
    machine = await started(FREEBSD)
    assert (1, Msr.SINT0 + 4, 0x61 | 1 << 17) in machine.msr_log


async def test_openbsd_uses_the_boot_processor_only():
    machine = await started(OPENBSD)
    assert {vp for vp, _, _ in machine.msr_log} == {0}


async def test_uefi_never_writes_scontrol_and_masks_all_sints_with_vector_0():
    """Checklist row 35."""
    machine = await started(UEFI)
    written = {index for _, index, _ in machine.msr_log}
    assert Msr.SCONTROL not in written
    assert {Msr.STIMER0_CONFIG + n for n in range(8)} <= written
    assert all(machine.msrs[0, Msr.SINT0 + n] == 1 << 16 for n in range(16))


@pytest.mark.parametrize(
    ("personality", "leaf", "value", "reason"),
    [
        (LINUX_6_1, 1, (0, 0, 0, 0), "hypervisor bit"),
        (LINUX_6_1, 0x40000000, (0x40000005, 1, 2, 3), "Microsoft Hv"),
        (LINUX_6_1, 0x40000003, (0x20, 0, 0, 0), "EAX lacks 0x40"),
        (LINUX_6_1, 0x40000003, (0x6E, 1 << 12, 0, 0), "root partition"),
        (FREEBSD, 0x40000001, (0, 0, 0, 0), "Hv#1"),
        (UEFI, 0x40000003, (0x62, 0, 0, 0), "EAX lacks 0xc"),
    ],
)
async def test_a_wrong_cpuid_leaf_stops_the_boot(personality, leaf, value, reason):
    """Checklist row 37."""
    leaves = Machine().leaves | {leaf: value}
    with pytest.raises(GuestPanic, match=reason):
        await started(personality, leaves=leaves)


async def test_a_low_highest_leaf_stops_the_boot():
    leaves = Machine().leaves
    low = (0x40000003, *leaves[0x40000000][1:])
    with pytest.raises(GuestPanic, match="highest leaf"):
        await started(LINUX_6_1, leaves=leaves | {0x40000000: low})


async def test_a_hypercall_page_that_stays_off_or_empty_stops_the_boot():
    with pytest.raises(GuestPanic, match="could not be enabled"):
        await started(LINUX_6_1, refuse_page=True)
    with pytest.raises(GuestPanic, match="no code"):
        await started(UEFI, no_code=True)


@pytest.mark.parametrize(
    ("personality", "index", "value", "reason"),
    [
        (UEFI, Msr.SCONTROL, 0, "reset disabled"),
        (LINUX_6_1, Msr.SIMP, 1, "before anybody"),
        (LINUX_6_1, Msr.VP_INDEX, 5, "VP_INDEX of VP 0 is 5"),
    ],
)
async def test_registers_have_to_come_out_of_reset_right(personality, index, value, reason):
    machine = Machine()
    machine.msrs[0, index] = value
    with pytest.raises(GuestPanic, match=reason):
        async with boot(machine, personality):
            pass


async def test_messages_wait_in_line_for_the_slot_and_eom():
    """Checklist row 2."""
    machine = Machine()
    machine.host.offers = [offer(relid) for relid in range(1, 101)]
    async with boot(machine, LINUX_6_1) as guest:
        assert len(await guest.connection.connect()) == 100
    eoms = [value for _, index, value in machine.msr_log if index == Msr.EOM]
    assert len(eoms) == 100  # not for the contact's answer, nor for the last message


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda machine: machine.queues[0].append(bytes(241)) or machine.pump(0), "241 bytes"),
        (lambda machine: machine.queues[0].append(b"") or machine.pump(0, 0x80000010), "type 0x8"),
        (lambda machine: machine.deliver(message(4), vp=1), "on VP 1 instead of 0"),
        (lambda machine: machine.pending.add(Interrupt(0, 0x20)) or machine.event.set(), "0x20"),
    ],
)
async def test_a_broken_delivery_crashes_the_guest(prepare, reason):
    machine = Machine(vps=2)
    with pytest.raises(GuestPanic, match=reason):
        async with boot(machine, LINUX_6_1):
            prepare(machine)
            await trio.sleep_forever()


async def test_an_interrupt_of_another_sint_of_its_own_is_none_of_its_business():
    machine = Machine()
    async with boot(machine, FREEBSD):
        machine.interrupt(sint=4)
        await trio.testing.wait_all_tasks_blocked()
        assert not machine.pending


async def test_uefi_does_not_stand_a_flag_of_a_channel_that_is_not_open():
    """Checklist row 33."""
    machine = Machine()
    machine.host.offers = [offer(1)]
    with pytest.raises(GuestPanic, match="event flag 1: the channel is not open"):
        async with boot(machine, UEFI) as guest:
            await guest.connection.connect()
            machine.set_flag(1)
            await trio.sleep_forever()


async def test_a_flag_just_after_closing_is_tolerated():
    for personality in (UEFI, LINUX_6_1):
        machine = Machine()
        machine.host.offers = [offer(1)]
        async with boot(machine, personality) as guest:
            (found,) = await guest.connection.connect()
            channel = await guest.connection.open_channel(found, ring_pages=2)
            await guest.connection.close_channel(channel)
            machine.set_flag(1)
            await trio.testing.wait_all_tasks_blocked()
            assert guest.connection.spurious_flags == 1


async def test_a_flag_before_the_open_result_is_served_except_by_uefi():
    for personality in (LINUX_6_1, UEFI):
        machine = Machine()
        host = machine.host
        host.offers = [offer(1)]

        def hasty(item, host=host) -> None:
            host.open(item).send(6, b"too early")
            host.machine.host.handlers.clear()

        host.handlers["OPENCHANNEL"] = hasty
        seen: list[object] = []
        async with trio.open_nursery() as nursery:

            async def run(personality=personality, machine=machine, seen=seen) -> None:
                try:
                    async with boot(machine, personality) as guest:
                        (found,) = await guest.connection.connect()
                        await guest.connection.open_channel(
                            found, ring_pages=2, on_packet=seen.append
                        )
                except GuestPanic as panic:
                    seen.append(panic)

            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert isinstance(seen[0], GuestPanic) == (personality is UEFI)


async def test_a_flag_on_the_wrong_vp_crashes_the_guest():
    machine = Machine(vps=2)
    machine.host.offers = [offer(1)]
    with pytest.raises(GuestPanic, match="event flag 1 on VP 1 instead of 0"):
        async with boot(machine, LINUX_6_1) as guest:
            (found,) = await guest.connection.connect()
            await guest.connection.open_channel(found, ring_pages=2)
            machine.set_flag(1, vp=1)
            await trio.sleep_forever()


async def test_shared_flags_make_the_guest_look_at_their_neighbours():
    machine = Machine()
    machine.flags_are_shared = True
    host = machine.host
    host.offers = [offer(1), offer(2), offer(3)]
    async with boot(machine, LINUX_6_1) as guest:
        offers = await guest.connection.connect()
        opened = [await guest.connection.open_channel(o, ring_pages=2) for o in offers]
        for relid in (1, 2):
            host.channels[relid].mute = True
            host.channels[relid].send(6, b"hello...")
        machine.set_flag(1)  # that of 2 was lost between reading and clearing
        for channel in opened[:2]:
            (packet,) = await channel.receive_batch()
            assert packet.payload == b"hello..."
        assert opened[2].interrupts == 0


async def test_dpdk_polls_and_keeps_interrupts_masked():
    machine = Machine()
    host = machine.host
    host.offers = [offer(1, monitor_allocated=True)]
    async with boot(machine, DPDK) as guest:
        (found,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(found, ring_pages=4)
        assert channel.polled
        assert host.channels[1].outgoing.words[2] == 1
        host.channels[1].send(6, b"polled..")
        (packet,) = await channel.receive_batch()
        assert packet.payload == b"polled.."


async def test_other_failures_leave_the_guest_as_they_are():
    with pytest.raises(ExceptionGroup) as caught:
        async with boot(Machine(), LINUX_6_1):
            raise KeyError("mine")
    assert isinstance(caught.value.exceptions[0], KeyError)


async def test_a_panic_comes_alone_with_its_consequences_as_the_cause():
    with pytest.raises(GuestPanic, match="mine") as caught:
        async with boot(Machine(), LINUX_6_1) as guest, trio.open_nursery() as nursery:
            nursery.start_soon(fail, KeyError("consequence"))
            nursery.start_soon(fail, GuestPanic(guest.personality.name, "mine"))
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    with pytest.raises(BaseExceptionGroup) as group:
        async with boot(Machine(), LINUX_6_1) as guest, trio.open_nursery() as nursery:
            nursery.start_soon(fail, SystemExit())
            nursery.start_soon(fail, GuestPanic(guest.personality.name, "mine"))
    assert group.group_contains(SystemExit)


async def fail(error: BaseException) -> None:
    raise error


def test_ram_gives_pages_in_a_row_or_scattered_and_never_twice():
    ram = Ram(Machine(pages=16))
    base = RAM_BASE // 4096
    assert ram.allocate(3) == [base, base + 1, base + 2]
    # Only 5 pages are left before the next region begins: no run crosses into it.
    assert ram.allocate(6) == list(range(base + 8, base + 14))
    scattered = ram.allocate(7, contiguous=False)
    assert sorted(scattered) == [*range(base + 3, base + 8), base + 14, base + 15]
    assert ram.free_pages == 0
    for contiguous in (True, False):
        with pytest.raises(MemoryError):
            ram.allocate(1, contiguous=contiguous)
    ram.free(scattered[:1])
    assert ram.allocate(1) == scattered[:1]


def test_ram_views_join_pages_in_a_row_inside_a_region():
    ram = Ram(Machine(pages=16))
    base = RAM_BASE // 4096
    sizes = [len(view) for view in ram.views([base + 1, base + 6, base + 7, base + 8, base + 2])]
    assert sizes == [4096, 8192, 4096, 4096]


def test_ram_notices_writes_to_memory_that_was_given_back():
    """Checklist row 7."""
    machine = Machine(pages=8)
    ram = Ram(machine)
    pages = ram.allocate(8, contiguous=False)
    ram.free(pages, poison=True)
    assert ram.dirty_poison() == []
    ram.page(pages[2])[7] = 1
    assert ram.dirty_poison() == [pages[2]]
    ram.allocate(8, contiguous=False)
    assert ram.dirty_poison() == [pages[2]]


async def test_check_memory_crashes_the_guest_on_late_writes():
    """Checklist row 7."""
    machine = Machine()
    machine.host.offers = [offer(1)]
    with pytest.raises(GuestPanic, match="written to pages"):
        async with boot(machine, LINUX_6_1) as guest:
            (found,) = await guest.connection.connect()
            channel = await guest.connection.open_channel(found, ring_pages=2)
            theirs = machine.host.channels[1]
            await guest.connection.close_channel(channel)
            theirs.outgoing.words[0] = 8
            guest.check_memory()
