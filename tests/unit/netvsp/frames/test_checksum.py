"""The Internet checksum: RFC 1071's example, and what is awkward about ones' complement."""

from __future__ import annotations

import itertools

import pytest

from netvsp.frames.checksum import checksum, fold, ones_sum, pseudo_header_sum, sum_pieces

EXAMPLE = bytes.fromhex("0001f203f4f5f6f7")


def test_the_sum_is_that_of_rfc_1071():
    assert ones_sum(EXAMPLE) == 0xDDF2
    assert checksum(ones_sum(EXAMPLE)) == 0x220D


def test_an_odd_byte_is_followed_by_a_zero():
    assert ones_sum(b"\x12\x34\x56") == 0x1234 + 0x5600
    assert ones_sum(bytearray(b"\xff")) == ones_sum(memoryview(b"\xff")) == 0xFF00


def test_zero_and_minus_zero_are_two():
    """A sum of nothing is 0; one of ones is 0xFFFF, whose complement says that all is well."""
    assert ones_sum(b"") == ones_sum(bytes(100)) == 0
    assert ones_sum(b"\xff\xff") == ones_sum(b"\xff\xff\xff\xff") == 0xFFFF
    assert fold(0x10000) == 1
    assert fold(0x1FFFE) == fold(0xFFFF) == 0xFFFF
    assert checksum(0) == 0xFFFF
    assert checksum(0xFFFF) == 0


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2), (2, 4), (0, 0, 5), (7, 8), (1, 2, 3, 4, 5)])
def test_pieces_may_be_cut_anywhere(cuts):
    ends = [0, *cuts, len(EXAMPLE)]
    pieces = [EXAMPLE[start:end] for start, end in itertools.pairwise(ends)]
    assert sum_pieces(pieces) == 0xDDF2
    assert sum_pieces(map(memoryview, pieces), 0xFFF0) == fold(0xDDF2 + 0xFFF0)


def test_a_pseudo_header_has_addresses_protocol_and_length():
    addresses = bytes.fromhex("0a010203 0a090807")
    wanted = ones_sum(addresses + bytes((0, 6)) + (1234).to_bytes(2, "big"))
    assert pseudo_header_sum(addresses, 6, 1234) == wanted
    wide = ones_sum(bytes(32) + (0x12345).to_bytes(4, "big") + bytes((0, 0, 0, 17)))
    assert pseudo_header_sum(bytes(32), 17, 0x12345) == wide
