"""The guest's processors: CPUID checks, the SynIC's registers and pages, hypercalls.

Every personality brings its interrupt controller up in its own way: which MSRs it reads first,
which SINTs it programs, whether it writes SCONTROL at all. Sources: linux/drivers/hv/hv.c,
linux/arch/x86/hyperv/hv_init.c, freebsd/sys/dev/hyperv/vmbus/x86/vmbus_x86.c,
openbsd/sys/dev/pv/hyperv.c, mu_msvm/MsvmPkg/SynicDxe.
"""

from __future__ import annotations

import trio

from vmbus.guest.machine import Machine, Panic
from vmbus.guest.personality import AutoEoi, Personality
from vmbus.guest.ram import Ram
from vmbus.guest.ring import fence
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.messages import MESSAGE_TYPE_VMBUS
from vmbus.wire.synic import (
    EVENT_FLAGS_SIZE,
    FLAG_PENDING,
    FLAGS_OFFSET,
    HYPERVISOR_PRESENT,
    INTERFACE_HV1,
    MAX_PAYLOAD,
    MESSAGE_NONE,
    MESSAGE_SIZE,
    PAYLOAD_OFFSET,
    SCONTROL_ENABLE,
    SIGNAL_EVENT_SIZE,
    SINT_AUTO_EOI,
    SINT_COUNT,
    SINT_MASKED,
    SIZE_OFFSET,
    STIMER_MSR_COUNT,
    VENDOR_MICROSOFT,
    VMBUS_SINT,
    CpuidLeaf,
    HvStatus,
    HypercallCode,
    Msr,
    PartitionPrivilege,
    Recommendation,
    build_hypercall_input,
    build_post_message,
    build_signal_event,
    page_register,
)

_POST = build_hypercall_input(HypercallCode.POST_MESSAGE)
_SIGNAL = build_hypercall_input(HypercallCode.SIGNAL_EVENT)
_SIGNAL_FAST = build_hypercall_input(HypercallCode.SIGNAL_EVENT, fast=True)
_RETRIED = (HvStatus.INSUFFICIENT_MEMORY, HvStatus.INSUFFICIENT_BUFFERS)
_POST_TRIES = 100
"""linux/drivers/hv/connection.c: vmbus_post_msg; others try about as often."""
_SIGNAL_OFFSET = 8
_FLAGS = slice(VMBUS_SINT * EVENT_FLAGS_SIZE, (VMBUS_SINT + 1) * EVENT_FLAGS_SIZE)
_FLAG_WORDS = VMBUS_SINT * EVENT_FLAGS_SIZE // 4
_SLOT = VMBUS_SINT * MESSAGE_SIZE


class _Vp:
    """Pages of one VP: messages, event flags, hypercall input."""

    def __init__(self, ram: Ram, input_offset: int) -> None:
        self.pfns = ram.allocate(3)
        messages, flags, page = map(ram.page, self.pfns)
        self.messages = messages
        self.message_words = messages.cast("I")
        self.flags = flags[_FLAGS]
        self.flag_words = flags.cast("I")
        self.input = page[input_offset:]
        self.input_gpa = self.pfns[2] * PAGE_SIZE + input_offset


