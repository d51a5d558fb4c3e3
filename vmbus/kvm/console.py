"""The guest's serial console on this process's standard input and output.

On a terminal every key goes to the guest as it is, Ctrl-C included, until the escape key is typed.
Without one, input is passed on until it ends, for scripts.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import termios
import threading
import tty
from collections.abc import Callable, Iterator

_log = logging.getLogger("vmbus.kvm")

ESCAPE = 0x1D
"""Ctrl-]"""
READ_SIZE = 4096


class Console:
    """Reads input in a thread of its own.

    Args:
        source: Descriptor of the input; borrowed.
        sink: Descriptor of the output; borrowed.
        escaped: Called when the escape key is typed on a terminal; in the console's thread.
    """

    def __init__(self, source: int, sink: int, escaped: Callable[[], None]) -> None:
        self._source = source
        self._sink = sink
        self._escaped = escaped
        self._interactive = os.isatty(source)
        self._lost = False
        self._drained = threading.Event()
        self._receive: Callable[[bytes], int] = len
        self._thread = threading.Thread(target=self._read, name="console", daemon=True)
        self._stop_read, self._stop_write = os.pipe()

    @property
    def interactive(self) -> bool:
        """Whether somebody types the input."""
        return self._interactive

    def transmit(self, data: bytes) -> None:
        """Write what the guest sent. Waits for a slow reader, and so does the guest."""
        while data:
            try:
                data = data[os.write(self._sink, data) :]
            except BlockingIOError:
                select.select([], [self._sink], [])
            except OSError as error:
                # Nobody looks any more, or there is no room; the guest does not mind.
                if not self._lost and error.errno != errno.EPIPE:
                    _log.warning("the console cannot be shown: %s", error.strerror)
                self._lost = True
                return

    def drained(self) -> None:
        """The guest has taken all input. Any thread; cannot block."""
        self._drained.set()

    @contextlib.contextmanager
    def attached(self, receive: Callable[[bytes], int]) -> Iterator[None]:
        """Pass input on for the length of the block, with the terminal in raw mode if it is one.

        Args:
            receive: Takes bytes, returns how many; :meth:`drained` follows if it did not take all.
        """
        self._receive = receive
        before = termios.tcgetattr(self._source) if self._interactive else None
        if before is not None:
            tty.setraw(self._source, termios.TCSANOW)
        self._thread.start()
        try:
            yield
        finally:
            os.write(self._stop_write, b"\0")
            self._drained.set()
            self._thread.join()
            os.close(self._stop_read)
            os.close(self._stop_write)
            if before is not None:
                termios.tcsetattr(self._source, termios.TCSADRAIN, before)

    def _read(self) -> None:
        while True:
            readable, _, _ = select.select([self._source, self._stop_read], [], [])
            if self._stop_read in readable:
                return
            try:
                data = os.read(self._source, READ_SIZE)
            except OSError:
                # A terminal that was hung up.
                return
            if not data:
                return
            escape = data.find(ESCAPE) if self._interactive else -1
            if not self._pass_on(data if escape < 0 else data[:escape]):
                return
            if escape >= 0:
                self._escaped()
                return

    def _pass_on(self, data: bytes) -> bool:
        """Give input to the guest as fast as it takes it; False at the end."""
        while True:
            # First, so that what is drained after this look is not missed.
            self._drained.clear()
            data = data[self._receive(data) :]
            if not data:
                return True
            self._drained.wait()
            if select.select([self._stop_read], [], [], 0)[0]:
                return False
