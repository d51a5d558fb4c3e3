"""The guest's page allocator, over the RAM of its machine.

It can hand out scattered pages on purpose: the page lists of real guests are rarely contiguous,
and a host that assumes it is found out. Freed pages can be poisoned: what a host writes into
memory after the guest took it back shows up in :meth:`Ram.dirty_poison`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from vmbus.guest.machine import Machine
from vmbus.wire.gpa import PAGE_SIZE

_POISON = b"\xfe" * PAGE_SIZE


class Ram:
    """Page frames of a machine's regions; belongs to one guest.

    Args:
        machine: Its regions are owned by this allocator from now on.
        seed: Makes the choice of scattered pages repeatable.
    """

    def __init__(self, machine: Machine, *, seed: int = 0) -> None:
        self._machine = machine
        self._random = random.Random(seed)  # noqa: S311  # spreads pages, hides nothing
        self._free: set[int] = set()
        self._starts: set[int] = set()
        """First pages of regions: no view goes across into one."""
        for region in machine.regions:
            first = region.gpa // PAGE_SIZE
            self._starts.add(first)
            self._free.update(range(first, first + region.size // PAGE_SIZE))
        # In several messages address 0 stands for "none", and no kernel keeps anything there.
        self._free.discard(0)
        self._next = min(self._free, default=0)
        self._poisoned: set[int] = set()
        self._dirty: set[int] = set()

    @property
    def free_pages(self) -> int:
        """Pages that can still be allocated."""
        return len(self._free)

    def allocate(self, count: int, *, contiguous: bool = True) -> list[int]:
        """Take ``count`` pages and zero them. Cannot block.

        Args:
            count: Pages.
            contiguous: False gives pages in random order from all over the RAM.

        Returns:
            Page frame numbers, owned by the caller until :meth:`free`.

        Raises:
            MemoryError: Not enough pages, or none in a row.
        """
        pfns = self._run(count) if contiguous else self._scatter(count)
        self._free.difference_update(pfns)
        self._dirty.update(self._written(self._poisoned.intersection(pfns)))
        self._poisoned.difference_update(pfns)
        for view in self.views(pfns):
            view[:] = bytes(len(view))
        return pfns

    def _run(self, count: int) -> list[int]:
        free = self._free
        # Next fit: a long run is usually found at once behind the last one.
        for start in (self._next, min(free, default=0)):
            run = 0
            pfn = start
            top = max(free, default=-1)
            while pfn <= top:
                if pfn in self._starts:
                    run = 0
                run = run + 1 if pfn in free else 0
                pfn += 1
                if run == count:
                    self._next = pfn
                    return list(range(pfn - count, pfn))
        raise MemoryError(f"no {count} free pages in a row; {len(free)} are free")

    def _scatter(self, count: int) -> list[int]:
        if count > len(self._free):
            raise MemoryError(f"{count} pages wanted, {len(self._free)} are free")
        return self._random.sample(sorted(self._free), count)

    def free(self, pfns: Iterable[int], *, poison: bool = False) -> None:
        """Give pages back. Cannot block.

        Args:
            pfns: From :meth:`allocate`.
            poison: The host has promised not to touch them any more: fill them with a pattern.
        """
        pages = list(pfns)
        self._free.update(pages)
        if poison:
            self._poisoned.update(pages)
            for pfn in pages:
                self.page(pfn)[:] = _POISON

    def dirty_poison(self) -> list[int]:
        """Return the poisoned pages that somebody has written to since. Cannot block."""
        return sorted(self._dirty | self._written(self._poisoned))

    def _written(self, pfns: Iterable[int]) -> set[int]:
        return {pfn for pfn in pfns if self.page(pfn) != _POISON}

    def page(self, pfn: int) -> memoryview:
        """Return the bytes of one page. Cannot block."""
        return self._machine.view(pfn * PAGE_SIZE, PAGE_SIZE)

    def views(self, pfns: Sequence[int]) -> list[memoryview]:
        """Return the bytes of some pages, pages in a row as one view. Cannot block."""
        found: list[memoryview] = []
        start = 0
        for position in range(1, len(pfns) + 1):
            if (
                position < len(pfns)
                and pfns[position] == pfns[position - 1] + 1
                and pfns[position] not in self._starts
            ):
                continue
            size = (position - start) * PAGE_SIZE
            found.append(self._machine.view(pfns[start] * PAGE_SIZE, size))
            start = position
        return found
