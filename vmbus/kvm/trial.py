"""A guest of some bytes, to see what KVM here is worth before a kernel is given to it.

That KVM can be opened says little: inside other virtual machines there are some in which a guest
stands still, or that interpret every instruction, so that a kernel has nothing to say for minutes.
This guest does what a kernel does first and most, in some steps, and says over a port when each is
done. It needs no server and no file.
"""

from __future__ import annotations

import dataclasses
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from vmbus.kvm import api
from vmbus.kvm.bzimage import CODE_SELECTOR, PAGE_TABLES_GPA, EntryState, write_tables
from vmbus.kvm.cpuid import processor_leaves
from vmbus.kvm.life import set_entry
from vmbus.kvm.outcome import End
from vmbus.kvm.vcpu import Vcpu
from vmbus.kvm.vm import Vm
from vmbus.memory import allocate_memory

CODE_GPA = 0x10000
IDT_GPA = 0x3000
STACK_TOP_GPA = 0x9000
TOUCHED_GPA = 0x100000
TOUCHED_PAGES = 3840
MEMORY_SIZE = TOUCHED_GPA + (TOUCHED_PAGES << 12)
COUNT = 50_000
REPEATS = 1000
TICKS = 10
STEP_PORT = 0x80
"""Where PCs tell how far they have come (POST codes); the value is the number of the step."""
DELAY_PORT = 0xED
"""Nobody is there; kernels write to it to let time pass."""
TIMER_VECTOR = 0x20

STEPS = (
    "run at all",
    f"count to {COUNT}",
    f"touch {TOUCHED_PAGES} pages",
    f"ask for CPUID {REPEATS} times",
    f"write to a port {REPEATS} times",
    f"take {TICKS} interrupts of a timer",
)
"""What the guest does, in the words of "it does not ..."."""


def _loop(count: int, body: str) -> str:
    """Return code that does something ``count`` times, counted in EDI."""
    inner = bytes.fromhex(body)
    back = (-(len(inner) + 4)) & 0xFF
    return (
        f"bf {count.to_bytes(4, 'little').hex()}"  # mov edi, count
        f"{body}"
        "ff cf"  # dec edi
        f"75 {back:02x}"  # jnz to the body
    )


def _done(step: int) -> str:
    return f"b0 {step:02x} e6 {STEP_PORT:02x}"  # mov al, step; out STEP_PORT, al


def _outputs(*writes: tuple[int, int]) -> str:
    """Return code that writes bytes to ports: ``mov al, value; out port, al`` each."""
    return "".join(f"b0 {value:02x} e6 {port:02x}" for port, value in writes)


_CODE = bytes.fromhex(
    _done(1)
    # 2: two instructions, which nobody but the processor has to do with.
    + _loop(COUNT, "")
    + _done(2)
    # 3: memory that nobody has used yet has to be found by the host, page by page.
    + f"be {TOUCHED_GPA.to_bytes(4, 'little').hex()}"  # mov esi, TOUCHED_GPA
    + _loop(
        TOUCHED_PAGES,
        "c6 06 01"  # mov byte [rsi], 1
        "81 c6 00 10 00 00",  # add esi, 4096
    )
    + _done(3)
    # 4: an exit that KVM deals with by itself.
    + _loop(
        REPEATS,
        "31 c0"  # xor eax, eax
        "0f a2",  # cpuid
    )
    + _done(4)
    # 5: an exit that comes to us.
    + _loop(REPEATS, f"e6 {DELAY_PORT:02x}")  # out DELAY_PORT, al
    + _done(5)
    # 6: the interrupt controller (8259A: ICW1 to ICW4, then all lines masked but the first), its
    # vectors from TIMER_VECTOR on; the timer (8254: channel 0, mode 2, 1193 of 1193182 Hz).
    + _outputs((0x20, 0x11), (0x21, TIMER_VECTOR), (0x21, 0x04), (0x21, 0x01), (0x21, 0xFE))
    + _outputs((0x43, 0x34), (0x40, 1193 & 0xFF), (0x40, 1193 >> 8))
    + f"bf {TICKS.to_bytes(4, 'little').hex()}"  # mov edi, TICKS
    + "fb"  # sti
    + "f4"  # wait: hlt
    + "85 ff"  # test edi, edi
    + "7f fb"  # jg wait
    + "fa"  # cli
    + _done(6)
    + "f4"  # end: hlt
    + "eb fd"  # jmp end
)
_ON_TIMER = bytes.fromhex(
    "ff cf"  # dec edi, which is what the guest waits for
    "50"  # push rax
    "b0 20 e6 20"  # mov al, 0x20; out 0x20, al: end of interrupt
    "58"  # pop rax
    "48 cf"  # iretq
)


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """What became of the guest."""

    seconds: tuple[float, ...]
    """How long each step took that it has done, of :data:`STEPS`."""
    problem: str = ""
    """What KVM says of its end, if it came to one before its last step."""

    @property
    def instructions(self) -> float | None:
        """How many per second, or None if the guest has not come so far."""
        return 2 * COUNT / max(self.seconds[1], 1e-9) if len(self.seconds) > 1 else None

    @property
    def exit_seconds(self) -> float | None:
        """How long a write to a port takes, or None if the guest has not come so far."""
        return self.seconds[4] / REPEATS if len(self.seconds) > 4 else None

    @property
    def complete(self) -> bool:
        """Whether the guest has done everything."""
        return len(self.seconds) == len(STEPS)


