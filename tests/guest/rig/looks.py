"""What a guest's kernel says of its bus."""

from __future__ import annotations

import re

from tests.guest.rig.guest import Guest


def version_in(guest: Guest) -> str:
    """Return the version that it has agreed on."""
    found = re.search(r"Vmbus version:(\S+)", guest.run("dmesg | grep -i 'vmbus version'"))
    assert found, "the kernel says nothing of a version"
    return found[1]


def interrupts(guest: Guest) -> list[int]:
    """Return how many interrupts of the bus each processor has had."""
    words = guest.run("grep HYP: /proc/interrupts").split()
    return [int(word) for word in words[1:] if word.isdigit()]
