"""ACPI tables, read back by Intel's own disassembler."""

import re
import struct
import subprocess

import pytest

from tests.support.acpi import disassemble
from vmbus.errors import ConfigError
from vmbus.kvm import acpi

GIB = 1 << 30
MMIO = (4 * GIB, GIB)


def tables(vp_count=1, mmio=MMIO):
    """Return the tables by signature."""
    return {table[:4]: table for _gpa, table in acpi.build_tables(vp_count, mmio=mmio)[0]}


def decoded(iasl, folder, signature, vp_count=1):
    return disassemble(iasl, folder, tables(vp_count)[signature])


# -- placing and sums ------------------------------------------------------------------------------


@pytest.mark.parametrize("vp_count", [1, 4, 254])
def test_tables_are_aligned_below_the_first_mib_and_do_not_overlap(vp_count):
    placed, rsdp = acpi.build_tables(vp_count, mmio=MMIO)
    assert placed[0][0] == rsdp == acpi.TABLES_GPA
    end = acpi.TABLES_GPA
    for gpa, table in placed:
        assert gpa >= end
        assert gpa % 64 == 0
        end = gpa + len(table)
    assert end <= acpi.TABLES_END


def test_everything_that_has_a_checksum_sums_to_zero():
    placed, _ = acpi.build_tables(2, mmio=MMIO)
    for _gpa, table in placed[1:]:
        assert struct.unpack_from("<I", table, 4)[0] == len(table)
        if table[:4] != b"FACS":
            assert sum(table) & 0xFF == 0
    rsdp = placed[0][1]
    assert sum(rsdp[:20]) & 0xFF == sum(rsdp) & 0xFF == 0


def test_the_tables_lead_to_one_another():
    placed, rsdp = acpi.build_tables(2, mmio=MMIO)
    at = dict(placed)
    assert at[rsdp].startswith(b"RSD PTR ")
    revision, length, xsdt = struct.unpack_from("<B4xIQ", at[rsdp], 15)
    assert (revision, length) == (2, len(at[rsdp]))
    listed = struct.unpack_from("<2Q", at[xsdt], 36)
    assert [at[each][:4] for each in listed] == [b"FACP", b"APIC"]
    facs, dsdt = struct.unpack_from("<II", at[listed[0]], 36)
    assert at[facs][:4] == b"FACS"
    assert at[dsdt][:4] == b"DSDT"
    assert struct.unpack_from("<Q", at[listed[0]], 140)[0] == dsdt


def test_the_device_window_is_above_4_gib_and_above_all_memory():
    for regions in ([(0, GIB)], [(0, 3 * GIB), (4 * GIB, GIB + 4096)], []):
        gpa, size = acpi.mmio_window(regions)
        assert size >= acpi.MIN_MMIO_SIZE
        assert gpa >= 4 * GIB
        assert all(start + length <= gpa for start, length in regions)
    assert acpi.mmio_window([(4 * GIB, GIB + 4096)])[0] == 6 * GIB


@pytest.mark.parametrize(
    ("vp_count", "mmio", "gpa", "complaint"),
    [
        (0, MMIO, acpi.TABLES_GPA, "0 processors: 1 to 254"),
        (255, MMIO, acpi.TABLES_GPA, "255 processors"),
        (1, (4 * GIB, (128 << 20) - 1), acpi.TABLES_GPA, "0x8000000 bytes at least"),
        (1, (-1, GIB), acpi.TABLES_GPA, "at least"),
        (1, (2**64 - GIB, 2 * GIB), acpi.TABLES_GPA, "cannot be described"),
        (254, MMIO, 0xFF800, "do not fit"),
    ],
)
def test_machines_that_cannot_be_described_are_refused(vp_count, mmio, gpa, complaint):
    with pytest.raises(ConfigError, match=complaint):
        acpi.build_tables(vp_count, mmio=mmio, gpa=gpa)


# -- as the disassembler sees them -----------------------------------------------------------------


def test_the_vmbus_device_has_its_identifiers_interrupt_and_window(iasl, tmp_path):
    text = decoded(iasl, tmp_path, b"DSDT")
    assert (
        'Device (VMBS) { Name (_HID, "MSFT1000") // _HID: Hardware ID Name (_CID, "VMBus")' in text
    )
    assert 'Scope (\\_SB) { Device (VMOD) { Name (_HID, "ACPI0004"' in text
    # The window is the module's, above the device in it.
    assert text.index("Device (VMOD)") < text.index("QWordMemory") < text.index("Device (VMBS)")
    assert "Name (_UID, Zero)" in text
    assert "Name (_STA, 0x0F)" in text
    assert "IRQ (Edge, ActiveHigh, Exclusive, ) {5}" in text
    assert (
        "QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, "
        "0x0000000000000000, // Granularity "
        "0x0000000100000000, // Range Minimum "
        "0x000000013FFFFFFF, // Range Maximum "
        "0x0000000000000000, // Translation Offset "
        "0x0000000040000000, // Length ,, , AddressRangeMemory, TypeStatic)"
    ) in text


