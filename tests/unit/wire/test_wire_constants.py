"""GUIDs, versions, and the layouts of the ring's control page and the monitor page."""

from __future__ import annotations

from uuid import UUID

import pytest

from vmbus.wire import guids, messages, monitor, ring
from vmbus.wire.versions import NO_FEATURES, Feature, Version


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


VERSION_TEXTS = {
    "0.13": 0xD,
    "1.1": 0x1_0001,
    "2.4": 0x2_0004,
    "3.0": 0x3_0000,
    "4.0": 0x4_0000,
    "4.1": 0x4_0001,
    "5.0": 0x5_0000,
    "5.1": 0x5_0001,
    "5.2": 0x5_0002,
    "5.3": 327683,  # as Linux's trace prints it
    "6.0": 0x6_0000,
}


def test_all_eleven_versions_are_known_by_number_and_text():
    assert {str(version): int(version) for version in Version} == VERSION_TEXTS
    for text, number in VERSION_TEXTS.items():
        assert Version.from_text(text) is Version(number)
    assert sorted(Version) == list(Version)


@pytest.mark.parametrize("text", ["", "5", "5.30", "05.3", "7.0", "V5.3"])
def test_an_unknown_version_is_refused_with_the_list_of_those_that_are_known(text):
    with pytest.raises(ValueError, match=r"0\.13, 1\.1, .*6\.0"):
        Version.from_text(text)


def test_feature_flags_are_the_eight_low_bits():
    assert [int(feature) for feature in Feature] == [1 << bit for bit in range(8)]
    assert int(NO_FEATURES) == 0


def test_control_page_words():
    """Offsets of struct hv_ring_buffer, in bytes."""
    assert ring.CONTROL_SIZE == 4096
    words = {
        ring.WRITE_INDEX: 0,
        ring.READ_INDEX: 4,
        ring.INTERRUPT_MASK: 8,
        ring.PENDING_SEND_SIZE: 12,
        ring.FEATURE_BITS: 64,
    }
    assert len(words) == 5
    for word, offset in words.items():
        assert word * 4 == offset
    assert ring.FEATURE_PENDING_SEND_SIZE == 1


def test_monitor_page_offsets():
    """Offsets of struct hv_monitor_page, in bytes."""
    assert (monitor.TRIGGER_STATE, monitor.TRIGGER_GROUPS) == (0, 8)
    assert [monitor.pending_word(group) * 4 for group in range(4)] == [8, 16, 24, 32]
    assert monitor.LATENCY == 0x240
    assert monitor.PARAMETERS == 0x440
    groups = monitor.GROUP_COUNT * monitor.GROUP_BITS
    assert groups == messages.MAX_MONITOR_ID + 1 == 128
    assert monitor.LATENCY + 2 * groups <= monitor.PARAMETERS
    assert monitor.PARAMETERS + monitor.PARAMETER_SIZE * groups <= monitor.MONITOR_PAGE_SIZE
