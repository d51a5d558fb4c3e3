"""What the tests with real kernels take for a complaint."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.guest.rig.complaints import coarse_filter, complaints

BAD = [
    "[    2.1] hv_vmbus: Unable to connect to host",
    "[    2.1] hv_storvsc 1234: tag#17 cmd 0x28 status: scsi 0x2 srb 0x4 hv 0xc0000001",
    "[    2.1] scsi 0:0:0:1: scsi scan: INQUIRY result too short (5), using 36",
    "[    2.1] I/O error, dev sda, sector 8 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2",
    "[    2.1] EXT4-fs error (device sda): ext4_lookup:1855",
    "[    2.1] INFO: task sync:77 blocked for more than 120 seconds.",
    "[    2.1] WARNING: CPU: 0 PID: 1 at drivers/hv/channel_mgmt.c:1 vmbus_onoffer+0x1",
    "[    2.1] BUG: unable to handle page fault for address: ffff8ac81f01fb80",
]
FINE = [
    "[    0.4] AMD Zen1 DIV0 bug detected. Disable SMT for full protection.",
    '[    0.7] PCI: Using host bridge windows; if necessary, use "pci=nocrs" and report a bug',
    "[    0.4] Speculative Return Stack Overflow: WARNING: See the documentation",
    "[    2.0] hv_vmbus: Vmbus version:5.3",
    "[    2.3] sd 0:0:0:0: [sda] Write cache: disabled, read cache: enabled",
]


@pytest.mark.parametrize("line", BAD)
def test_a_complaint_is_found(line):
    assert complaints(line) == [line]


@pytest.mark.parametrize("line", FINE)
def test_other_lines_are_no_complaint(line):
    assert complaints(line) == []


def test_a_complaint_that_a_test_asks_for_is_none():
    assert complaints("\n".join(BAD[:2]), allow=["Unable to connect"]) == [BAD[1]]


def test_what_the_guest_sends_has_every_complaint():
    found = subprocess.run(
        ["grep", "-iE", coarse_filter()],
        input="\n".join(BAD),
        text=True,
        capture_output=True,
        check=True,
    )

    assert found.stdout.splitlines() == BAD
    assert not re.search(r"\(\?|\\[bdw]", coarse_filter())