def test_the_serial_port_is_described(iasl, tmp_path):
    text = decoded(iasl, tmp_path, b"DSDT")
    assert 'Device (COM1) { Name (_HID, EisaId ("PNP0501")' in text
    assert (
        "IO (Decode16, 0x03F8, // Range Minimum 0x03F8, // Range Maximum "
        "0x01, // Alignment 0x08, // Length ) IRQ (Edge, ActiveHigh, Exclusive, ) {4}"
    ) in text


def test_power_off_is_sleep_type_5(iasl, tmp_path):
    text = decoded(iasl, tmp_path, b"DSDT")
    assert (
        "Name (\\_S5, Package (0x04) // _S5_: S5 System State { 0x05, 0x05, Zero, Zero })" in text
    )


def test_what_the_disassembler_says_compiles_without_a_complaint(iasl, tmp_path):
    decoded(iasl, tmp_path, b"DSDT")
    done = subprocess.run(
        [iasl, "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "0 Errors, 0 Warnings" in done.stdout


def test_the_fadt_describes_power_timer_and_reset(iasl, tmp_path):
    text = decoded(iasl, tmp_path, b"FACP")
    for line in (
        "Revision : 06",
        "SCI Interrupt : 0009",
        "SMI Command Port : 00000000",
        "PM1A Event Block Address : 00000600",
        "PM1A Control Block Address : 00000604",
        "PM Timer Block Address : 00000608",
        "PM1 Event Block Length : 04",
        "PM1 Control Block Length : 02",
        "PM Timer Block Length : 04",
        "GPE0 Block Length : 00",
        "RTC Century Index : 32",
        "8042 Present on ports 60/64 (V2) : 0",
        "VGA Not Present (V4) : 1",
        "CMOS RTC Not Present (V5) : 0",
        "Control Method Power Button (V1) : 0",
        "Control Method Sleep Button (V1) : 1",
        "32-bit PM Timer (V1) : 1",
        "Reset Register Supported (V2) : 1",
        "Hardware Reduced (V5) : 0",
        "Value to cause reset : 06",
    ):
        assert line in text
    for block, width, address in (
        ("Reset Register", 8, 0xCF9),
        ("PM1A Event Block", 32, 0x600),
        ("PM1A Control Block", 16, 0x604),
        ("PM Timer Block", 32, 0x608),
    ):
        found = re.search(rf"\] {block} : \[Generic.*?Address : (\w+)(.*?)\[Generic", text)
        assert found is not None
        whole = found[0]
        assert "Space ID : 01 [SystemIO]" in whole
        assert f"Bit Width : {width:02X}" in whole
        assert int(found[1], 16) == address


def test_the_madt_has_one_local_apic_per_processor_and_the_usual_overrides(iasl, tmp_path):
    text = decoded(iasl, tmp_path, b"APIC", vp_count=4)
    assert "Local Apic Address : FEE00000" in text
    assert "PC-AT Compatibility : 1" in text
    cpus = re.findall(
        r"\[Processor Local APIC\].*?Processor ID : (\w+).*?Local Apic ID : (\w+)"
        r".*?Processor Enabled : (\d)",
        text,
    )
    assert cpus == [(f"{each:02}", f"{each:02}", "1") for each in range(4)]
    apic = re.search(r"\[I/O APIC\].*?Address : (\w+).*?Interrupt : (\w+)", text)
    assert apic is not None
    assert apic.groups() == ("FEC00000", "00000000")
    overrides = re.findall(
        r"\[Interrupt Source Override\].*?Source : (\w+).*?Interrupt : (\w+)"
        r".*?Polarity : (\d) .*?Trigger Mode : (\d)",
        text,
    )
    assert overrides == [("00", "00000002", "0", "0"), ("09", "00000009", "1", "3")]
    assert re.search(r"\[Local APIC NMI\].*?Processor ID : FF .*Interrupt Input LINT : 01", text)


@pytest.mark.parametrize("signature", [b"XSDT", b"FACS"])
def test_the_other_tables_are_well_formed(iasl, tmp_path, signature):
    assert f'Signature : "{signature.decode()}"' in decoded(iasl, tmp_path, signature)
