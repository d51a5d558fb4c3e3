"""Versions and features."""

from __future__ import annotations

import pytest

from vmbus.wire.versions import NO_FEATURES, Feature, Version

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
