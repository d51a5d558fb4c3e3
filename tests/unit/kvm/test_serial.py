"""The serial port, driven the way guests' drivers drive it."""

import threading

import pytest

from tests.support.patience import PATIENCE
from vmbus.kvm import serial
from vmbus.kvm.serial import Uart

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
OPEN = serial.MCR_DTR | serial.MCR_RTS | serial.MCR_OUT2


class Port:
    """A port with what came out of it, and short names for its registers."""

    def __init__(self, interrupt=None, drained=None):
        self.sent: list[bytes] = []
        self.levels: list[bool] = []
        self.uart = Uart(self.sent.append, interrupt or self.levels.append, drained=drained)

    def get(self, register):
        return self.uart.read(register, 1)

    def put(self, register, value):
        self.uart.write(register, 1, value)

    def open(self, *, ier=0, fcr=0x01):
        self.put(FCR, fcr)
        self.put(MCR, OPEN)
        self.put(IER, ier)

    def say(self, text):
        for byte in text:
            assert self.get(LSR) & serial.LSR_TRANSMITTER_EMPTY == serial.LSR_TRANSMITTER_EMPTY
            self.put(DATA, byte)

    def take(self):
        """Read bytes as long as there are some."""
        found = bytearray()
        while self.get(LSR) & serial.LSR_DATA_READY:
            found.append(self.get(DATA))
        return bytes(found)

    @property
    def level(self):
        return bool(self.levels) and self.levels[-1]


@pytest.fixture
def port():
    return Port()


# -- what a driver finds out about the chip --------------------------------------------------------


def test_linux_takes_it_for_a_16550a(port):
    # serial8250_autoconfig: the interrupt enable register has four bits ...
    port.put(IER, 0)
    assert port.get(IER) == 0
    port.put(IER, 0xFF)
    assert port.get(IER) == 0x0F
    port.put(IER, 0)
    # ... looping back carries RTS and OUT2 to CTS and DCD ...
    port.put(MCR, serial.MCR_LOOP | 0x0A)
    assert port.get(MSR) & 0xF0 == 0x90
    port.put(MCR, 0)
    # ... no extended feature register hides behind the divisor latch ...
    port.put(LCR, 0xBF)
    port.put(FCR, 0x01)
    assert port.get(IIR) >> 6 == 3
    port.put(LCR, 0)
    # ... FIFOs, but not of 64 bytes ...
    port.put(FCR, 0x01 | 0x20)
    assert port.get(IIR) & 0xE0 == 0xC0
    # ... and no XScale's unit enable bit.
    port.put(IER, 0x40)
    assert port.get(IER) == 0


def test_registers_hold_what_they_should(port):
    for register, value, kept in ((LCR, 0x1B, 0x1B), (MCR, 0xFF, 0x1F), (SCR, 0xA5, 0xA5)):
        port.put(register, value)
        assert port.get(register) == kept
    for register in (LSR, MSR):
        before = port.get(register)
        port.put(register, before ^ 0xFF)
        assert port.get(register) == before


def test_the_divisor_latch_hides_data_and_interrupt_enable(port):
    port.put(IER, 0x05)
    port.put(LCR, 0x83)
    port.put(DATA, 0x34)
    port.put(IER, 0x12)
    assert (port.get(DATA), port.get(IER)) == (0x34, 0x12)
    port.put(LCR, 0x03)
    assert port.get(IER) == 0x05
    assert port.get(DATA) == 0
    assert port.sent == []


def test_a_terminal_is_there_and_ready(port):
    assert port.get(MSR) == serial.MSR_CTS | serial.MSR_DSR | serial.MSR_DCD
    assert port.get(LSR) == serial.LSR_TRANSMITTER_EMPTY
    assert port.get(IIR) == serial.IIR_NONE


# -- sending ---------------------------------------------------------------------------------------


def test_a_line_is_handed_over_in_one_piece(port):
    port.say(b"hello\n")
    assert port.sent == [b"hello\n"]


def test_a_long_line_is_handed_over_in_batches(port):
    port.say(b"x" * (serial.BATCH_SIZE + 3))
    assert port.sent == [b"x" * serial.BATCH_SIZE]
    port.uart.flush()
    assert port.sent[1:] == [b"xxx"]


def test_a_prompt_is_handed_over_when_the_driver_is_done_with_it(port):
    """Drivers turn an interrupt off or on again after a message."""
    port.say(b"# ")
    assert port.sent == []
    port.put(IER, 0)
    assert port.sent == [b"# "]


def test_flushing_nothing_hands_over_nothing(port):
    port.uart.flush()
    port.put(IER, 0)
    assert port.sent == []


def test_output_that_is_kept_back_survives_a_reset(port):
    port.say(b"bye")
    port.uart.reset()
    assert port.sent == [b"bye"]


# -- interrupts ------------------------------------------------------------------------------------


