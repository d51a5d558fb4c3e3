"""Object identifiers: their names."""

from __future__ import annotations

from netvsp.wire import oids


def test_oids_are_known_by_their_names():
    assert oids.NAMES[0x00010106] == "GEN_MAXIMUM_FRAME_SIZE"
    assert oids.NAMES[0xFC01020D] == "TCP_OFFLOAD_HARDWARE_CAPABILITIES"
    numbers = [each for name, each in vars(oids).items() if name.isupper() and name != "NAMES"]
    oids_only = [each for each in numbers if each > 0xFFFF]
    assert len(oids_only) == len(set(oids_only)), "two names for one number"