class _Platform:
    """What is around the guest; see :class:`vmbus.kvm.vcpu.Platform`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.last = clock()
        self.seconds: list[float] = []
        self.end: End | None = None
        self.over = threading.Event()

    def read_port(self, _vcpu: Vcpu, _port: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write_port(self, _vcpu: Vcpu, port: int, _size: int, value: int) -> None:
        if port == STEP_PORT and value == len(self.seconds) + 1:
            now = self._clock()
            self.seconds.append(now - self.last)
            self.last = now
            if len(self.seconds) == len(STEPS):
                self.over.set()

    def read_msr(self, _vcpu: Vcpu, _index: int) -> int:
        return 0

    def write_msr(self, _vcpu: Vcpu, _index: int, _value: int) -> None:
        return

    def synic_written(self, _vcpu: Vcpu, _msr: int, _control: int, _siefp: int, _simp: int) -> None:
        return

    def hypercall(self, _vcpu: Vcpu, _control: int, _first: int, _second: int) -> int:
        return 0

    def ended(self, end: End) -> None:
        self.end = end
        self.over.set()


def try_guest(
    patience: float,
    *,
    path: str = "/dev/kvm",
    call: api.Ioctl = api.ioctl,
    clock: Callable[[], float] = time.perf_counter,
) -> Trial:
    """Run the guest until it has done everything.

    :func:`vmbus.kvm.vcpu.ignore_kick_signal` must have been called.

    Args:
        patience: Seconds for all of it; it is stopped then.
        path: KVM's device.
        call: Makes ioctls.
        clock: Seconds.

    Raises:
        ConfigError: There is no usable KVM.
        OSError: It would not make a machine.
    """
    with ExitStack() as stack:
        memory = allocate_memory(MEMORY_SIZE)
        stack.callback(memory.close)
        write_tables(memory)
        memory.write(CODE_GPA, _CODE + _ON_TIMER)
        # A gate: the handler's address in three parts, the code segment, a present interrupt gate.
        handler = CODE_GPA + len(_CODE)
        gate = struct.pack("<HHHHII", handler & 0xFFFF, CODE_SELECTOR, 0x8E00, handler >> 16, 0, 0)
        memory.write(IDT_GPA + TIMER_VECTOR * len(gate), gate)
        vm = Vm(memory, path=path, call=call)
        stack.callback(vm.close)
        vm.create_interrupt_controllers()
        platform = _Platform(clock)
        vcpu = Vcpu(vm, 0, platform, call=call)
        stack.callback(vcpu.close)
        stack.callback(vcpu.join)
        stack.callback(vcpu.stop)
        supported = vm.cpuid(api.GET_SUPPORTED_CPUID)
        vcpu.set_cpuid(processor_leaves(supported, {}, 0, tsc_deadline=False))
        entry = EntryState(rip=CODE_GPA, rsi=0, rsp=STACK_TOP_GPA, cr3=PAGE_TABLES_GPA)
        set_entry(vcpu, entry, idt=(IDT_GPA, (TIMER_VECTOR + 1) * len(gate) - 1))
        platform.last = clock()
        vcpu.start()
        platform.over.wait(patience)
        end = platform.end
        return Trial(tuple(platform.seconds), "" if end is None else end.text)