class Processors:
    """All VPs of a guest.

    Args:
        machine: The hardware.
        personality: Whose habits to follow.
        ram: Gives the pages.
        panic: Called when the hardware or the host breaks a rule.
    """

    def __init__(self, machine: Machine, personality: Personality, ram: Ram, panic: Panic) -> None:
        self._machine = machine
        self._personality = personality
        self._ram = ram
        self._panic = panic
        self._vps: dict[int, _Vp] = {}

    @property
    def vps(self) -> list[int]:
        """VPs whose SynIC is programmed."""
        return list(self._vps)

    def start(self) -> None:
        """Check CPUID and program hypercalls and SynIC, as a booting kernel does. Cannot block.

        Raises:
            GuestPanic: The machine lacks something that the personality needs.
        """
        self._check_cpuid()
        machine, personality = self._machine, self._personality
        machine.write_msr(0, Msr.GUEST_OS_ID, personality.guest_os_id)
        (pfn,) = self._ram.allocate(1)
        value = machine.read_msr(0, Msr.HYPERCALL) & (PAGE_SIZE - 1)
        machine.write_msr(0, Msr.HYPERCALL, value | page_register(pfn * PAGE_SIZE))
        if not machine.read_msr(0, Msr.HYPERCALL) & 1:
            self._panic("HYPERCALL MSR: the page could not be enabled")
        if personality.checks_hypercall_page and not any(self._ram.page(pfn)[:3]):
            self._panic("hypercall page: begins with zeros, there is no code on it")
        for vp in range(machine.vp_count if personality.every_vp else 1):
            self._start_vp(vp)

    def _check_cpuid(self) -> None:
        personality = self._personality
        cpuid = self._machine.cpuid
        if not cpuid(1)[2] & HYPERVISOR_PRESENT:
            self._panic("CPUID 1: the hypervisor bit is not set")
        top, *vendor = cpuid(CpuidLeaf.VENDOR)
        if b"".join(part.to_bytes(4, "little") for part in vendor) != VENDOR_MICROSOFT:
            self._panic('CPUID 0x40000000: not "Microsoft Hv"')
        if not CpuidLeaf.LIMITS <= top <= 0x4000_FFFF:
            self._panic(f"CPUID 0x40000000: highest leaf {top:#x}")
        if personality.checks_interface and cpuid(CpuidLeaf.INTERFACE)[0] != INTERFACE_HV1:
            self._panic('CPUID 0x40000001: not "Hv#1"')
        privileges, partition, _, _ = cpuid(CpuidLeaf.FEATURES)
        missing = personality.privileges & ~privileges
        if missing:
            self._panic(f"CPUID 0x40000003: EAX lacks {missing:#x}")
        if personality.checks_root and partition & PartitionPrivilege.CPU_MANAGEMENT:
            self._panic("CPUID 0x40000003: CPU_MANAGEMENT is set, so this is the root partition")

    def _start_vp(self, vp: int) -> None:
        machine, personality = self._machine, self._personality
        pages = _Vp(self._ram, 0 if personality.page_aligned_input else 0x308)
        self._vps[vp] = pages
        if personality.vp_assist_page:
            (pfn,) = self._ram.allocate(1)
            machine.write_msr(vp, Msr.VP_ASSIST_PAGE, page_register(pfn * PAGE_SIZE))
        for index, pfn in ((Msr.SIMP, pages.pfns[0]), (Msr.SIEFP, pages.pfns[1])):
            if personality.reads_msrs_first and machine.read_msr(vp, index) & 1:
                self._panic(f"MSR {index:#x}: enabled before anybody has enabled it")
            machine.write_msr(vp, index, page_register(pfn * PAGE_SIZE))
        deprecated = machine.cpuid(CpuidLeaf.RECOMMENDATIONS)[0] & Recommendation.DEPRECATE_AUTO_EOI
        auto_eoi = personality.auto_eoi is AutoEoi.ALWAYS or (
            personality.auto_eoi is AutoEoi.UNLESS_DEPRECATED and not deprecated
        )
        for sint in (VMBUS_SINT, *personality.extra_sints):
            if personality.reads_msrs_first:
                machine.read_msr(vp, Msr.SINT0 + sint)
            vector = personality.vector + (sint != VMBUS_SINT)
            machine.write_msr(vp, Msr.SINT0 + sint, vector | (SINT_AUTO_EOI if auto_eoi else 0))
        if personality.writes_scontrol:
            control = machine.read_msr(vp, Msr.SCONTROL) if personality.reads_msrs_first else 0
            machine.write_msr(vp, Msr.SCONTROL, control | SCONTROL_ENABLE)
        elif not machine.read_msr(vp, Msr.SCONTROL) & SCONTROL_ENABLE:
            self._panic("SCONTROL: the SynIC has come out of reset disabled")
        if machine.read_msr(vp, Msr.VP_INDEX) != vp:
            self._panic(f"VP_INDEX of VP {vp} is {machine.read_msr(vp, Msr.VP_INDEX)}")

    def stop(self) -> None:
        """Take the SynIC down and give up hypercalls, as before kexec. Cannot block."""
        machine, personality = self._machine, self._personality
        for vp in self._vps:
            sints = (VMBUS_SINT, *personality.extra_sints)
            if personality.clears_timers:
                sints = tuple(range(SINT_COUNT))
                for index in range(STIMER_MSR_COUNT):
                    machine.write_msr(vp, Msr.STIMER0_CONFIG + index, 0)
            for sint in sints:
                vector = 0 if personality.clears_timers else personality.vector
                machine.write_msr(vp, Msr.SINT0 + sint, SINT_MASKED | vector)
            machine.write_msr(vp, Msr.SIMP, 0)
            machine.write_msr(vp, Msr.SIEFP, 0)
            if personality.writes_scontrol:
                machine.write_msr(vp, Msr.SCONTROL, 0)
            if personality.vp_assist_page:
                machine.write_msr(vp, Msr.VP_ASSIST_PAGE, 0)
        machine.write_msr(0, Msr.HYPERCALL, 0)
        machine.write_msr(0, Msr.GUEST_OS_ID, 0)

    async def post(self, connection_id: int, payload: bytes, *, vp: int = 0) -> int:
        """Post a control message by HvPostMessage, again and again if the host has no room.

        Args:
            connection_id: Where to.
            payload: At most 240 bytes.
            vp: Which VP does it.

        Returns:
            The hypercall's status; not one of those that mean "try again", unless it was given
            100 times.
        """
        page = self._vps[vp]
        status = 0
        for attempt in range(_POST_TRIES):
            data = build_post_message(connection_id, MESSAGE_TYPE_VMBUS, payload)
            page.input[: len(data)] = data
            status = await self._machine.hypercall(vp, _POST, page.input_gpa, 0) & 0xFFFF
            if status not in _RETRIED:
                break
            await trio.sleep(min(1e-6 * 2**attempt, 0.002))
        return status

    async def signal(self, connection_id: int, flag: int = 0, *, vp: int = 0) -> None:
        """Ring a doorbell by HvSignalEvent, in the form the personality uses.

        Raises:
            GuestPanic: The host does not know the connection id.
        """
        data = build_signal_event(connection_id, flag)
        if self._personality.register_signals:
            value = int.from_bytes(data, "little")
            result = await self._machine.hypercall(vp, _SIGNAL_FAST, value, 0)
        else:
            page = self._vps[vp]
            page.input[_SIGNAL_OFFSET : _SIGNAL_OFFSET + SIGNAL_EVENT_SIZE] = data
            result = await self._machine.hypercall(vp, _SIGNAL, page.input_gpa + _SIGNAL_OFFSET, 0)
        if result & 0xFFFF:
            self._panic(f"HvSignalEvent({connection_id:#x}): status {result & 0xFFFF}")

    def take_message(self, vp: int) -> bytes | None:
        """Take the message out of the VP's slot, if there is one. Cannot block.

        The slot is freed first; EOM is written only if the host has said that another message
        waits, as real guests do.

        Raises:
            GuestPanic: Not a VMBus message, or longer than a slot.
        """
        page = self._vps[vp]
        kind = page.message_words[_SLOT // 4]
        if kind == MESSAGE_NONE:
            return None
        size = page.messages[_SLOT + SIZE_OFFSET]
        if kind != MESSAGE_TYPE_VMBUS:
            self._panic(f"message slot: type {kind:#x} instead of 1")
        if size > MAX_PAYLOAD:
            self._panic(f"message slot: payload of {size} bytes")
        start = _SLOT + PAYLOAD_OFFSET
        payload = bytes(page.messages[start : start + size])
        page.message_words[_SLOT // 4] = MESSAGE_NONE
        fence()
        if page.messages[_SLOT + FLAGS_OFFSET] & FLAG_PENDING:
            self._machine.write_msr(vp, Msr.EOM, 0)
        return payload

    def take_flags(self, vp: int) -> list[int]:
        """Take all event flags of the VP, in order. Cannot block."""
        page = self._vps[vp]
        bits = int.from_bytes(page.flags, "little")
        found = []
        while bits:
            lowest = bits & -bits
            flag = lowest.bit_length() - 1
            bits ^= lowest
            page.flag_words[_FLAG_WORDS + flag // 32] = 0
            found.append(flag)
        if found:
            fence()
        return found
