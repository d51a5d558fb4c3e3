"""The process of the server: its memory, its limits."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from vmbus.memory import PAGE_SIZE, allocate_memory
from vmbus.server import raise_descriptor_limit
from vmbus.server.process import resident_bytes


def test_resident_memory_is_what_the_server_uses_itself():
    size = 64 << 20
    before = resident_bytes()
    memory = allocate_memory(size)
    for page in range(size // PAGE_SIZE):
        memory.write(page * PAGE_SIZE, b"x")
    assert resident_bytes() - before < size // 2, "guests' memory is not the server's"

    own = bytearray(b"x") * size
    assert resident_bytes() - before > size // 2
    assert len(own) == size
    memory.close()


def test_the_limit_on_open_files_is_raised(monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, 20))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: calls.append(limits))
    raise_descriptor_limit()
    assert calls == [(20, 20)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 20))
    raise_descriptor_limit()
    assert calls == [(20, 20)]
