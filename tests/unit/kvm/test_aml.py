"""AML: integers, lengths, names, packages, and what cannot be written."""

import struct

import pytest

from tests.support.acpi import disassemble
from vmbus.errors import ConfigError
from vmbus.kvm import aml


def compiled(iasl, folder, *terms):
    """Put terms into a table of their own and disassemble it."""
    body = b"".join(terms)
    header = struct.pack(
        "<4sIBB6s8sI4sI", b"SSDT", 36 + len(body), 2, 0, b"TESTER", b"EMITTER ", 1, b"TEST", 1
    )
    table = header + body
    return disassemble(iasl, folder, table[:9] + bytes([-sum(table) & 0xFF]) + table[10:])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "Zero"),
        (1, "One"),
        (2, "0x02"),
        (0xFF, "0xFF"),
        (0x100, "0x0100"),
        (0xFFFF, "0xFFFF"),
        (0x10000, "0x00010000"),
        (0xFFFFFFFF, "0xFFFFFFFF"),
        (1 << 32, "0x0000000100000000"),
        (2**64 - 1, "0xFFFFFFFFFFFFFFFF"),
    ],
)
def test_integers_of_all_sizes(iasl, tmp_path, value, text):
    assert f"Name (TEST, {text})" in compiled(iasl, tmp_path, aml.name("TEST", aml.integer(value)))


@pytest.mark.parametrize("size", [0, 1, 40, 55, 56, 57, 58, 59, 60, 61, 62, 63, 4080, 4095, 70000])
def test_lengths_around_each_form_of_their_encoding(iasl, tmp_path, size):
    terms = aml.name("TEST", aml.buffer(b"\xa5" * size)), aml.name("LAST", aml.integer(7))
    text = compiled(iasl, tmp_path, *terms)
    assert "Name (LAST, 0x07)" in text
    assert text.count("0xA5") == size


@pytest.mark.parametrize(("extra", "length"), [(0, 63), (1, 4095), (2, 0xFFFFF)])
def test_a_length_is_encoded_as_short_as_it_can_be(extra, length):
    """The length counts its own bytes."""
    assert aml.with_length(bytes(length - 1 - extra))[0] >> 6 == extra
    assert aml.with_length(bytes(length - extra))[0] >> 6 == extra + 1


def test_what_is_longer_than_the_longest_length_is_refused():
    class Huge(bytes):
        def __len__(self):
            return 1 << 28

    with pytest.raises(ConfigError, match="2\\*\\*28"):
        aml.with_length(Huge())


def test_paths_of_one_two_and_more_names(iasl, tmp_path):
    text = compiled(
        iasl,
        tmp_path,
        aml.device("\\_SB.AAA", aml.device("BBBB", aml.name("_ADR", aml.integer(0)))),
        aml.scope("\\_SB.AAA.BBBB", aml.name("C", aml.string("text"))),
    )
    assert "Device (\\_SB.AAA) { Device (BBBB)" in text
    assert 'Scope (\\_SB.AAA.BBBB) { Name (C, "text")' in text


def test_packages_hold_anything(iasl, tmp_path):
    inner = aml.package(aml.string("x"), aml.buffer(b"\x01\x02"))
    text = compiled(iasl, tmp_path, aml.name("TEST", aml.package(aml.integer(3), inner)))
    assert (
        'Package (0x02) { 0x03, Package (0x02) { "x", Buffer (0x02) { 0x01, 0x02 // .. } } }'
        in text
    )


@pytest.mark.parametrize("text", ["PNP0C01", "ACP0004", "ZZZFFFF"])
def test_eisa_identifiers_come_back(iasl, tmp_path, text):
    device = aml.device("DEVI", aml.name("_HID", aml.eisa_id(text)))
    assert f'EisaId ("{text}")' in compiled(iasl, tmp_path, device)


@pytest.mark.parametrize(
    "call",
    [
        lambda: aml.path(""),
        lambda: aml.path("TOOLONG"),
        lambda: aml.path("1ABC"),
        lambda: aml.path("ab"),
        lambda: aml.path("A..B"),
        lambda: aml.integer(-1),
        lambda: aml.integer(1 << 64),
        lambda: aml.string("\0"),
        lambda: aml.string("\N{SNOWMAN}"),
        lambda: aml.package(*[b"\0"] * 256),
        lambda: aml.eisa_id("PNP05010"),
        lambda: aml.eisa_id("PN_0501"),
        lambda: aml.eisa_id("PNP05G1"),
        lambda: aml.irq(16),
        lambda: aml.irq(-1),
        lambda: aml.io_ports(0x10000, 1),
        lambda: aml.io_ports(0, 256),
    ],
)
def test_what_cannot_be_encoded_is_refused(call):
    with pytest.raises(ConfigError):
        call()
