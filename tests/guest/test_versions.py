"""A real kernel at every version of its ladder, in both SynIC modes, on several processors."""

from __future__ import annotations

import pytest

from tests.guest.conftest import Lab, Server
from tests.guest.rig.disk_work import write_and_compare
from tests.guest.rig.guest import Guest
from tests.guest.rig.looks import interrupts, version_in
from tests.guest.rig.network_work import get_address, interface, ping
from vmbus.wire.versions import Version

LOWER_VERSIONS = ("5.2", "5.1", "5.0", "4.1", "4.0", "3.0", "2.4")
"""What Linux goes on to where it is refused (linux/drivers/hv/connection.c, vmbus_versions)."""
NEWEST_OF_OLD_KERNELS = Version.V5_2
"""Until Linux 5.12."""
CPUS = 4


MAC = "00:15:5d:00:aa:01"
NETWORK = f"--net=nat:[with=built-in,mac={MAC}]"
MODULES = ("hv_storvsc", "sd_mod", "hv_netvsc")
GATEWAY = "10.0.2.2"


def use_network(guest: Guest) -> None:
    """Have a guest get an address, and send what goes in several pages."""
    get_address(guest, interface(guest, MAC))
    ping(guest, GATEWAY, size=1400)


def asked(server: Server) -> list[str]:
    """Return the versions that the guest has asked for, in order."""
    return [
        str(said.fields["version"]) for said in server.account() if said.name == "INITIATE_CONTACT"
    ]


def supported(server: Server) -> list[object]:
    """Return the server's answers: 1 for yes."""
    return [
        said.fields["version_supported"]
        for said in server.account()
        if said.name == "VERSION_RESPONSE"
    ]


def test_the_newest_version_the_kernel_speaks_is_agreed_on_at_once(lab: Lab):
    server = lab.serve("ram:[lun=0]16M", options=[NETWORK])
    guest = lab.boot(server, modules=MODULES)

    write_and_compare(guest, guest.disk(0))
    use_network(guest)

    # Kernels ask for their newest first; which one that is depends on the kernel.
    assert asked(server) == [version_in(guest)]
    assert supported(server) == [1]
    assert server.guests()[0]["version"] == version_in(guest)
    guest.check_log()
    guest.power_off()


@pytest.mark.parametrize("version", LOWER_VERSIONS)
def test_disk_and_network_work_at_every_version_that_the_server_holds_the_guest_to(
    lab: Lab, version: str
):
    server = lab.serve("ram:[lun=0]16M", options=["--max-version", version, NETWORK])
    guest = lab.boot(server, modules=MODULES)

    write_and_compare(guest, guest.disk(0))
    use_network(guest)

    ladder = [Version.from_text(each) for each in asked(server)]
    assert ladder == sorted(set(ladder), reverse=True), "the guest goes down, step by step"
    assert supported(server) == [0] * (len(ladder) - 1) + [1]
    # A kernel that knows nothing newer has no reason to go down.
    assert len(ladder) > 1 or ladder[0] == NEWEST_OF_OLD_KERNELS
    assert str(ladder[-1]) == version == version_in(guest) == server.guests()[0]["version"]
    assert server.guests()[0]["faults"] == 0
    assert server.adapters()[0]["refused"] == 0
    guest.check_log()
    guest.power_off()


@pytest.mark.parametrize("mode", ["kernel", "user"])
def test_both_synics_carry_messages_and_interrupts(lab: Lab, mode: str):
    server = lab.serve("ram:[lun=0]16M")
    guest = lab.boot(server, f"--synic={mode}", "-v")

    write_and_compare(guest, guest.disk(0))

    assert f"the SynIC is the {mode}'s" in guest.vmm.log()
    assert interrupts(guest)[0] > 0
    guest.check_log()
    guest.power_off()


def test_the_channels_interrupts_are_spread_over_all_processors(lab: Lab):
    server = lab.serve("ram:[lun=0]16M")
    guest = lab.boot(server, f"--cpus={CPUS}", append="hv_storvsc.storvsc_vcpus_per_sub_channel=1")
    name = guest.disk(0)

    assert guest.run("grep -c ^processor /proc/cpuinfo").strip() == str(CPUS)
    targets = guest.run("cat /sys/bus/vmbus/devices/*/channels/*/cpu").split()
    assert sorted(targets) == [str(cpu) for cpu in range(CPUS)]
    before = interrupts(guest)
    guest.run(
        f"for cpu in $(seq 0 {CPUS - 1}); do taskset -c $cpu"
        f" dd if=/dev/{name} of=/dev/null bs=4k count=40 iflag=direct 2>/dev/null || exit 1; done"
    )
    after = interrupts(guest)
    assert all(new > old for old, new in zip(before, after, strict=True)), (before, after)
    write_and_compare(guest, name)
    guest.check_log()
    guest.power_off()
