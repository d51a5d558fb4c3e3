"""Disks under a real kernel: file systems, verified load, and what operators do meanwhile."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.bench import Bench, do, open_bench, wait_in, with_tools
from tests.guest.conftest import TOOLS_LUN, Server
from tests.guest.rig.assets import Assets
from tests.guest.rig.guest import TOOLS, Guest, until
from tests.guest.rig.packages import run as run_here
from tests.support.patience import LONG_TEST, STANDSTILL

pytestmark = pytest.mark.timeout(LONG_TEST)
"""A safety net on busy machines, too, where everything is emulated."""

MIB = 1 << 20

LONG = os.environ.get("VMBUS_LONG") == "1"
"""The long campaign: more data, longer pauses."""

FOUR_PROCESSORS = (
    # Otherwise a guest wants one more channel for every four processors only.
    "hv_storvsc.storvsc_vcpus_per_sub_channel=1",
    # They share the outer machine's two, which may be emulated ones on a busy machine: that a
    # processor stands still for seconds is no complaint. One that does for good still is.
    "rcupdate.rcu_cpu_stall_timeout=300", "watchdog_thresh=60",
)  # fmt: skip
"""More for the command line of a guest with as many channels as processors."""

GONE = (
    r"hv_storvsc \S+ tag#\d+ cmd 0x\w+ status: scsi 0x0 srb 0x20 (?:hv|host) 0x0",
    r"hv_storvsc \S+ tag#\d+ cmd 0x\w+ status: scsi 0x40 srb 0x1 (?:hv|host) 0x0",
    r"\[{name}\] tag#\d+ FAILED Result: hostbyte=DID_NO_CONNECT",
    r"I/O error, dev {name}, sector",
    r"Buffer I/O error on dev {name}",
    r"rejecting I/O to (?:offline|dead) device",
)
"""What a kernel says of a disk that is taken away under it: the address does not exist any more;
commands that were under way have been aborted."""


def size_of(guest: Guest, name: str) -> int:
    """Return the bytes of a disk, as the guest sees it."""
    return 512 * int(guest.run(f"cat /sys/block/{name}/size"))


def allocated(path: Path) -> int:
    """Return the bytes that a file takes on the host."""
    return 512 * path.stat().st_blocks


def fio(name: str, *options: str) -> str:
    """Return a command that checks all it reads, sooner or later."""
    return " ".join(
        ["fio", "--name=job", f"--filename=/dev/{name}", "--ioengine=libaio", "--iodepth=32",
         "--rw=randrw", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
         "--group_reporting", *options]
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared_bench(assets: Assets) -> Iterator[Bench]:
    with open_bench(assets, "storage") as bench:
        yield bench


@pytest.fixture
def bench(shared_bench: Bench) -> Bench:
    shared_bench.guest.run("dmesg -c >/dev/null")
    return shared_bench


# ----------------------------------------------------------------------------------- file systems


def test_a_guest_lives_on_a_root_file_system_of_ours(lab):
    server = lab.serve(f"overlay:raw:[ro]{lab.assets.root}")
    guest = lab.boot(server, root="tools")
    words = guest.run("findmnt -no SOURCE,FSTYPE,OPTIONS /").split()
    assert words[:2] == ["/dev/sda", "ext4"]
    assert words[2].startswith("rw,")

    guest.run(f"head -c {4 * MIB} /dev/urandom >/var/lib/blob; sync")
    written = guest.run("sha256sum /var/lib/blob").split()[0]
    guest.begin("busybox reboot -f")
    guest.wait_ready()

    assert guest.run("sha256sum /var/lib/blob").split()[0] == written
    guest.check_log()
    guest.run("mount -o remount,ro / && echo 3 >/proc/sys/vm/drop_caches && e2fsck -fn /dev/sda")
    guest.power_off()


def test_a_file_system_made_in_the_guest_keeps_what_it_is_given(bench):
    path = bench.file("ext4.img", 64 * MIB)
    lun, name = bench.add("raw", str(path))
    out = bench.do(
        f"mkfs.ext4 -q -E lazy_itable_init=0 /dev/{name}; mount /dev/{name} /mnt;"
        f" mkdir -p /mnt/a/b; head -c {8 * MIB} /dev/urandom >/mnt/a/b/blob;"
        " seq 500 | (cd /mnt/a; xargs touch); sync; sha256sum </mnt/a/b/blob; umount /mnt;"
        f" echo 3 >/proc/sys/vm/drop_caches; mount -o ro /dev/{name} /mnt;"
        " sha256sum </mnt/a/b/blob; ls /mnt/a | wc -l; umount /mnt"
    ).split()
    assert out[0] == out[2]
    assert out[4] == "501"
    bench.do(f"e2fsck -fn /dev/{name}")
    bench.remove(lun)

    # The same on this side, from the file alone.
    run_here("e2fsck", "-fn", str(path))
    bench.check_log()


def test_trimmed_and_discarded_space_goes_back_to_the_host(bench):
    path = bench.file("thin.img", 64 * MIB)
    lun, name = bench.add("raw", str(path))
    bench.do(f"mkfs.ext4 -q /dev/{name}; mount /dev/{name} /mnt")
    empty = allocated(path)
    bench.do(f"head -c {16 * MIB} /dev/urandom >/mnt/blob; sync")
    full = allocated(path)
    assert full >= empty + 16 * MIB

    bench.do("rm /mnt/blob; sync; fstrim /mnt")

    assert allocated(path) <= full - 15 * MIB
    bench.do("umount /mnt")

    bench.do(f"dd if=/dev/urandom of=/dev/{name} bs=1M count=8 oflag=direct status=none")
    assert allocated(path) >= 8 * MIB
    bench.do(f"blkdiscard /dev/{name}")
    assert allocated(path) == 0
    bench.do(f"dd if=/dev/{name} bs=1M iflag=direct status=none | cmp -n {64 * MIB} - /dev/zero")
    bench.remove(lun)
    bench.check_log()


def test_an_image_of_a_cd_is_read_as_one(bench):
    path = bench.file("cd.img", 32 * MIB)
    lun, name = bench.add("raw", str(path))
    # The guest has the program that makes such images, so it makes one on a disk.
    bench.do(
        "mkdir -p /run/cd/deep/er; seq 20000 >/run/cd/deep/numbers;"
        f" head -c {3 * MIB + 17} /dev/urandom >/run/cd/deep/er/blob;"
        f" genisoimage -quiet -J -R -V TESTCD -o /run/cd.iso /run/cd;"
        f" dd if=/run/cd.iso of=/dev/{name} bs=1M conv=fsync status=none"
    )
    size = int(bench.do("stat -c %s /run/cd.iso; rm /run/cd.iso"))
    bench.remove(lun)
    os.truncate(path, size)
    image = hashlib.sha256(path.read_bytes()).hexdigest()

    bench.guest.run("modprobe sr_mod && modprobe isofs")
    lun, name = bench.add("cd", str(path))

    assert name.startswith("sr")
    assert size_of(bench.guest, name) == size
    assert bench.guest.run(f"cat /sys/block/{name}/removable").strip() == "1"
    code, _ = bench.guest.attempt(with_tools(f"dd if=/dev/zero of=/dev/{name} bs=2048 count=1"))
    assert code, "nothing can be written to a CD-ROM"
    assert bench.do(f"blkid -o value -s LABEL /dev/{name}").strip() == "TESTCD"
    bench.do(f"mount -t iso9660 -o ro /dev/{name} /mnt; diff -r /run/cd /mnt; umount /mnt")
    # Direct: what the drive gives, not what the page cache has.
    bench.do(f"dd if=/dev/{name} bs=2048 iflag=direct status=none | sha256sum >/run/sum")
    assert bench.guest.run("cat /run/sum; rm -r /run/cd").split()[0] == image
    bench.remove(lun)
    bench.check_log()


# ------------------------------------------------------------------------------------------- load


@pytest.mark.parametrize("channels", [1, 4])
def test_verified_load_of_depth_32_uses_every_channel(lab, channels):
    size = (64 if LONG else 2) * MIB
    path = lab.file("load.img", 4 * size)
    server = lab.serve(f"raw:[lun=0]{path}", lab.tools, options=[f"--subchannels={channels - 1}"])
    guest = lab.boot(server, "--cpus=4", append=" ".join(FOUR_PROCESSORS))
    guest.mount_tools(TOOLS_LUN)
    name = guest.disk(0)
    before = packets_of_channels(server)
    assert len(before) == channels

    # One job for each processor, as a processor sends on the channel that is nearest to it.
    spread = ["--numjobs=4", "--cpus_allowed=0-3", "--cpus_allowed_policy=split",
              f"--size={size}", f"--offset_increment={size}"]  # fmt: skip
    do(guest, fio(name, *spread, "--bssplit=4k/70:32k/20:128k/10", "--direct=1"))

    after = packets_of_channels(server)
    assert len(after) == channels
    assert all(now > then + 50 for now, then in zip(after, before, strict=True))

    # Reads what it wrote from the disk all the same: it empties the page cache in between.
    do(guest, fio(name, *spread, "--bs=4k", "--direct=0"))
    # The parameters themselves look like complaints of what they are about.
    guest.check_log(["ommand line: ", "RCU CPU stall warnings timeout set"])
    guest.power_off()


def packets_of_channels(server: Server) -> list[int]:
    """Return how many packets came through each open channel of the only guest."""
    [description] = server.guests()
    return [channel["packets_in"] for channel in description["channels"]]


def test_a_server_that_stands_still_loses_nothing(lab):
    server = lab.serve("raw:[create=64M,lun=0]" + str(lab.file("paused.img")), lab.tools)
    guest = lab.boot(server)
    guest.mount_tools(TOOLS_LUN)
    name = guest.disk(0)
    job = guest.begin(
        with_tools(fio(name, "--bs=4k", "--direct=1", f"--size={64 if LONG else 6}M"))
    )
    start = sum(packets_of_channels(server))
    until(lambda: sum(packets_of_channels(server)) > start + 200, what="the load's start")

    server.command.send_signal(signal.SIGSTOP)
    time.sleep(STANDSTILL)
    server.command.send_signal(signal.SIGCONT)

    code, text = guest.finish(job)
    assert code == 0, text
    assert "err= 0" in text
    guest.check_log()
    guest.power_off()


# ----------------------------------------------------------------------- what disks say and refuse


def test_sg3_utils_find_the_disk_we_describe(bench):
    lun, name = bench.add("ram", "48M")
    device = f"/dev/{name}"

    out = bench.do(f"sg_inq {device}")
    assert re.search(r"PQual=0 .*RMB=0 .*version=0x05 +\[SPC-3\]", out)
    assert "Peripheral device type: disk" in out
    assert re.search(r"Vendor identification: Msft\s", out)
    assert re.search(r"Product identification: Virtual Disk\s", out)
    serial = re.search(r"Unit serial number: (\w+)", out)
    assert serial is not None

    out = bench.do(f"sg_readcap {device}")
    assert "Last LBA=98303 (0x17fff), Number of logical blocks=98304" in out
    assert "Logical block length=512 bytes" in out
    out = bench.do(f"sg_readcap --16 {device}")
    assert "prot_en=0" in out
    assert "lbpme=1, lbprz=1" in out
    assert "Number of logical blocks=98304" in out
    assert "so physical block length=4096 bytes" in out

    out = bench.do(f"sg_luns {device}")
    assert re.findall(r"^ +(\w{16})$", out, re.MULTILINE) == [
        f"{each:04x}{0:012x}" for each in (lun, TOOLS_LUN)
    ]

    out = bench.do(f"sg_vpd --raw --page=0 {device} | od -An -tx1")
    assert out.strip() == "00 00 00 06 00 80 83 b0 b1 b2"
    out = bench.do(f"sg_vpd --page=0x80 {device}")
    assert f"Unit serial number: {serial[1]}" in out
    out = bench.do(f"sg_vpd --page=0x83 {device}")
    naa = re.search(r"0x(6002248\w{25})\b", out)
    assert naa is not None
    # What udev makes /dev/disk/by-id of.
    wwid = bench.guest.run(f"cat /sys/block/{name}/device/wwid").strip()
    assert wwid == f"naa.{naa[1]}"
    out = bench.do(f"sg_vpd --page=0xb0 {device}")
    assert re.search(r"Maximum compare and write length: 128\b", out)
    assert re.search(r"Maximum unmap block descriptor count: 256\b", out)
    assert re.search(r"Maximum write same length: 0x200000 blocks", out)
    out = bench.do(f"sg_vpd --page=0xb1 {device}")
    assert "Non-rotating medium" in out
    out = bench.do(f"sg_vpd --page=0xb2 {device}")
    assert re.search(r"\(LBPU\): 1", out)
    assert re.search(r"thin provisioned", out)
    # A page that is not there is refused, not made up.
    code, out = bench.guest.attempt(with_tools(f"sg_vpd --page=0x89 {device} 2>&1"))
    assert code, out

    bench.remove(lun)
    bench.check_log()


def test_a_disk_with_large_sectors_is_used_as_one(bench):
    lun, name = bench.add("ram", "32M", sector=4096)
    out = bench.do(f"cat /sys/block/{name}/queue/logical_block_size; sg_readcap --16 /dev/{name}")
    assert out.split()[0] == "4096"
    bench.do(fio(name, "--bs=4k", "--size=1M", "--direct=1"))
    bench.remove(lun)
    bench.check_log()


def test_a_read_only_disk_refuses_writes(bench):
    path = bench.file("fixed.img")
    path.write_bytes(os.urandom(MIB))
    image = hashlib.sha256(path.read_bytes()).hexdigest()
    lun, name = bench.add("raw", str(path), ro=True)
    assert bench.guest.run(f"cat /sys/block/{name}/ro").strip() == "1"

    code, text = bench.guest.attempt(
        with_tools(f"dd if=/dev/zero of=/dev/{name} bs=4k count=1 oflag=direct")
    )
    assert code, text
    # Past the kernel's own check: the disk itself says no.
    generic = bench.guest.run(f"ls /sys/block/{name}/device/scsi_generic").strip()
    code, text = bench.guest.attempt(
        with_tools(
            f"head -c 512 /dev/zero >/run/zeros;"
            f" sg_raw -s 512 -i /run/zeros /dev/{generic} 2a 00 00 00 00 00 00 00 01 00"
        )
    )
    assert code == 7, text
    assert "Sense key: Data Protect" in text

    out = bench.do(f"dd if=/dev/{name} bs=64k iflag=direct status=none | sha256sum")
    assert out.split()[0] == image
    bench.remove(lun)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == image
    bench.check_log()


def test_a_medium_error_stays_at_its_sector(bench):
    bad, around = 20_011, 24
    lun, name = bench.add("fault", "ram:32M", lba=bad, on="read", error="medium")

    # With sg_dd: dd falls back to the page cache with Linux 5.10, and that reads whole pages.
    read = f"sg_dd if=/dev/{name} of=/dev/null bs=512 iflag=direct count=1"
    out = bench.do(
        f"for at in $(seq {bad - around} {bad + around}); do"
        f" {read} skip=$at >/run/said 2>&1 || echo $at; done"
    )
    assert out.split() == [str(bad)]
    code, out = bench.guest.attempt(with_tools(f"{read} skip={bad} 2>&1"))
    assert code
    # Linux's word for a medium error: ENODATA. Who reads through the page cache gets EIO.
    assert "No data available" in out
    code, out = bench.guest.attempt(
        with_tools(f"dd if=/dev/{name} of=/dev/null bs=512 skip={bad} count=1")
    )
    assert code
    assert "Input/output error" in out

    # The disk names the sector that is bad in a large request. hv_storvsc says that nothing of it
    # was transferred, so for Linux it is bad from its start; the sense data knows better.
    first = bad - 100
    code, out = bench.guest.attempt(
        with_tools(
            f"sg_raw -r 64k /dev/{name} 28 00 {first.to_bytes(4, 'big').hex(' ')} 00 00 80 00 2>&1"
        )
    )
    assert code, out
    assert "Sense key: Medium Error" in out
    assert re.search(rf"Info fld=0x{bad:x} \[{bad}\]", out)
    log = bench.guest.dmesg()
    page = bad // 8 * 8
    assert set(re.findall(rf"medium error, dev {name}, sector (\d+)", log)) == {
        str(bad),
        str(page),
    }
    # Writing is what this fault is not for.
    bench.do(f"sg_dd if=/dev/zero of=/dev/{name} bs=512 oflag=direct seek={bad} count=1 2>&1")
    bench.remove(lun)
    bench.check_log([
        rf"\[{name}\] tag#\d+ (?:FAILED Result: hostbyte=DID_OK|Sense Key : Medium Error)",
        rf"\[{name}\] tag#\d+ Add. Sense: Unrecovered read error",
        rf"critical medium error, dev {name}, sector (?:{bad}|{page}) ",
        rf"Buffer I/O error on dev {name}, logical block {bad // 8},",
    ])  # fmt: skip


# ----------------------------------------------------------------------- what operators do to them


def test_a_disk_pulled_under_load_fails_its_own_requests_only(bench):
    kept_lun, kept = bench.add("ram", "64M")
    # With requests under way at any time.
    lun, name = bench.add("delay", "ram:64M", read="10ms", write="10ms")
    guest = bench.guest
    guest.run("rm -f /run/stop /run/rounds /run/kept /run/pulled")
    guest.run(
        f"""
        chroot {TOOLS} sh -c '
            code=0
            while [ $code = 0 ] && [ ! -e /run/stop ]; do
                {fio(kept, "--bs=4k", "--size=1M", "--direct=1")} >/run/kept.log 2>&1
                code=$?
                echo round >>/run/rounds
            done
            echo $code >/run/kept' &
        chroot {TOOLS} sh -c '
            fio --name=job --filename=/dev/{name} --ioengine=libaio --iodepth=16 --rw=randrw \
                --bs=4k --direct=1 --time_based --runtime=3600 >/run/pulled.log 2>&1
            echo $? >/run/pulled' &
        """
    )
    wait_in(guest, f"[ $(awk '{{print $1 + $5}}' /sys/block/{name}/stat) -gt 200 ]")
    wait_in(guest, "[ -e /run/rounds ]")

    bench.pull(lun)

    wait_in(guest, "[ -e /run/pulled ]")
    assert guest.run("cat /run/pulled").strip() != "0"
    assert re.search(
        r"error=(?:Input/output error|No such device)", guest.run("cat /run/pulled.log")
    )
    rounds = int(guest.run("wc -l </run/rounds"))
    wait_in(guest, f"[ $(wc -l </run/rounds) -gt {rounds + 1} ]")
    guest.run("touch /run/stop")
    wait_in(guest, "[ -e /run/kept ]")
    assert guest.run("cat /run/kept").strip() == "0", guest.run("cat /run/kept.log")
    bench.remove(kept_lun)
    bench.check_log([each.format(name=name) for each in GONE])


def test_a_disk_and_its_file_system_grow_in_use(bench):
    path = bench.file("grow.img", 64 * MIB)
    lun, name = bench.add("raw", str(path))
    bench.do(
        f"mkfs.ext4 -q /dev/{name}; mount /dev/{name} /mnt;"
        f" head -c {8 * MIB} /dev/urandom >/mnt/blob; sync"
    )
    checksum = bench.do("sha256sum </mnt/blob").split()[0]

    assert bench.server.disk("resize", str(lun), "128M") == {"size": 128 * MIB}

    # The guest reads the capacity anew by itself; nobody tells it to.
    wait_in(bench.guest, f"[ $(cat /sys/block/{name}/size) = {128 * MIB // 512} ]")
    bench.do(
        f"resize2fs /dev/{name}; fallocate -l 80M /mnt/more;"
        " head -c 4096 /dev/urandom | dd of=/mnt/more bs=4k seek=20000 conv=notrunc,fsync"
    )
    assert bench.do("sha256sum </mnt/blob").split()[0] == checksum
    bench.do(f"umount /mnt; e2fsck -fn /dev/{name}")
    bench.remove(lun)
    bench.check_log()
