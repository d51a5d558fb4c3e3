"""A synthetic interrupt controller (SynIC) and its two hypercalls, for VMMs without one.

:class:`Synic` is one partition's model, sans-I/O: a VMM hands it the guest's MSR accesses
(:meth:`~Synic.read_msr`, :meth:`~Synic.write_msr`) and hypercalls (:meth:`~Synic.hypercall`), the
host side hands it messages and event flags, and it calls back with interrupts. It may be used from
any number of threads, one per VP as a rule; callbacks run in the thread that made the call, with
no lock held.

The message slot protocol (TLFS 11.8; linux/drivers/hv/vmbus_drv.c, ``vmbus_signal_eom``): the host
writes a slot only while its type is 0, payload first and type last. The guest takes a message by
storing type 0, *then* looks at the pending flag and writes EOM if it is set. A host that finds the
slot taken sets the flag and *then* looks at the type again. Whichever comes first, one of them
sees the other: a slot that becomes free while somebody waits is never missed.

Event flags are set by a plain byte read-modify-write, which Python cannot make atomic against the
guest. That is enough: the guest only ever clears flags, with locked instructions, and all setters
of this partition hold the VP's lock. If a clear falls between our load and our store, the store
sets the flag again, which the guest sees as one event too many; drivers live with that. The flag
we set cannot get lost, because nothing but a later clear removes it. The price is that the old
value tells nothing: every set interrupts, not only that from 0 to 1.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeGuard

from vmbus.errors import ConfigError, GuestProtocolError, LocalProtocolError
from vmbus.memory import GuestMemory, full_fence
from vmbus.synic.msrs import (
    HYPERCALL_VMCALL,
    HYPERCALL_VMMCALL,
    EndOfMessage,
    Features,
    MsrError,
    RegisterFile,
    SintUnmasked,
    VpRegisters,
    cpuid_leaves,
)
from vmbus.wire import synic as wire
from vmbus.wire.synic import HvStatus

__all__ = [
    "HYPERCALL_VMCALL",
    "HYPERCALL_VMMCALL",
    "Delivery",
    "Features",
    "MsrError",
    "Synic",
    "SynicPorts",
    "check_message",
    "cpuid_leaves",
]

STATE_VERSION: Final = 1
_WORDS_PER_SLOT: Final = wire.MESSAGE_SIZE // 4


class Delivery(enum.Enum):
    """What became of a message."""

    DELIVERED = "delivered"
    """It is in its slot and the guest has been interrupted (or will be, once it unmasks)."""
    BUSY = "busy"
    """The slot is taken; the guest writes EOM when it has freed it."""
    DROPPED = "dropped"
    """There is no such slot: SynIC or SIM page are off, or no such VP. Trying again is no use."""


class SynicPorts(Protocol):
    """Where a guest's hypercalls go. Called in the VP's thread: must not block, must not raise."""

    def post_message(
        self, connection_id: int, message_type: int, vp: int, payload: bytes
    ) -> HvStatus:
        """Take a message of up to 240 bytes.

        Returns:
            SUCCESS; INVALID_CONNECTION_ID if there is no such port; INVALID_PORT_ID if it is one
            for events; INSUFFICIENT_BUFFERS if the guest shall try again later.
        """

    def signal_event(self, connection_id: int, flag: int) -> HvStatus:
        """Take a doorbell.

        Returns:
            SUCCESS; INVALID_CONNECTION_ID if there is no such port; INVALID_PORT_ID if it is one
            for messages; INVALID_PARAMETER if the port has no such flag.
        """


class _NoPorts:
    """Ports of a partition to which no host is attached."""

    def post_message(
        self, connection_id: int, message_type: int, vp: int, payload: bytes
    ) -> HvStatus:
        return HvStatus.INVALID_CONNECTION_ID

    def signal_event(self, connection_id: int, flag: int) -> HvStatus:
        return HvStatus.INVALID_CONNECTION_ID


def _ignore(*_args: object) -> None:
    """A callback nobody asked for."""


class Synic:
    """The SynIC and hypercall model of one partition.

    Args:
        memory: The guest's memory.
        vp_count: Number of VPs; indices are ``0 .. vp_count - 1``.
        interrupt: Called with ``(vp, vector)`` to inject one edge-triggered interrupt. It must not
            block. AutoEOI is not done here: see :attr:`Features.deprecate_auto_eoi`.
        features: Which optional MSRs exist; the same value goes to :func:`cpuid_leaves`.
        hypercall_code: Instructions at the start of the hypercall page.
        clock: Partition reference time in 100 ns ticks, with ``features.reference_time`` only.

    Attributes:
        ports: Where hypercalls go; may be replaced at any time.
        slot_free: Called with ``vp`` when the guest writes EOM: messages that found a slot of this
            VP busy should be tried again.
        crashed: Called with ``(vp, parameters, control)`` when the guest reports its crash.

    Raises:
        ConfigError: The arguments do not fit together.
    """

    def __init__(
        self,
        memory: GuestMemory,
        vp_count: int,
        interrupt: Callable[[int, int], None],
        *,
        features: Features | None = None,
        hypercall_code: bytes = HYPERCALL_VMCALL,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self.memory = memory
        self.vp_count = vp_count
        self.features = features or Features()
        self.registers = RegisterFile(
            memory,
            vp_count,
            features=self.features,
            hypercall_code=hypercall_code,
            clock=clock,
        )
        self.ports: SynicPorts = _NoPorts()
        self.slot_free: Callable[[int], None] = _ignore
        self.crashed: Callable[[int, tuple[int, ...], int], None] = _ignore
        self._interrupt = interrupt

    def cpuid_leaves(self) -> dict[int, tuple[int, int, int, int]]:
        """Return the hypervisor CPUID leaves, ``leaf -> (eax, ebx, ecx, edx)``."""
        return cpuid_leaves(self.features, self.vp_count)

    # ------------------------------------------------------------------------ guest to host

    def read_msr(self, vp: int, index: int) -> int:
        """Do a guest's RDMSR.

        Args:
            vp: VP index, the VMM's own.
            index: MSR number, chosen by the guest.

        Returns:
            64 bits.

        Raises:
            MsrError: The VMM must inject #GP.
        """
        return self.registers.read(vp, index)

    def write_msr(self, vp: int, index: int, value: int) -> None:
        """Do a guest's WRMSR. May call ``interrupt``, :attr:`slot_free` or :attr:`crashed`.

        Args:
            vp: VP index, the VMM's own.
            index: MSR number, chosen by the guest.
            value: 64 bits, chosen by the guest.

        Raises:
            MsrError: The VMM must inject #GP; nothing has changed.
        """
        effect = self.registers.write(vp, index, value)
        if effect is None:
            return
        if isinstance(effect, EndOfMessage):
            self.slot_free(vp)
        elif isinstance(effect, SintUnmasked):
            self._interrupt(vp, effect.vector)
        else:
            self.crashed(vp, effect.parameters, effect.control)

    def hypercall(self, vp: int, input_value: int, rdx: int, r8: int = 0) -> int:
        """Do a guest's hypercall (TLFS 3.6, 11.11). Never raises, whatever the registers hold.

        Not checked is what a processor would check: privilege level, and that the call comes from
        the hypercall page; see :attr:`hypercall_enabled`.

        Args:
            vp: VP index, the VMM's own.
            input_value: RCX, the control word.
            rdx: Input GPA, or the parameters themselves.
            r8: Output GPA, or more parameters; neither call here uses it.

        Returns:
            The value for RAX: a status in bits 15:0.
        """
        code = input_value & 0xFFFF
        if code not in (wire.HypercallCode.POST_MESSAGE, wire.HypercallCode.SIGNAL_EVENT):
            return HvStatus.INVALID_HYPERCALL_CODE
        try:
            control = wire.parse_hypercall_input_untrusted(input_value)
        except GuestProtocolError:
            return HvStatus.INVALID_HYPERCALL_INPUT
        if control.variable_header or control.rep_count or control.rep_start:
            return HvStatus.INVALID_HYPERCALL_INPUT
        if code == wire.HypercallCode.POST_MESSAGE:
            if control.fast:
                return HvStatus.INVALID_HYPERCALL_INPUT
            return self._post_message(vp, rdx)
        return self._signal_event(rdx, fast=control.fast)

    @property
    def hypercall_enabled(self) -> bool:
        """Whether the hypercall page is in use; if not, a hypercall is an invalid instruction."""
        return bool(self.registers.hypercall & wire.PAGE_ENABLE)

    def _post_message(self, vp: int, gpa: int) -> HvStatus:
        data = self._read_input(gpa, wire.POST_MESSAGE_SIZE)
        if data is None:
            return HvStatus.INVALID_ALIGNMENT
        try:
            message = wire.parse_post_message_untrusted(data)
        except GuestProtocolError:
            return HvStatus.INVALID_PARAMETER
        return self.ports.post_message(
            message.connection_id, message.message_type, vp, message.payload
        )

    def _signal_event(self, rdx: int, *, fast: bool) -> HvStatus:
        data: bytes | None
        if fast:
            data = (rdx & (1 << 64) - 1).to_bytes(wire.SIGNAL_EVENT_SIZE, "little")
        else:
            data = self._read_input(rdx, wire.SIGNAL_EVENT_SIZE)
        if data is None:
            return HvStatus.INVALID_ALIGNMENT
        event = wire.parse_signal_event_untrusted(data)
        return self.ports.signal_event(event.connection_id, event.flag)

    def _read_input(self, gpa: int, size: int) -> bytes | None:
        """Copy a memory input; None if it is misaligned, crosses a page or is not memory."""
        if gpa % 8 or gpa % wire.PAGE_SIZE + size > wire.PAGE_SIZE:
            return None
        try:
            return self.memory.read(gpa, size)
        except GuestProtocolError:
            return None

    # ------------------------------------------------------------------------ host to guest

    def deliver_message(self, vp: int, sint: int, message_type: int, payload: bytes) -> Delivery:
        """Put a message into its slot, if that is free, and interrupt the VP.

        A masked SINT takes the message; its interrupt follows when the guest unmasks it.

        Args:
            vp: VP index; guests choose it, so it need not exist.
            sint: 0 to 15; likewise.
            message_type: Not 0.
            payload: At most 240 bytes.

        Raises:
            LocalProtocolError: ``message_type`` or ``payload`` cannot be sent.
        """
        check_message(message_type, payload)
        registers = self._find(vp, sint)
        if registers is None:
            return Delivery.DROPPED
        with registers.lock:
            page = self._page(registers, registers.simp)
            if page is None:
                return Delivery.DROPPED
            words = page.cast("I")
            type_word = sint * _WORDS_PER_SLOT
            start = sint * wire.MESSAGE_SIZE
            if words[type_word] != wire.MESSAGE_NONE:
                page[start + wire.FLAGS_OFFSET] |= wire.FLAG_PENDING
                full_fence()
                if words[type_word] != wire.MESSAGE_NONE:
                    return Delivery.BUSY
            at = start + wire.PAYLOAD_OFFSET
            page[at : at + len(payload)] = payload
            page[start + wire.SIZE_OFFSET : at] = wire.MESSAGE_TAIL.pack(len(payload), 0, 0, 0)
            words[type_word] = message_type
            if registers.masked(sint):
                registers.lost |= 1 << sint
                return Delivery.DELIVERED
            vector = registers.vector(sint)
        if vector is not None:
            self._interrupt(vp, vector)
        return Delivery.DELIVERED

    def poll(self, vp: int, sint: int) -> bool:
        """Whether trying to deliver makes sense: the slot is free, or does not exist at all.

        For hosts that cannot see EOM, or do not want to rely on the guest writing it.
        """
        registers = self._find(vp, sint)
        if registers is None:
            return True
        with registers.lock:
            page = self._page(registers, registers.simp)
            return page is None or page.cast("I")[sint * _WORDS_PER_SLOT] == wire.MESSAGE_NONE

    def set_flag(self, vp: int, sint: int, flag: int) -> HvStatus:
        """Set an event flag and interrupt the VP.

        Args:
            vp: VP index; guests choose it, so it need not exist.
            sint: 0 to 15; likewise.
            flag: 0 to 2047.

        Returns:
            SUCCESS; INVALID_VP_INDEX; INVALID_PARAMETER for a SINT or flag that does not exist;
            INVALID_SYNIC_STATE if SynIC or SIEF page are off or the SINT is masked. In all cases
            but the first, guest memory is untouched: a guest that masks may be on its way out,
            and its page somebody else's already.
        """
        if not 0 <= vp < self.vp_count:
            return HvStatus.INVALID_VP_INDEX
        registers = self._find(vp, sint)
        if registers is None or not 0 <= flag < wire.EVENT_FLAG_COUNT:
            return HvStatus.INVALID_PARAMETER
        with registers.lock:
            page = self._page(registers, registers.siefp)
            if page is None or registers.masked(sint):
                return HvStatus.INVALID_SYNIC_STATE
            byte, mask = wire.event_flag_position(sint, flag)
            page[byte] |= mask
            vector = registers.vector(sint)
        if vector is not None:
            self._interrupt(vp, vector)
        return HvStatus.SUCCESS

    def _find(self, vp: int, sint: int) -> VpRegisters | None:
        if 0 <= vp < self.vp_count and 0 <= sint < wire.SINT_COUNT:
            return self.registers.vps[vp]
        return None

    def _page(self, registers: VpRegisters, register: int) -> memoryview | None:
        """Return the page a register names, None if it is off or not memory any more."""
        if not registers.delivers(register):
            return None
        try:
            return self.memory.page(register >> wire.PAGE_SHIFT)
        except GuestProtocolError:
            return None

    # --------------------------------------------------------------------------- life cycle

    def reset(self) -> None:
        """Return to the power-on state. Guest memory is not touched; ports stay."""
        self.registers.reset()

    def state(self) -> dict[str, Any]:
        """Return everything to be saved, as plain ints, lists and dicts (JSON will do).

        All VPs must be stopped. The pages are guest memory and saved with it; the clock is the
        VMM's.
        """
        registers = self.registers
        return {
            "version": STATE_VERSION,
            "guest_os_id": registers.guest_os_id,
            "hypercall": registers.hypercall,
            "reference_tsc": registers.reference_tsc,
            "tsc_invariant": registers.tsc_invariant,
            "crash": list(registers.crash),
            "vps": [
                {
                    "scontrol": vp.scontrol,
                    "simp": vp.simp,
                    "siefp": vp.siefp,
                    "sints": list(vp.sints),
                    "stimers": list(vp.stimers),
                    "vp_assist": vp.vp_assist,
                    "lost": vp.lost,
                }
                for vp in registers.vps
            ],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned. All VPs must be stopped.

        Raises:
            ConfigError: It is not a state of a partition like this one; nothing has changed.
        """
        registers = self.registers
        _require(state, "version", lambda value: value == STATE_VERSION)
        for name in ("guest_os_id", "hypercall", "reference_tsc", "tsc_invariant"):
            _require(state, name, _is_u64)
        _require(state, "crash", lambda value: _is_u64_list(value, wire.CRASH_PARAMETER_COUNT))
        _require(state, "vps", lambda value: isinstance(value, list))
        if len(state["vps"]) != self.vp_count:
            raise ConfigError(f"SynIC state: {len(state['vps'])} VPs, not {self.vp_count}")
        for vp in state["vps"]:
            if not isinstance(vp, Mapping):
                raise ConfigError("SynIC state: 'vps' does not hold tables")
            for name in ("scontrol", "simp", "siefp", "vp_assist", "lost"):
                _require(vp, name, _is_u64)
            _require(vp, "sints", lambda value: _is_u64_list(value, wire.SINT_COUNT))
            _require(vp, "stimers", lambda value: _is_u64_list(value, wire.STIMER_MSR_COUNT))
        registers.guest_os_id = state["guest_os_id"]
        registers.hypercall = state["hypercall"]
        registers.reference_tsc = state["reference_tsc"]
        registers.tsc_invariant = state["tsc_invariant"]
        registers.crash = list(state["crash"])
        for target, source in zip(registers.vps, state["vps"], strict=True):
            target.scontrol = source["scontrol"]
            target.simp = source["simp"]
            target.siefp = source["siefp"]
            target.sints = list(source["sints"])
            target.stimers = list(source["stimers"])
            target.vp_assist = source["vp_assist"]
            target.lost = source["lost"]


def check_message(message_type: int, payload: bytes) -> None:
    """Raise LocalProtocolError unless a slot can hold this message."""
    if not 0 < message_type < 1 << 32 or len(payload) > wire.MAX_PAYLOAD:
        raise LocalProtocolError(
            f"message type {message_type:#x} with {len(payload)} bytes cannot be sent"
        )


def _is_u64(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value < 1 << 64


def _is_u64_list(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(map(_is_u64, value))


def _require(state: Mapping[str, Any], name: str, check: Callable[[object], bool]) -> None:
    if not check(state.get(name)):
        raise ConfigError(f"SynIC state: {name!r} is missing or not possible")
