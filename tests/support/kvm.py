"""What the tests of the VMM share: tiny guests, assembled on the spot, and servers for them."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import cache, partial
from pathlib import Path

import pytest
import trio

from tests.support.patience import PATIENCE
from vmbus.attach.protocol.limits import ALL_FEATURES, Feature
from vmbus.attach.server import serve
from vmbus.attach.server.transport import SocketTransport
from vmbus.kvm.bzimage import EntryState
from vmbus.kvm.life import SynicMode
from vmbus.kvm.machine import Loader, Machine
from vmbus.kvm.outcome import End
from vmbus.kvm.synic_kernel import is_possible
from vmbus.kvm.vm import Vm
from vmbus.memory import GuestMemory

GUESTS = Path(__file__).parents[1] / "kvm_guests"
CODE_GPA = 0x10000
STACK_TOP_GPA = 0x9000
PAGE_TABLES_GPA = 0x9000
GDT_GPA = 0x500
SCRATCH_GPA = 0x30000
RESULTS_GPA = 0x35000
MEMORY_SIZE = 2 << 20
_GDT = struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
_LARGE_PAGE = 2 << 20

HAVE_KVM = os.access("/dev/kvm", os.R_OK | os.W_OK)
needs_kvm = pytest.mark.skipif(not HAVE_KVM, reason="there is no /dev/kvm to use")


@cache
def kernel_mode_possible() -> bool:
    """Whether this machine's KVM has a SynIC for guests."""
    if not HAVE_KVM:
        return False
    with closing(Vm(GuestMemory())) as vm:
        return is_possible(vm)


@cache
def assemble(name: str) -> bytes:
    """Assemble one of the tiny guests; the code runs at CODE_GPA."""
    with tempfile.TemporaryDirectory() as folder:
        made, linked = f"{folder}/made.o", f"{folder}/linked"
        subprocess.run(
            ["as", "--64", "-I", str(GUESTS), "-o", made, str(GUESTS / f"{name}.s")], check=True
        )
        subprocess.run(
            ["ld", "--oformat=binary", f"-Ttext={CODE_GPA:#x}", "-e", "0", "-o", linked, made],
            check=True,
        )
        return Path(linked).read_bytes()


def _page_tables() -> bytes:
    """Four levels that map the first 4 GiB to themselves, in pages of 2 MiB."""
    tables = struct.pack("<512Q", PAGE_TABLES_GPA + 0x1003, *[0] * 511)
    directories = [PAGE_TABLES_GPA + 0x2003 + 0x1000 * each for each in range(4)]
    tables += struct.pack("<512Q", *directories, *[0] * 508)
    return tables + struct.pack("<2048Q", *(each * _LARGE_PAGE | 0x83 for each in range(2048)))


def loader(code: bytes) -> Loader:
    """Return what loads a tiny guest."""

    def load(memory: GuestMemory) -> EntryState:
        memory.write(GDT_GPA, _GDT)
        memory.write(PAGE_TABLES_GPA, _page_tables())
        memory.write(CODE_GPA, code)
        memory.write(SCRATCH_GPA, bytes(0x10000))
        return EntryState(rip=CODE_GPA, rsi=0, rsp=STACK_TOP_GPA, cr3=PAGE_TABLES_GPA)

    return load


def bzimage(code: bytes) -> bytes:
    """Return a kernel file with ``code`` where the 64-bit boot protocol enters it."""
    setup = bytearray(1024)
    for offset, kind, value in (
        (0x1F1, "B", 1),  # setup_sects
        (0x1F4, "I", 0x100),  # syssize, in 16 bytes
        (0x1FE, "H", 0xAA55),
        (0x200, "H", 0x6AEB),
        (0x206, "H", 0x20F),  # protocol
        (0x211, "B", 0x01),  # loadflags: high
        (0x22C, "I", 0x7FFFFFFF),  # initrd_addr_max
        (0x230, "I", 0x100000),  # kernel_alignment
        (0x236, "H", 0x01),  # xloadflags: 64 bit
        (0x238, "I", 255),  # cmdline_size
        (0x258, "Q", 0x100000),  # pref_address
        (0x260, "I", 0x10000),  # init_size
    ):
        struct.pack_into("<" + kind, setup, offset, value)
    setup[0x202:0x206] = b"HdrS"
    return bytes(setup) + (bytes(0x200) + code).ljust(0x1000, b"\0")


async def idle(transport: SocketTransport) -> None:
    """A server that has nothing for its guest."""
    async for event in transport.incoming():
        done = getattr(event, "done", None)
        if done is not None:
            done()


class Run:
    """A tiny guest's run, from power-on to its end.

    Args:
        name: Of the guest.
        handler: Serves it.
        mode: Who has the SynIC.
        features: What the VMM offers.
        vp_count: Processors.
        before: Called with the machine before it runs.
        panicked: See :class:`Machine`.
    """

    def __init__(
        self,
        name: str,
        handler: Callable[[SocketTransport], Awaitable[None]] = idle,
        *,
        mode: SynicMode = SynicMode.AUTO,
        features: Feature = ALL_FEATURES,
        vp_count: int = 1,
        before: Callable[[Machine], None] = lambda machine: None,
        panicked: Callable[[str], None] | None = None,
    ) -> None:
        load = loader(assemble(name))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.errors: list[BaseException] = []
        thread = threading.Thread(target=self._serve, args=(theirs, handler))
        output = bytearray()
        thread.start()
        machine = Machine(MEMORY_SIZE, vp_count, load, output.extend, panicked=panicked, mode=mode)
        with closing(machine):
            before(machine)
            self.end: End = machine.run(ours.detach(), features=features)
            self.results = struct.unpack("<4I", machine.memory.read(RESULTS_GPA, 16))
            self.resets = machine.resets
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert not self.errors
        self.output = bytes(output)
        """What it wrote to the serial port."""

    def _serve(self, sock: socket.socket, handler: Callable[..., Awaitable[None]]) -> None:
        async def main() -> None:
            with trio.fail_after(PATIENCE):
                await serve(sock, handler)

        try:
            trio.run(partial(main))
        except BaseException as error:
            self.errors.append(error)