def test_the_transmitter_interrupts_when_enabled_and_after_every_byte(port):
    port.open()
    port.put(IER, serial.IER_TRANSMITTER_EMPTY)
    assert port.levels == [True]
    assert port.get(IIR) == 0xC0 | serial.IIR_TRANSMITTER_EMPTY
    assert port.levels == [True, False]
    assert port.get(IIR) == 0xC0 | serial.IIR_NONE
    port.put(DATA, ord("a"))
    assert port.levels == [True, False, True]
    port.put(IER, 0)
    assert not port.level
    # Enabling again raises it again; Linux looks for chips that fail to.
    port.put(IER, serial.IER_TRANSMITTER_EMPTY)
    assert port.level


def test_writing_the_same_enable_bits_does_not_raise_the_interrupt_again(port):
    port.open(ier=serial.IER_TRANSMITTER_EMPTY)
    port.get(IIR)
    port.put(IER, serial.IER_TRANSMITTER_EMPTY | serial.IER_LINE_STATUS)
    assert not port.level


def test_without_out2_the_interrupt_is_not_connected(port):
    port.put(IER, serial.IER_TRANSMITTER_EMPTY)
    assert port.get(IIR) == serial.IIR_TRANSMITTER_EMPTY
    assert port.levels == []
    port.put(IER, 0)
    port.put(IER, serial.IER_TRANSMITTER_EMPTY)
    port.put(MCR, serial.MCR_OUT2)
    assert port.levels == [True]
    port.put(MCR, serial.MCR_OUT2 | serial.MCR_LOOP)
    assert port.levels == [True, False]


def test_interrupts_come_in_the_order_of_the_data_sheet(port):
    port.open(ier=serial.IER_MASK, fcr=0x41)
    port.put(MCR, serial.MCR_LOOP)  # moves the modem lines
    port.put(MCR, OPEN)
    port.uart.send_break()
    port.uart.receive(b"abcd")
    assert port.get(IIR) & 0x0F == serial.IIR_LINE_STATUS
    assert port.get(LSR) & serial.LSR_BREAK
    assert port.get(IIR) & 0x0F == serial.IIR_RECEIVED
    assert port.get(DATA) == 0
    assert port.get(IIR) & 0x0F == serial.IIR_RECEIVED
    assert port.get(DATA) == ord("a")
    # Three are left, fewer than the trigger level of four.
    assert port.get(IIR) & 0x0F == serial.IIR_TIMEOUT
    assert port.take() == b"bcd"
    assert port.get(IIR) & 0x0F == serial.IIR_TRANSMITTER_EMPTY
    assert port.get(IIR) & 0x0F == serial.IIR_MODEM_STATUS
    assert port.level
    assert port.get(MSR) & 0x0F
    assert port.get(IIR) & 0x0F == serial.IIR_NONE
    assert not port.level


@pytest.mark.parametrize(("bits", "level"), list(enumerate(serial.TRIGGER_LEVELS)))
def test_the_trigger_level_is_where_the_guest_put_it(port, bits, level):
    port.open(ier=serial.IER_RECEIVED, fcr=bits << 6 | 1)
    port.uart.receive(b"x" * level)
    assert port.get(IIR) & 0x0F == serial.IIR_RECEIVED
    port.get(DATA)
    if level > 1:
        assert port.get(IIR) & 0x0F == serial.IIR_TIMEOUT


# -- receiving -------------------------------------------------------------------------------------


def test_input_arrives_with_an_interrupt(port):
    port.open(ier=serial.IER_RECEIVED)
    assert port.uart.receive(b"ls\n") == 3
    assert port.levels == [True]
    assert port.take() == b"ls\n"
    assert port.levels == [True, False]


def test_input_from_before_the_guest_opened_the_port_is_kept(port):
    port.uart.receive(b"root\n" * 10)
    assert port.take() == b""
    port.put(FCR, 0x01)
    port.put(FCR, 0x07)  # what probing and opening do
    assert port.take() == b""
    port.open(ier=serial.IER_RECEIVED)
    assert port.level
    assert port.take() == b"root\n" * 10


def test_earlyprintk_does_not_eat_the_first_byte(port):
    """linux/arch/x86/kernel/early_printk.c sets DTR and RTS, and does not read."""
    port.uart.receive(b"root\n")
    port.put(IER, 0)
    port.put(FCR, 0)
    port.put(MCR, serial.MCR_DTR | serial.MCR_RTS)
    assert not port.get(LSR) & serial.LSR_DATA_READY
    port.put(FCR, 0x07)
    port.open()
    assert port.take() == b"root\n"


def test_clearing_the_fifo_forgets_what_is_in_it(port):
    port.open()
    port.uart.receive(bytes(range(1, 30)))
    port.put(FCR, 0x01 | serial.FCR_CLEAR_RECEIVER)
    assert port.take() == bytes(range(1 + serial.FIFO_SIZE, 30))


