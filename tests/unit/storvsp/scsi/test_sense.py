"""Sense data in its two forms."""

from storvsp.scsi.sense import Sense, field_pointer
from tests.support.scsi import hexes


def test_sense_data_has_its_fixed_and_descriptor_form():
    sense = Sense(0x5, 0x2400, 0x11223344, field_pointer(7, 3, in_cdb=True))
    assert sense.fixed() == hexes("f0 00 05 11223344 0a 00000000 24 00 00 cb0007")
    assert sense.descriptors() == hexes(
        "72 05 24 00 000000 14 000a8000 0000000011223344 02060000 cb0007 00"
    )
    big = Sense(0x3, 0x1100, 1 << 40)
    assert big.fixed() == hexes("70 00 03 00000000 0a 00000000 11 00 00 000000")
    assert big.descriptors() == hexes("72 03 11 00 000000 0c 000a8000 0000010000000000")
    assert field_pointer(0x1234, in_cdb=False) == hexes("801234")
