"""Descriptors of every kind that a VMM may pass for guest memory, or for an eventfd."""

from __future__ import annotations

import fcntl
import os

from tests.support.attach import make_memfd


def pipe_end() -> int:
    ours, theirs = os.pipe()
    os.close(theirs)
    return ours


def read_only_memfd() -> int:
    fd = make_memfd()
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return again


def write_sealed_memfd() -> int:
    fd = make_memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


def o_path() -> int:
    return os.open("/", os.O_PATH)


def regular_file() -> int:
    return os.open(__file__, os.O_RDONLY)
