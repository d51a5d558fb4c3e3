"""A tiny guest that drives a SynIC model by MSRs, hypercalls and its memory."""

from __future__ import annotations

from vmbus.memory import GuestMemory, allocate_memory, full_fence
from vmbus.synic import Features, Synic
from vmbus.wire import synic as wire
from vmbus.wire.synic import HypercallCode, Msr

SIMP = 0x1000
SIEFP = 0x2000
INPUT = 0x3000
CODE = 0x4000
PAGES = 16
"""Pages of memory of a small partition; each VP's SIM and SIEF pages are 0x8000 + 0x2000 * vp."""
VECTOR = 0xF3
SINT = 2


class Partition:
    """A SynIC with a record of what it called back."""

    def __init__(self, vp_count: int = 1, *, features: Features | None = None, **options) -> None:
        self.memory: GuestMemory = allocate_memory(PAGES * 4096)
        self.interrupts: list[tuple[int, int]] = []
        self.freed: list[int] = []
        self.crashes: list[tuple[int, tuple[int, ...], int]] = []
        self.synic = Synic(
            self.memory,
            vp_count,
            lambda vp, vector: self.interrupts.append((vp, vector)),
            features=features,
            **options,
        )
        self.synic.slot_free = self.freed.append
        self.synic.crashed = lambda *args: self.crashes.append(args)


class Guest:
    """One VP's driver: what hv_synic_enable_regs and vmbus_message do, in a few lines."""

    def __init__(self, synic: Synic, vp: int = 0, *, base: int = SIMP) -> None:
        self.synic = synic
        self.memory = synic.memory
        self.vp = vp
        self.simp = base
        self.siefp = base + 0x1000

    def enable(self, *, vector: int = VECTOR) -> Guest:
        self.synic.write_msr(self.vp, Msr.SIMP, wire.page_register(self.simp))
        self.synic.write_msr(self.vp, Msr.SIEFP, wire.page_register(self.siefp))
        self.synic.write_msr(self.vp, Msr.SINT2, vector)
        return self

    def slot(self, sint: int = SINT) -> wire.SlotMessage:
        page = self.memory.page(self.simp >> 12)
        return wire.parse_message_slot_untrusted(bytes(page[wire.message_slot(sint)]))

    def free(self, sint: int = SINT) -> bool:
        """Take the message out of its slot; returns whether the host wants an EOM."""
        page = self.memory.page(self.simp >> 12)
        words = page.cast("I")
        words[sint * 64] = wire.MESSAGE_NONE
        full_fence()
        return bool(page[sint * 256 + wire.FLAGS_OFFSET] & wire.FLAG_PENDING)

    def receive(self, sint: int = SINT) -> wire.SlotMessage | None:
        """Take one message, with EOM exactly if the host asks for it."""
        message = self.slot(sint)
        if message.message_type == wire.MESSAGE_NONE:
            return None
        if self.free(sint):
            self.synic.write_msr(self.vp, Msr.EOM, 0)
        return message

    def flags(self, sint: int = SINT) -> set[int]:
        """Return and clear the event flags."""
        start = self.siefp + sint * wire.EVENT_FLAGS_SIZE
        value = int.from_bytes(self.memory.read(start, wire.EVENT_FLAGS_SIZE), "little")
        self.memory.write(start, bytes(wire.EVENT_FLAGS_SIZE))
        return {flag for flag in range(wire.EVENT_FLAG_COUNT) if value >> flag & 1}

    def post(self, connection_id: int, payload: bytes, message_type: int = 1) -> int:
        data = wire.build_post_message(connection_id, message_type, payload)
        self.memory.write(INPUT, data)
        control = wire.build_hypercall_input(HypercallCode.POST_MESSAGE)
        return self.synic.hypercall(self.vp, control, INPUT, 0)

    def signal(self, connection_id: int, flag: int = 0, *, fast: bool = True) -> int:
        data = wire.build_signal_event(connection_id, flag)
        control = wire.build_hypercall_input(HypercallCode.SIGNAL_EVENT, fast=fast)
        rdx = int.from_bytes(data, "little")
        if not fast:
            self.memory.write(INPUT + 8, data)
            rdx = INPUT + 8
        return self.synic.hypercall(self.vp, control, rdx, 0)