def test_without_fifos_there_is_one_byte_at_a_time(port):
    port.put(MCR, OPEN)
    port.put(IER, serial.IER_RECEIVED)
    port.uart.receive(b"ab")
    assert port.get(IIR) == serial.IIR_RECEIVED
    assert port.take() == b"ab"
    assert port.get(DATA) == 0


def test_no_more_than_the_backlog_is_taken_and_the_sender_is_told_when_to_go_on():
    drained = []
    port = Port(drained=lambda: drained.append(True))
    assert port.uart.receive(b"x" * (serial.BACKLOG_SIZE + 5)) == serial.BACKLOG_SIZE
    assert port.uart.receive(b"y") == 0
    port.uart.send_break()  # takes no room
    assert port.uart.receive(b"y") == 0
    port.open()
    assert drained == []
    assert port.take() == b"x" * serial.BACKLOG_SIZE + b"\0"
    assert drained == [True]
    assert port.uart.receive(b"y") == 1
    assert drained == [True, True]


def test_a_break_is_told_once_and_reads_as_zero(port):
    port.open(ier=serial.IER_LINE_STATUS)
    port.uart.send_break()
    port.uart.receive(b"c")
    assert port.get(IIR) & 0x0F == serial.IIR_LINE_STATUS
    assert port.get(LSR) == 0x60 | serial.LSR_DATA_READY | serial.LSR_BREAK | serial.LSR_FIFO_ERROR
    assert not port.get(LSR) & serial.LSR_BREAK
    assert not port.level
    assert port.get(DATA) == 0
    assert port.get(LSR) == 0x60 | serial.LSR_DATA_READY
    assert port.get(DATA) == ord("c")
    # Two in a row are two.
    port.uart.send_break()
    port.uart.send_break()
    assert port.get(LSR) & serial.LSR_BREAK
    port.get(DATA)
    assert port.get(LSR) & serial.LSR_BREAK


def test_a_break_without_fifos_is_not_an_error_in_the_fifo(port):
    port.put(MCR, OPEN)
    port.uart.send_break()
    assert port.get(LSR) == 0x60 | serial.LSR_DATA_READY | serial.LSR_BREAK


# -- looping back ----------------------------------------------------------------------------------


def test_looped_bytes_come_back_and_do_not_leave(port):
    port.put(FCR, 0x01)
    port.put(MCR, serial.MCR_LOOP)
    for byte in range(40):
        port.put(DATA, byte)
    assert port.take() == bytes(range(serial.FIFO_SIZE))
    port.put(MCR, 0)
    port.uart.flush()
    assert port.sent == []


def test_input_waits_while_the_port_is_looped_back(port):
    port.put(MCR, OPEN | serial.MCR_LOOP)
    port.uart.receive(b"a")
    assert port.take() == b""
    port.put(MCR, OPEN)
    assert port.take() == b"a"


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (serial.MCR_RTS, serial.MSR_CTS),
        (serial.MCR_DTR, serial.MSR_DSR),
        (serial.MCR_OUT1, serial.MSR_RI),
        (serial.MCR_OUT2, serial.MSR_DCD),
    ],
)
def test_looped_modem_lines_follow_their_outputs_and_tell_of_changes(port, output, line):
    port.put(MCR, serial.MCR_LOOP)
    port.get(MSR)
    assert port.get(MSR) == 0
    port.put(MCR, serial.MCR_LOOP | output)
    rising = port.get(MSR)
    assert rising & 0xF0 == line
    port.put(MCR, serial.MCR_LOOP)
    falling = port.get(MSR)
    assert falling == line >> 4
    # The ring indicator tells of its trailing edge only.
    assert rising & 0x0F == (0 if line == serial.MSR_RI else line >> 4)


# -- all of it -------------------------------------------------------------------------------------


def test_reset_closes_the_port_and_keeps_waiting_input(port):
    port.open(ier=serial.IER_MASK)
    port.uart.receive(b"z" * 20)
    assert port.level
    port.uart.reset()
    assert not port.level
    assert [port.get(each) for each in (IER, LCR, MCR, SCR)] == [0, 0, 0, 0]
    assert port.take() == b""
    port.open()
    assert port.take() == b"zzzz"


def test_input_and_register_accesses_may_come_from_different_threads():
    raised = threading.Event()
    port = Port(lambda level: raised.set() if level else None)
    port.open(ier=serial.IER_RECEIVED)
    text = bytes(range(1, 251)) * 40
    received = bytearray()

    def bring():
        rest = text
        while rest:
            rest = rest[port.uart.receive(rest) :]

    sender = threading.Thread(target=bring)
    sender.start()
    while len(received) < len(text):
        assert raised.wait(PATIENCE)
        raised.clear()
        received += port.take()
    sender.join(PATIENCE)
    assert received == text
