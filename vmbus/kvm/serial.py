"""A 16550A serial port: what the guest's console talks to.

Sources: PC16550D data sheet (National Semiconductor, 1995), the tests that guests make of it in
linux/drivers/tty/serial/8250/8250_port.c.

There is no line and no bit rate. A byte written is sent at once, so the transmitter is always
empty; received bytes wait outside of the FIFO as long as they have to, so nothing is ever overrun.
The other end minds the guest's RTS: what it sends before the guest has opened the port is kept,
and not thrown away by the FIFO resets of the guest's probing. It waits for OUT2 too, which lets
interrupts through: Linux' earlyprintk sets RTS and will never read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

# Registers, with the divisor latch closed.
DATA = 0
IER = 1
IIR_FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7
PORT_COUNT = 8

IER_RECEIVED = 0x01
IER_TRANSMITTER_EMPTY = 0x02
IER_LINE_STATUS = 0x04
IER_MODEM_STATUS = 0x08
IER_MASK = 0x0F

IIR_NONE = 0x01
IIR_MODEM_STATUS = 0x00
IIR_TRANSMITTER_EMPTY = 0x02
IIR_RECEIVED = 0x04
IIR_LINE_STATUS = 0x06
IIR_TIMEOUT = 0x0C
IIR_FIFOS = 0xC0

FCR_ENABLE = 0x01
FCR_CLEAR_RECEIVER = 0x02
TRIGGER_LEVELS = (1, 4, 8, 14)
"""Bytes, by bits 7:6 of FCR."""

LCR_DIVISOR_LATCH = 0x80

MCR_DTR = 0x01
MCR_RTS = 0x02
MCR_OUT1 = 0x04
MCR_OUT2 = 0x08
MCR_LOOP = 0x10
MCR_MASK = 0x1F

LSR_DATA_READY = 0x01
LSR_BREAK = 0x10
LSR_TRANSMITTER_EMPTY = 0x60
LSR_FIFO_ERROR = 0x80

MSR_TERI = 0x04
MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RI = 0x40
MSR_DCD = 0x80
MSR_PRESENT = MSR_CTS | MSR_DSR | MSR_DCD
"""The modem lines of a terminal that is switched on."""

FIFO_SIZE = 16
BATCH_SIZE = 64
"""Bytes kept back at most; see :meth:`Uart.flush`."""
BACKLOG_SIZE = 4096
"""Bytes that may wait for the guest, outside of the FIFO."""

_BREAK = 0x100


class Uart:
    """One serial port.

    Args:
        transmit: Takes what the guest sent, never empty; called on the vCPU's thread, must not
            block for long.
        interrupt: Takes the level of the interrupt line whenever it changes.
        drained: Called when the last waiting byte has gone into the guest's FIFO: after
            :meth:`receive` took less than all, that is the time to offer the rest.

    The callbacks are called with the port's lock held, from whichever thread caused them, and must
    not call back into the port.
    """

    width = 1

    def __init__(
        self,
        transmit: Callable[[bytes], None],
        interrupt: Callable[[bool], None],
        *,
        drained: Callable[[], None] | None = None,
    ) -> None:
        self._transmit = transmit
        self._interrupt = interrupt
        self._drained = drained
        # A vCPU reads registers while another thread brings input.
        self._lock = threading.Lock()
        self._line = False
        self._backlog: deque[int] = deque()
        self._batch = bytearray()
        self._clear()

    def _clear(self) -> None:
        self._ier = 0
        self._lcr = 0
        self._mcr = 0
        self._scr = 0
        self._divisor = 1
        self._fifo_enabled = False
        self._trigger = TRIGGER_LEVELS[0]
        self._fifo: deque[int] = deque()
        self._break_seen = False
        self._transmitter_pending = False
        self._modem_lines = MSR_PRESENT
        self._modem_delta = 0

    def reset(self) -> None:
        """Put all registers to their power-on values; input that waits outside is kept."""
        with self._lock:
            self._flush()
            self._clear()
            self._update()

    def flush(self) -> None:
        """Hand over what the guest sent and what is still kept back for a bigger batch.

        Output is handed over at a line's end, after 64 bytes, and as soon as the guest touches a
        register that it would leave alone while it has more to send (Linux turns an interrupt off
        or on again after each message). What polls LSR only and stops in the middle of a line
        needs this call, for example when the guest stops.
        """
        with self._lock:
            self._flush()

    def receive(self, data: bytes) -> int:
        """Send ``data`` to the guest. Returns how many bytes were taken; the rest is the caller's.

        At most ``BACKLOG_SIZE`` bytes wait; see ``drained``.
        """
        with self._lock:
            taken = data[: max(0, BACKLOG_SIZE - len(self._backlog))]
            self._backlog.extend(taken)
            self._update()
            return len(taken)

    def send_break(self) -> None:
        """Send a break condition (for Linux: the magic SysRq key), even if the backlog is full."""
        with self._lock:
            self._backlog.append(_BREAK)
            self._update()

    # -- the guest's side --------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return a register; ``size`` is 1."""
        assert size == 1
        with self._lock:
            value = self._read(offset)
            self._update()
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; ``size`` is 1."""
        assert size == 1
        with self._lock:
            self._write(offset, value)
            self._update()

    def _read(self, offset: int) -> int:
        latch = self._lcr & LCR_DIVISOR_LATCH
        if offset == DATA:
            return self._divisor & 0xFF if latch else self._take()
        if offset == IER:
            return self._divisor >> 8 if latch else self._ier
        if offset == IIR_FCR:
            cause = self._cause()
            if cause == IIR_TRANSMITTER_EMPTY:
                self._transmitter_pending = False
            return cause | (IIR_FIFOS if self._fifo_enabled else 0)
        if offset == LSR:
            return self._line_status()
        if offset == MSR:
            value = self._modem_lines | self._modem_delta
            self._modem_delta = 0
            return value
        return {LCR: self._lcr, MCR: self._mcr, SCR: self._scr}[offset]

    def _write(self, offset: int, value: int) -> None:
        latch = self._lcr & LCR_DIVISOR_LATCH
        if offset == DATA and not latch:
            self._send(value)
            return
        self._flush()
        if offset == DATA:
            self._divisor = self._divisor & 0xFF00 | value
        elif offset == IER and latch:
            self._divisor = self._divisor & 0xFF | value << 8
        elif offset == IER:
            if value & ~self._ier & IER_TRANSMITTER_EMPTY:
                # Enabling it while the transmitter is empty raises it at once (Linux tests this).
                self._transmitter_pending = True
            self._ier = value & IER_MASK
        elif offset == IIR_FCR:
            self._control_fifos(value)
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._mcr = value & MCR_MASK
            self._move_modem_lines()
        elif offset == SCR:
            self._scr = value
        # LSR and MSR are read-only here, as in the data sheet's advice.

    def _control_fifos(self, value: int) -> None:
        enable = bool(value & FCR_ENABLE)
        if enable != self._fifo_enabled or value & FCR_CLEAR_RECEIVER:
            self._fifo.clear()
            self._break_seen = False
        self._fifo_enabled = enable
        self._trigger = TRIGGER_LEVELS[value >> 6] if enable else TRIGGER_LEVELS[0]

    # -- transmitting ------------------------------------------------------------------------------

    def _send(self, value: int) -> None:
        self._transmitter_pending = True
        if self._mcr & MCR_LOOP:
            self._admit(value)
            return
        self._batch.append(value)
        if value == ord("\n") or len(self._batch) >= BATCH_SIZE:
            self._flush()

    def _flush(self) -> None:
        if self._batch:
            batch = bytes(self._batch)
            self._batch.clear()
            self._transmit(batch)

    # -- receiving ---------------------------------------------------------------------------------

    def _room(self) -> int:
        return (FIFO_SIZE if self._fifo_enabled else 1) - len(self._fifo)

    def _admit(self, value: int) -> None:
        """Take a byte that the guest sends to itself; there is no line to hold it on."""
        if self._room() > 0:
            self._fifo.append(value)

    def _fill(self) -> None:
        """Let waiting input into the FIFO, if the guest says that it is ready for it."""
        listening = self._mcr & (MCR_RTS | MCR_OUT2 | MCR_LOOP) == MCR_RTS | MCR_OUT2
        if not self._backlog or not listening:
            return
        for _ in range(min(self._room(), len(self._backlog))):
            self._fifo.append(self._backlog.popleft())
        if not self._backlog and self._drained is not None:
            self._drained()

    def _take(self) -> int:
        if not self._fifo:
            return 0
        self._break_seen = False
        return self._fifo.popleft() & 0xFF

    def _break_pending(self) -> bool:
        """Whether the oldest byte is a break that LSR has not told of yet."""
        return bool(self._fifo) and self._fifo[0] == _BREAK and not self._break_seen

    def _line_status(self) -> int:
        value = LSR_TRANSMITTER_EMPTY
        if self._fifo:
            value |= LSR_DATA_READY
        if self._fifo_enabled and _BREAK in self._fifo:
            value |= LSR_FIFO_ERROR
        if self._break_pending():
            value |= LSR_BREAK
            self._break_seen = True
        return value

    # -- modem lines and the interrupt -------------------------------------------------------------

    def _move_modem_lines(self) -> None:
        lines = MSR_PRESENT
        if self._mcr & MCR_LOOP:
            lines = 0
            for output, line in (
                (MCR_RTS, MSR_CTS),
                (MCR_DTR, MSR_DSR),
                (MCR_OUT1, MSR_RI),
                (MCR_OUT2, MSR_DCD),
            ):
                if self._mcr & output:
                    lines |= line
        changed = lines ^ self._modem_lines
        # Bits 3:0 tell of changes in bits 7:4; that of RI only of its falling.
        delta = changed >> 4 & ~MSR_TERI
        if changed & self._modem_lines & MSR_RI:
            delta |= MSR_TERI
        self._modem_delta |= delta
        self._modem_lines = lines

    def _cause(self) -> int:
        """Return the pending interrupt of the highest priority, as IIR has it in bits 3:0."""
        if self._ier & IER_LINE_STATUS and self._break_pending():
            return IIR_LINE_STATUS
        if self._ier & IER_RECEIVED and self._fifo:
            # Below the trigger level the real one waits for four character times of silence.
            # Nothing more is on its way here, so the silence is over at once.
            return IIR_RECEIVED if len(self._fifo) >= self._trigger else IIR_TIMEOUT
        if self._ier & IER_TRANSMITTER_EMPTY and self._transmitter_pending:
            return IIR_TRANSMITTER_EMPTY
        if self._ier & IER_MODEM_STATUS and self._modem_delta:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update(self) -> None:
        """Let input in and put the interrupt line where it belongs."""
        self._fill()
        # On a PC, OUT2 connects the interrupt, and looping back takes OUT2 off its pin.
        connected = self._mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
        line = connected and self._cause() != IIR_NONE
        if line != self._line:
            self._line = line
            self._interrupt(line)
