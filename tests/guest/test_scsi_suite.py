"""``iscsi-test-cu``, libiscsi's conformance suite, against a disk of ours in a real guest.

It sends its commands with SG_IO, so they go through the guest's SCSI layer and ``hv_storvsc``.
What counts is the set of its failures and skips: all of them stand here, with their reasons.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

import pytest

from tests.guest.bench import Bench, open_bench, with_tools
from tests.guest.rig.assets import Assets
from tests.guest.rig.guest import TOOLS, Guest
from tests.support.patience import LONG_TEST

pytestmark = pytest.mark.timeout(LONG_TEST)
"""A safety net on busy machines, too, where everything is emulated."""

LONG = os.environ.get("VMBUS_LONG") == "1"

_MASKED = (
    "hv_storvsc makes a success of every INQUIRY that fails; "
    "test_the_guests_driver_hides_that_an_inquiry_failed shows it"
)
_TOO_LARGE = (
    "the tool reads 32 MiB with one command, which the guest's kernel does not even send; "
    "test_zeroed_blocks_are_read_where_the_suite_cannot does what it meant"
)

FAILURES = {
    "Inquiry.EVPD": _MASKED,
    "WriteSame16.Unmap": _TOO_LARGE,
}
"""Tests that fail, and why that is no fault of the disk."""

_ISCSI = "the tool can do it over iSCSI only: it takes sessions, or lies in iSCSI's own headers"
_NO_COPY = "EXTENDED COPY and RECEIVE COPY RESULTS are not implemented"
_NO_SANITIZE = "SANITIZE is not implemented; the tool wants to be told with -S to try it"
_NO_ATOMIC = "WRITE ATOMIC(16) is not implemented"
_FIXED = "the disk is not removable"
_WRITABLE = "the disk is writable; the tool is run on one that is not, too"
_NOT_ZERO = (
    "0 blocks would mean all blocks to the end; the disk says that it does not do that (WSNZ)"
)
_ONE_PATH = "there is one path to the disk"
_LARGE_BLOCKS = (
    "the disk's physical blocks are no larger than its logical ones; "
    "test_the_suite_finds_nothing_wrong_with_larger_physical_blocks runs it on one where they are"
)

SKIPS = {
    "CompareAndWrite.InvalidDataOutSize": _ISCSI,
    "ExtendedCopy.Simple": _NO_COPY,
    "ExtendedCopy.ParamHdr": _NO_COPY,
    "ExtendedCopy.DescrLimits": _NO_COPY,
    "ExtendedCopy.DescrType": _NO_COPY,
    "ExtendedCopy.ValidTgtDescr": _NO_COPY,
    "ExtendedCopy.ValidSegDescr": _NO_COPY,
    "MultipathIO.Simple": _ONE_PATH,
    "MultipathIO.Reset": _ONE_PATH,
    "MultipathIO.CompareAndWrite": _ONE_PATH,
    "MultipathIO.CompareAndWriteAsync": _ONE_PATH,
    "PreventAllow.Simple": _FIXED,
    "PreventAllow.Eject": _FIXED,
    "PreventAllow.ITNexusLoss": _FIXED,
    "PreventAllow.Logout": _FIXED,
    "PreventAllow.WarmReset": _FIXED,
    "PreventAllow.ColdReset": _FIXED,
    "PreventAllow.LUNReset": _FIXED,
    "PreventAllow.2ITNexuses": _FIXED,
    "ProutReserve.AccessEA": _ISCSI,
    "ProutReserve.AccessWE": _ISCSI,
    "ProutReserve.AccessEARO": _ISCSI,
    "ProutReserve.AccessWERO": _ISCSI,
    "ProutReserve.AccessEAAR": _ISCSI,
    "ProutReserve.AccessWEAR": _ISCSI,
    "ProutReserve.OwnershipEA": _ISCSI,
    "ProutReserve.OwnershipWE": _ISCSI,
    "ProutReserve.OwnershipEARO": _ISCSI,
    "ProutReserve.OwnershipWERO": _ISCSI,
    "ProutReserve.OwnershipEAAR": _ISCSI,
    "ProutReserve.OwnershipWEAR": _ISCSI,
    "ProutPreempt.RemoveRegistration": _ISCSI,
    "ReadOnly.ReadOnlySBC": _WRITABLE,
    "ReceiveCopyResults.CopyStatus": _NO_COPY,
    "ReceiveCopyResults.OpParams": _NO_COPY,
    "Reserve6.2Initiators": _ISCSI,
    "Reserve6.Logout": _ISCSI,
    "Reserve6.ITNexusLoss": _ISCSI,
    "Reserve6.TargetColdReset": _ISCSI,
    "Reserve6.TargetWarmReset": _ISCSI,
    "Reserve6.LUNReset": _ISCSI,
    "Sanitize.BlockErase": _NO_SANITIZE,
    "Sanitize.BlockEraseReserved": _NO_SANITIZE,
    "Sanitize.CryptoErase": _NO_SANITIZE,
    "Sanitize.CryptoEraseReserved": _NO_SANITIZE,
    "Sanitize.ExitFailureMode": _NO_SANITIZE,
    "Sanitize.InvalidServiceAction": _NO_SANITIZE,
    "Sanitize.Overwrite": _NO_SANITIZE,
    "Sanitize.OverwriteReserved": _NO_SANITIZE,
    "Sanitize.Readonly": _NO_SANITIZE,
    "Sanitize.Reservations": _NO_SANITIZE,
    "Sanitize.Reset": _NO_SANITIZE,
    "StartStopUnit.Simple": _FIXED,
    "WriteAtomic16.Simple": _NO_ATOMIC,
    "WriteAtomic16.BeyondEol": _NO_ATOMIC,
    "WriteAtomic16.ZeroBlocks": _NO_ATOMIC,
    "WriteAtomic16.WriteProtect": _NO_ATOMIC,
    "WriteAtomic16.DpoFua": _NO_ATOMIC,
    "WriteAtomic16.VPD": _NO_ATOMIC,
    "WriteSame10.InvalidDataOutSize": _LARGE_BLOCKS,
    "WriteSame10.UnmapUnaligned": _LARGE_BLOCKS,
    "WriteSame10.ZeroBlocks": _NOT_ZERO,
    "WriteSame16.InvalidDataOutSize": _LARGE_BLOCKS,
    "WriteSame16.UnmapUnaligned": _LARGE_BLOCKS,
    "WriteSame16.ZeroBlocks": _NOT_ZERO,
    "iSCSIcmdsn.iSCSICmdSnTooHigh": _ISCSI,
    "iSCSIcmdsn.iSCSICmdSnTooLow": _ISCSI,
    "iSCSIdatasn.iSCSIDataSnInvalid": _ISCSI,
    "iSCSIResiduals.Read10Invalid": _ISCSI,
    "iSCSIResiduals.Read10Residuals": _ISCSI,
    "iSCSIResiduals.Read12Residuals": _ISCSI,
    "iSCSIResiduals.Read16Residuals": _ISCSI,
    "iSCSIResiduals.Write10Residuals": _ISCSI,
    "iSCSIResiduals.Write12Residuals": _ISCSI,
    "iSCSIResiduals.Write16Residuals": _ISCSI,
    "iSCSIResiduals.WriteVerify10Residuals": _ISCSI,
    "iSCSIResiduals.WriteVerify12Residuals": _ISCSI,
    "iSCSIResiduals.WriteVerify16Residuals": _ISCSI,
}
"""Tests that the tool leaves out, and why."""

SILENT = {
    "NoMedia.NoMediaSBC": _FIXED,
    "StartStopUnit.PwrCnd": _FIXED,
    "StartStopUnit.NoLoej": _FIXED,
}
"""Tests that the tool leaves out without a word, and calls passed."""

FAMILIES = (
    "CompareAndWrite", "ExtendedCopy", "GetLBAStatus", "Inquiry", "Mandatory", "ModeSense6",
    "NoMedia", "PreventAllow", "Prin*", "Prout*", "Read6", "Read10", "ReadCapacity*", "ReadDefect*",
    "ReadOnly", "ReceiveCopyResults", "ReportSupportedOpcodes", "Reserve6", "Sanitize",
    "StartStopUnit", "TestUnitReady", "Unmap", "Verify10", "Write16", "WriteAtomic16",
    "WriteSame16", "WriteVerify10",
)  # fmt: skip
"""Families of the short form. The others are the same with other CDBs, or take long."""

_TEST = re.compile(r"^  Test: (\S+) \.\.\.", re.MULTILINE)
_SUITE = re.compile(r"^Suite: (\S+)", re.MULTILINE)


def run_suite(guest: Guest, name: str, tests: Iterable[str]) -> tuple[dict[str, str], str]:
    """Run tests, ``family.name``, on a disk. Returns what became of each test, and the output."""
    patterns = ",".join(f"ALL.{test}" for test in tests)
    # The exit code tells of failures only; the summary comes whatever happened.
    code, output = guest.attempt(
        f"chroot {TOOLS} iscsi-test-cu --dataloss --test={patterns} /dev/{name} 2>&1", 3000
    )
    assert "Tests completed with return value: 0" in output, (code, output)
    results = parse(output)
    ran = re.search(r"^\s+tests\s+(\d+)\s+(\d+)", output, re.MULTILINE)
    assert ran is not None
    assert int(ran[1]) == int(ran[2]) == len(results)
    return results, output


def parse(output: str) -> dict[str, str]:
    """Return what became of each test: passed, skipped or failed."""
    results: dict[str, str] = {}
    suites = _SUITE.split(output.partition("\nRun Summary:")[0])
    for suite, body in zip(suites[1::2], suites[2::2], strict=True):
        tests = _TEST.split(body)
        for name, text in zip(tests[1::2], tests[2::2], strict=True):
            verdict = "passed" if text.rstrip().endswith("passed") else "failed"
            if verdict == "passed" and "[SKIPPED]" in text:
                verdict = "skipped"
            results[f"{suite}.{name}"] = verdict
    return results


def named(results: dict[str, str], verdict: str) -> set[str]:
    return {name for name, each in results.items() if each == verdict}


@pytest.fixture(scope="module")
def bench(assets: Assets) -> Iterator[Bench]:
    with open_bench(assets, "scsi") as bench:
        yield bench


def test_the_suite_finds_nothing_wrong_with_a_disk(bench):
    # With 8 logical blocks in a physical one, GetLBAStatus.UnmapSingle asks for the status of block
    # i + 1 and expects an answer about block i + 8.
    lun, name = bench.add("ram", "100M", physical=512)

    families = ["*.*"] if LONG else [f"{family}.*" for family in FAMILIES]
    results, _ = run_suite(bench.guest, name, families)

    tally = {verdict: len(named(results, verdict)) for verdict in ("passed", "failed", "skipped")}
    print(tally)
    assert named(results, "failed") == FAILURES.keys() & results.keys()
    assert named(results, "skipped") == SKIPS.keys() & results.keys()
    assert named(results, "passed") >= SILENT.keys() & results.keys()
    if LONG:
        assert results.keys() >= FAILURES.keys() | SKIPS.keys() | SILENT.keys()
    bench.remove(lun)
    bench.check_log()


def test_the_suite_finds_nothing_wrong_with_larger_physical_blocks(bench):
    lun, name = bench.add("ram", "100M")
    tests = {test for test, reason in SKIPS.items() if reason is _LARGE_BLOCKS}

    results, output = run_suite(bench.guest, name, tests)

    assert results == dict.fromkeys(tests, "passed"), output
    bench.remove(lun)
    bench.check_log()


def test_the_suite_cannot_write_to_a_read_only_disk(bench):
    path = bench.file("fixed.img", 100 << 20)
    lun, name = bench.add("raw", str(path), ro=True)

    # The kernel opens the block device for reading only; the generic one lets the commands through.
    generic = bench.guest.run(f"ls /sys/block/{name}/device/scsi_generic").strip()
    results, output = run_suite(bench.guest, generic, ["ReadOnly.*"])

    # One test tries all commands that write; UNMAP does not exist where nothing can be freed.
    assert results.keys() == {"ReadOnly.ReadOnlySBC"}
    assert not named(results, "failed"), output
    assert set(re.findall(r"\[SKIPPED\] (.*)", output)) == {"UNMAP is not implemented."}
    assert path.stat().st_blocks == 0
    bench.remove(lun)
    bench.check_log()


def test_the_guests_driver_hides_that_an_inquiry_failed(bench):
    """The target refuses a page code without EVPD; see
    ``tests/unit/storvsp/scsi/test_target.py``."""
    lun, name = bench.add("ram", "16M")
    out = bench.do(f"sg_raw -r 96 /dev/{name} 12 00 01 00 60 00 2>&1")
    # Status and sense data are gone, but so is the data that an INQUIRY always has.
    assert "SCSI Status: Good" in out
    assert "No data received" in out
    out = bench.do(f"sg_raw -r 96 /dev/{name} 12 00 00 00 60 00 2>&1")
    assert "Received 96 bytes of data" in out
    bench.remove(lun)
    bench.check_log()


def test_the_status_of_a_block_is_about_that_block(bench):
    lun, name = bench.add("ram", "16M")
    bench.do(
        f"dd if=/dev/urandom of=/dev/{name} bs=64k count=4 oflag=direct status=none;"
        f" sg_unmap --lba=0 --num=128 --force /dev/{name}"
    )
    for block, count, state in (
        (0, 128, "deallocated"),
        (9, 119, "deallocated"),
        (128, 384, "map"),
    ):
        out = bench.do(f"sg_get_lba_status --lba={block} /dev/{name}")
        assert re.search(
            rf"^\[1\] LBA: 0x{block:016x}  blocks: +{count}  {state}", out, re.MULTILINE
        )
    bench.remove(lun)
    bench.check_log()


def test_zeroed_blocks_are_read_where_the_suite_cannot(bench):
    lun, name = bench.add("ram", "64M")
    device = f"/dev/{name}"
    read = f"sg_dd if={device} of=/dev/null bs=512 count=65536 blk_sgio=1 cdbsz=16"
    limit = int(bench.guest.run(f"cat /sys/block/{name}/queue/max_hw_sectors_kb")) << 10
    assert limit < 65536 * 512

    code, out = bench.guest.attempt(with_tools(f"{read} bpt=65536 2>&1"))
    assert code
    assert "reading (SG_IO) on sg device, error: Input/output error" in out

    bench.do(
        f"head -c {33 << 20} /dev/zero | tr '\\0' x |"
        f" dd of={device} bs=1M iflag=fullblock oflag=direct status=none;"
        " head -c 512 /dev/zero >/run/zeros;"
        f" sg_raw -s 512 -i /run/zeros {device} 93 08 {'00 ' * 8} 00 01 00 00 00 00;"
        f" {read} bpt={limit // 512}"
    )
    code, out = bench.guest.attempt(
        with_tools(f"dd if={device} bs=1M count=33 iflag=direct status=none | cmp - /dev/zero")
    )
    assert code == 1, out
    assert f"char {(32 << 20) + 1}," in out
    bench.remove(lun)
    bench.check_log()
