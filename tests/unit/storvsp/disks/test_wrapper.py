"""Disks on top of others: every call arrives below, also one that the interface gets some day."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import trio

from storvsp.disk import Disk
from storvsp.disks.delay import DelayDisk
from storvsp.disks.fault import Fault, FaultDisk, Operation
from storvsp.disks.overlay import OverlayDisk
from storvsp.disks.ram import RamDisk
from storvsp.disks.wrapper import DiskWrapper
from storvsp.scsi.medium import Medium

INTERFACE = sorted(name for name in vars(Disk) if not name.startswith("_"))
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "info": (),
    "try_readv": (512, [memoryview(bytearray(512))]),
    "try_writev": (512, [memoryview(bytearray(512))]),
    "readv": (512, [memoryview(bytearray(512))]),
    "writev": (512, [memoryview(bytearray(512))]),
    "flush": (),
    "unmap": (512, 1024),
    "unmap_many": ([(512, 512), (2048, 1024)],),
    "write_zeroes": (512, 1024),
    "extents": (0, 4096),
    "look_again": (),
    "watch": (print,),
    "aclose": (),
}
"""What each is called with."""


def make_recorder() -> tuple[Disk, list[tuple[str, tuple[Any, ...]]]]:
    """A disk that writes down which of the interface's methods are called."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def recorded(name: str) -> Any:
        original = inspect.getattr_static(RamDisk, name)
        if isinstance(original, property):

            def get(self: RamDisk) -> Any:
                calls.append((name, ()))
                return original.__get__(self)

            return property(get)
        if inspect.iscoroutinefunction(original):

            async def awaited(self: RamDisk, *args: Any, **options: Any) -> Any:
                calls.append((name, args))
                return await original(self, *args, **options)

            return awaited

        def called(self: RamDisk, *args: Any, **options: Any) -> Any:
            calls.append((name, args))
            # The slow forms are to be seen, too.
            return False if name.startswith("try_") else original(self, *args, **options)

        return called

    kind = type("Recorder", (RamDisk,), {name: recorded(name) for name in INTERFACE})
    disk = kind(1 << 20)
    calls.clear()
    return disk, calls


WRAPPERS: dict[str, Callable[[Disk], Disk]] = {
    "wrapper": DiskWrapper,
    "delay": DelayDisk,
    "fault": FaultDisk,
    "fault elsewhere": lambda base: FaultDisk(base, Fault(first=1000)),
    "medium": Medium,
}


def test_there_is_a_call_of_each():
    assert sorted(ARGUMENTS) == INTERFACE


@pytest.mark.parametrize("name", INTERFACE)
@pytest.mark.parametrize("kind", WRAPPERS)
async def test_each_call_arrives_as_it_was_made(kind, name, autojump_clock):
    base, calls = make_recorder()
    disk = WRAPPERS[kind](base)
    calls.clear()
    result = getattr(disk, name)
    if name != "info":
        result = result(*ARGUMENTS[name])
    if inspect.isawaitable(result):
        await result
    arrived = (name, ARGUMENTS[name]) in calls
    assert arrived is not (kind == "medium" and name == "aclose"), "a medium is its owner's"


@pytest.mark.parametrize("kind", [DiskWrapper, Medium])
def test_each_is_passed_on_by_the_class_itself_and_no_default_is_left(kind):
    """A default would do, slowly, what the disk below does well, or nothing at all."""
    assert [name for name in INTERFACE if name not in vars(kind)] == []


CHANGED_BY_OPERATION = {
    "read": ("try_readv", "readv"),
    "write": ("try_writev", "writev", "write_zeroes"),
    "flush": ("flush",),
    "unmap": ("unmap", "unmap_many"),
}
UNCHANGED = ("info", "extents", "look_again", "watch", "aclose")
"""Not delayed, and never failing."""


@pytest.mark.parametrize("kind", [DelayDisk, FaultDisk])
def test_what_delays_or_fails_operations_knows_all_of_them(kind):
    changed = [name for names in CHANGED_BY_OPERATION.values() for name in names]
    assert sorted([*changed, *UNCHANGED]) == INTERFACE
    assert [name for name in changed if name not in vars(kind)] == []


def test_an_overlay_leaves_to_defaults_only_what_it_knows_to_be_so():
    """Its size is that of when it was opened."""
    defaults = [name for name in INTERFACE if name not in vars(OverlayDisk)]
    assert defaults == ["look_again", "watch"]


async def test_a_fault_hits_one_range_of_many():
    base, calls = make_recorder()
    fault = Fault(on=Operation.UNMAP, first=4, last=4)
    disk = FaultDisk(base, fault)
    calls.clear()
    with pytest.raises(Exception, match="unmap failed on purpose"):
        await disk.unmap_many([(0, 512), (2048, 512), (8192, 512)])
    assert fault.hits == 1
    assert [args for name, args in calls if name == "unmap" and args[1]] == [(0, 512)]


async def test_many_ranges_are_one_delay(autojump_clock):
    disk = DelayDisk(RamDisk(1 << 20), unmap=3)
    begun = trio.current_time()
    await disk.unmap_many([(0, 512), (2048, 512)])
    assert trio.current_time() - begun == 3
