"""What the tests of the VMM share: tiny guests, assembled on the spot."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from vmbus.kvm.bzimage import EntryState
from vmbus.kvm.machine import Loader
from vmbus.memory import GuestMemory

GUESTS = Path(__file__).parent / "kvm_guests"
CODE_GPA = 0x10000
STACK_TOP_GPA = 0x9000
PAGE_TABLES_GPA = 0x9000
GDT_GPA = 0x500
_GDT = struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
_LARGE_PAGE = 2 << 20

needs_kvm = [
    pytest.mark.skipif(
        not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="there is no /dev/kvm to use"
    ),
    pytest.mark.skipif(
        not (shutil.which("as") and shutil.which("ld")), reason="there is no assembler"
    ),
]


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
        memory.write(0x30000, bytes(0x10000))
        return EntryState(rip=CODE_GPA, rsi=0, rsp=STACK_TOP_GPA, cr3=PAGE_TABLES_GPA)

    return load
