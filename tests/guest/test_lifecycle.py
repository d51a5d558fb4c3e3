"""Drivers, kernels and machines come and go, and the server outlives them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.conftest import TOOLS_LUN, Lab, Server
from tests.guest.rig.disk_work import checksum, write_and_compare
from tests.guest.rig.guest import Guest, until
from tests.guest.rig.looks import interrupts
from tests.guest.rig.network_work import get_address, interface, ping
from tests.support.patience import LONG_TEST

pytestmark = pytest.mark.timeout(LONG_TEST)

ROUNDS = 20
REBOOTS = 3
KERNEL_LUN = 41
INITRAMFS_LUN = 42
SECTOR = 512

SUB_CHANNELS = "hv_storvsc.storvsc_vcpus_per_sub_channel=1"
"""A sub-channel for every processor but the first."""

LOAD_AT = 8
"""MiB; where the load is, beyond what tests compare."""
MAC = "00:15:5d:00:aa:01"
NETWORK = f"--net=nat:[with=built-in,mac={MAC}]"
GATEWAY = "10.0.2.2"
MODULES = ("hv_storvsc", "sd_mod", "hv_netvsc")

PINGS = f"""
ping -i 0.01 -s 1400 {GATEWAY} >/dev/null &
"""
LOAD = f"""
for direction in "if=/dev/$name skip={LOAD_AT * 16} of=/dev/null iflag=direct" \\
        "of=/dev/$name seek={LOAD_AT * 16} if=/dev/zero oflag=direct conv=notrunc"; do
    (while :; do dd $direction bs=64k count=64 2>/dev/null; done) &
