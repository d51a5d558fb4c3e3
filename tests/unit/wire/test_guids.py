"""The GUIDs of channel classes."""

from __future__ import annotations

from uuid import UUID

from vmbus.wire import guids


def test_class_guids_have_the_byte_order_of_the_wire():
    # HV_SCSI_GUID in linux/include/linux/hyperv.h, as bytes.
    expected = bytes.fromhex("d96361ba a104 294d b605 72e2ffb1dc7f")
    assert guids.CLASS_SCSI.bytes_le == expected
    expected = bytes.fromhex("635161f8 3edf c546 913f f2d2f965ed0e")
    assert guids.CLASS_NIC.bytes_le == expected


def test_every_class_guid_is_named_once():
    constants = {
        value
        for name, value in vars(guids).items()
        if name.startswith("CLASS_") and isinstance(value, UUID)
    }
    assert constants == set(guids.CLASS_NAMES)
    assert len(set(guids.CLASS_NAMES.values())) == len(guids.CLASS_NAMES)


def test_a_class_without_a_name_is_shown_as_its_guid():
    assert guids.class_name(guids.CLASS_NIC) == "net"
    assert guids.class_name(guids.NULL_GUID) == "00000000-0000-0000-0000-000000000000"