done
"""

FIND_DISK = """
find_disk() {
    for try in $(seq 2400); do
        name=$(ls /sys/bus/scsi/devices/*:0:0:0/block 2>/dev/null) && [ -b "/dev/$name" ] && return
        usleep 50000
    done
    echo "round $round: no disk"
    exit 1
}
"""
REFRESH = """
    dd if=/dev/urandom of=/run/data bs=64k count=4 2>/dev/null &&
        dd if=/run/data of=/dev/$name bs=64k conv=notrunc,fsync 2>/dev/null || exit 1
"""
COMPARE = """
    dd if=/dev/$name bs=64k count=4 iflag=direct 2>/dev/null | cmp - /run/data ||
        { echo "round $round: other data"; exit 1; }
"""


def said(server: Server, name: str) -> int:
    """Return how many messages of this name there were."""
    return sum(each.name == name for each in server.account())


def check_books(server: Server) -> None:
    """Each open channel has a ring, and an open network adapter two buffers."""
    (guest,) = server.guests()
    buffers = 2 * sum(bool(each["channels"]) for each in server.adapters())
    assert guest["gpadls"] - buffers == len(guest["channels"]) > 0, guest
    assert guest["faults"] == 0


def join(guest: Guest) -> None:
    """Have the guest get an address, and talk to its gateway."""
    get_address(guest, interface(guest, MAC))
    ping(guest, GATEWAY)


def begin_load(guest: Guest, server: Server, name: str, more: str = "") -> None:
    """Have the guest read and write from now on, so that something is always in flight."""

    def packets() -> int:
        return sum(channel["packets_in"] for channel in server.guests()[0]["channels"])

    before = packets()
    guest.run(f"name={name}\n{LOAD}{more}")
    until(lambda: packets() > before + 100, what="the load")


# ------------------------------------------------------------------------- drivers come and go


@pytest.mark.parametrize(
    ("away", "back"),
    [
        pytest.param("rmmod hv_storvsc", "modprobe hv_storvsc", id="module"),
        pytest.param(
            "echo $device >/sys/bus/vmbus/drivers/hv_storvsc/unbind",
            "echo $device >/sys/bus/vmbus/drivers/hv_storvsc/bind",
            id="binding",
        ),
    ],
)
def test_the_driver_goes_and_comes_back_twenty_times(lab: Lab, away: str, back: str):
    server = lab.serve("ram:[lun=0]16M")
    guest = lab.boot(server, "--cpus=2", append=SUB_CHANNELS)
    guest.disk(0)

    guest.run(
        f"device=$(basename /sys/bus/vmbus/drivers/hv_storvsc/*-*-*-*-*); round=0\n"
        f"{FIND_DISK}find_disk; {REFRESH}"
        f"for round in $(seq {ROUNDS}); do\n"
        f"    {away} || exit 1\n"
        f"    ls /sys/bus/scsi/devices/*:0:0:0 2>/dev/null && exit 1\n"
        f"    {back} || exit 1\n"
        f"    find_disk\n{COMPARE}{REFRESH}"
        f"done"
    )

    # Sub-channels come after the disk.
    until(lambda: len(server.guests()[0]["channels"]) == 2, what="the sub-channel")
    check_books(server)
    for name in ("GPADL_HEADER", "OPENCHANNEL", "OPENCHANNEL_RESULT"):
        assert said(server, name) >= ROUNDS + 1
    assert said(server, "GPADL_TEARDOWN") == said(server, "GPADL_TORNDOWN") >= ROUNDS
    guest.run("rmmod hv_storvsc")
    assert server.guests()[0]["channels"] == []
    assert server.guests()[0]["gpadls"] == 0
    guest.check_log()
    guest.power_off()


# ------------------------------------------------------------------------- kernels come and go


def test_a_guest_reboots_in_the_same_machine_and_finds_its_data(lab: Lab):
    server = lab.serve("ram:[lun=0]16M", options=[NETWORK])
    guest = lab.boot(server, modules=MODULES)
    number = server.guests()[0]["number"]

    for contacts in range(1, REBOOTS + 1):
        name = guest.disk(0)
        write_and_compare(guest, name)
        written = checksum(guest, name)
        assert said(server, "INITIATE_CONTACT") == contacts
        join(guest)
        guest.check_log()
        begin_load(guest, server, name, PINGS)
        guest.begin("reboot -f")
        guest.wait_ready()
        assert checksum(guest, guest.disk(0)) == written

    assert said(server, "INITIATE_CONTACT") == REBOOTS + 1
    assert server.guests()[0]["number"] == number, "it was never detached"
    check_books(server)
    guest.check_log()
    guest.power_off()


def padded(lab: Lab, file: Path) -> str:
    """Return the specification's target for a file as a disk, which has whole sectors."""
    data = file.read_bytes()
    copy = lab.file(file.name)
    copy.write_bytes(data + bytes(-len(data) % SECTOR))
    return str(copy)


class Successor:
    """A guest that has its own kernel on disks, to start it once more.

    Args:
        lab: The lab.
        arguments: More for ``vmbus boot``.
        append: For the first kernel's command line.
        memory: Of the guest.
    """

    def __init__(self, lab: Lab, *arguments: str, append: str, memory: str = "512M") -> None:
        kernel, initramfs = lab.assets.kernel, lab.assets.initramfs
        self.server = lab.serve(
            "ram:[lun=0]16M",
            f"raw:[ro,lun={KERNEL_LUN}]{padded(lab, kernel)}",
            f"raw:[ro,lun={INITRAMFS_LUN}]{padded(lab, initramfs)}",
            lab.tools,
            options=[NETWORK],
        )
        self.guest = guest = lab.boot(
            self.server, "--cpus=2", *arguments, append=append, memory=memory, modules=MODULES
        )
        join(guest)
        self.name = guest.disk(0)
        write_and_compare(guest, self.name)
        self.written = checksum(guest, self.name)
        guest.mount_tools(TOOLS_LUN)
        for lun, file in ((KERNEL_LUN, kernel), (INITRAMFS_LUN, initramfs)):
            size = file.stat().st_size
            guest.run(f"head -c {size} /dev/{guest.disk(lun)} >/run/lun{lun}")

    def load(self, options: str) -> None:
        """Have kexec load the kernel; nothing must be wrong by now."""
        self.guest.tool(f"kexec /run/lun{KERNEL_LUN} --initrd=/run/lun{INITRAMFS_LUN} {options}")
        self.guest.check_log()

    def check(self) -> None:
        """Wait for the new kernel. It has the data, and the server has nothing of the old one."""
        self.guest.wait_ready()
        assert checksum(self.guest, self.guest.disk(0)) == self.written
        write_and_compare(self.guest, self.guest.disk(0))
        join(self.guest)
        assert said(self.server, "INITIATE_CONTACT") == 2
        assert said(self.server, "UNLOAD") == said(self.server, "UNLOAD_RESPONSE") == 1


def test_a_kernel_starts_another_one_and_leaves_nothing_behind(lab: Lab):
    pair = Successor(lab, append=SUB_CHANNELS)
    pair.load("--load --reuse-cmdline")

    # What is read into the old kernel's memory must not get into the new one's.
    begin_load(pair.guest, pair.server, pair.name, PINGS)
    pair.guest.begin("chroot /tools kexec --exec")

    pair.check()
    # Two of the disk, two of the network.
    until(lambda: len(pair.server.guests()[0]["channels"]) == 4, what="the sub-channels")
    check_books(pair.server)
    pair.guest.check_log()
    pair.guest.power_off()


def test_a_crash_kernel_takes_over_on_a_processor_that_is_not_the_first(lab: Lab):
    # On Hyper-V, Linux reports a crash before it starts a crash kernel.
    pair = Successor(
        lab, "--on-panic=continue", memory="768M", append=f"{SUB_CHANNELS} crashkernel=256M"
    )
    command_line = pair.guest.run("cat /proc/cmdline").strip()
    words = [word for word in command_line.split() if not word.startswith("crashkernel=")]
    pair.load(f"--load-panic --append='{' '.join([*words, 'nr_cpus=1', 'reset_devices'])}'")

    begin_load(pair.guest, pair.server, pair.name, PINGS)
    pair.guest.begin("taskset -c 1 sh -c 'echo c >/proc/sysrq-trigger'")

    pair.check()
    assert "Kernel panic - not syncing: sysrq triggered crash" in pair.guest.vmm.log()
    _, contact = [each for each in pair.server.account() if each.name == "INITIATE_CONTACT"]
    assert contact.fields["target_vp"] == 1, "the only processor it has"
    check_books(pair.server)
    pair.guest.check_log()
    pair.guest.power_off()


def test_a_guest_that_panics_says_goodbye_and_why(lab: Lab):
    server = lab.serve("ram:[lun=0]16M", options=[NETWORK])
    guest = lab.boot(server, modules=MODULES)
    write_and_compare(guest, guest.disk(0))
    join(guest)
    guest.check_log()

    begin_load(guest, server, guest.disk(0), PINGS)
    guest.begin("echo c >/proc/sysrq-trigger")

    assert guest.wait() == 3
    assert "the guest panicked" in guest.vmm.log()
    assert "Kernel panic - not syncing: sysrq triggered crash" in guest.vmm.log()
    assert said(server, "UNLOAD") == said(server, "UNLOAD_RESPONSE") == 1
    until(lambda: server.guests() == [], what="the end of the guest")
    server.stop()


def test_a_guest_that_triple_faults_is_said_to_have_crashed(lab: Lab):
    server = lab.serve("ram:[lun=0]16M")
    guest = lab.boot(server, append="reboot=triple")
    guest.check_log()

    guest.begin("reboot -f")

    assert guest.wait() == 4
    until(lambda: server.guests() == [], what="the end of the guest")
    server.stop()


# ------------------------------------------------------------------------- interrupts move


def test_a_channels_interrupts_go_where_the_guest_sends_them(lab: Lab):
    cpus = 4
    server = lab.serve("ram:[lun=0]16M", options=["--subchannels=0"])
    guest = lab.boot(server, f"--cpus={cpus}")
    name = guest.disk(0)
    read = f"dd if=/dev/{name} of=/dev/null bs=4k count=50 iflag=direct 2>/dev/null"

    for cpu in (3, 1, 2, 0):
        guest.run(f"echo {cpu} >$(ls -d /sys/bus/vmbus/devices/*/channels/*/cpu)")
        # Whatever was on its way to the old one has arrived when something has come to the new.
        guest.run(read)
        before = interrupts(guest)
        guest.run(read)
        after = interrupts(guest)
        moved = [new - old for old, new in zip(before, after, strict=True)]
        assert moved[cpu] > 0
        assert sum(moved) == moved[cpu], f"interrupts, sent to {cpu}: {moved}"

    # And no interrupt is lost while they move: a read that waits for one would wait for ever.
    guest.run(
        f"(while [ ! -e /run/stop ]; do {read} || exit 1; done; echo >/run/stopped) &\n"
        f"for round in $(seq 10); do for cpu in $(seq 0 {cpus - 1}); do"
        f" echo $cpu >$(ls -d /sys/bus/vmbus/devices/*/channels/*/cpu) || exit 1; done; done\n"
        f"touch /run/stop; wait; [ -e /run/stopped ]"
    )
    answers = said(server, "MODIFYCHANNEL_RESPONSE")
    assert said(server, "MODIFYCHANNEL") >= 40
    assert answers in (0, said(server, "MODIFYCHANNEL")), "from 5.3 on, each is answered"
    write_and_compare(guest, name)
    guest.check_log()
    guest.power_off()
