"""Frames: pieces, ownership, and tags that go in and out."""

from __future__ import annotations

import pytest

from netvsp.frames.frame import NEEDS_CHECKSUM, Buffer, Frame, Offload, format_mac, hides_tag

HEAD = bytes(range(12)) + b"\x08\x00" + bytes(range(14, 40))
TAGGED = HEAD[:12] + b"\x81\x00\xa1\x23" + HEAD[12:]


def test_a_frame_is_its_pieces_in_order():
    rest: list[Buffer] = [memoryview(b"abc"), bytearray(b"de")]
    frame = Frame(HEAD, rest)
    assert len(frame) == len(HEAD) + 5
    assert frame.pieces() == [HEAD, *rest]
    assert frame.tobytes() == HEAD + b"abcde"
    assert repr(frame) == "<Frame of 45 bytes, 000102030405060708090a0b0800, None>"
    whole = Frame(HEAD)
    assert len(whole) == len(HEAD)
    assert whole.tobytes() is HEAD


def test_an_own_frame_does_not_change_with_the_guest():
    memory = bytearray(b"guest")
    frame = Frame(HEAD, [memoryview(memory)], Offload(1), 5, 9)
    own = frame.own()
    memory[:] = b"other"
    assert own.tobytes() == HEAD + b"guest"
    assert (own.offload, own.tci, own.flow) == (Offload(1), 5, 9)
    assert own.own() is own


def test_a_tag_goes_in_and_comes_out():
    said = Offload(NEEDS_CHECKSUM, 1, 54, 1448, 34, 16)
    beside = Frame(HEAD, (b"rest",), said, 0xA123, 7)
    inside = beside.tagged()
    assert inside.tobytes() == TAGGED + b"rest"
    assert inside.offload == Offload(NEEDS_CHECKSUM, 1, 58, 1448, 38, 16)
    assert (inside.tci, inside.flow) == (None, 7)
    assert inside.tagged() is inside
    back = inside.untagged()
    assert back.tobytes() == HEAD + b"rest"
    assert (back.offload, back.tci, back.flow) == (said, 0xA123, 7)
    assert back.untagged() is back


def test_a_frame_that_has_a_tag_already_gets_a_second_one():
    frame = Frame(TAGGED, (), None, 0x0456)
    assert frame.untagged() is frame
    assert frame.tagged().head == TAGGED[:12] + b"\x81\x00\x04\x56" + TAGGED[12:]
    outer = frame.tagged().untagged()
    assert (outer.tci, outer.head) == (0x0456, TAGGED)


@pytest.mark.parametrize("head", [TAGGED[:17], TAGGED[:13], b"", HEAD])
def test_a_tag_that_is_not_there_does_not_come_out(head):
    frame = Frame(head)
    assert frame.untagged() is frame


@pytest.mark.parametrize(
    ("tags", "hides"),
    [
        ("", False),
        ("8100 2000", False),
        ("8100 2000 8100 0007", True),
        ("8100 0000 88a8 0007", True),
        ("8100 0000 8100 0000 8100 0007", True),
        ("8100 0005 8100 0007", False),
        ("88a8 0000", False),
        ("88a8 0000 8100 0007", True),
        ("88a8 0005 8100 0007", False),
    ],
)
def test_a_tag_of_vlan_0_hides_the_one_behind_it(tags, hides):
    frame = Frame(HEAD[:12] + bytes.fromhex(tags) + HEAD[12:]).untagged()
    assert hides_tag(frame) is hides
    for size in range(12, 14 + len(bytes.fromhex(tags))):
        hides_tag(Frame(frame.head[:size], (), None, frame.tci))


def test_only_what_is_still_to_do_has_a_place():
    for said in (None, Offload(2, csum_start=34)):
        assert Frame(HEAD, (), said, 1).tagged().offload == said
    assert Frame(HEAD, (), Offload(1, 0, 0, 0, 34, 6), 1).tagged().offload == Offload(
        1, 0, 0, 0, 38, 6
    )
    assert Frame(TAGGED, (), Offload(1, 0, 0, 0, 2, 6)).untagged().offload == Offload(
        1, 0, 0, 0, 0, 6
    )


def test_addresses_are_written_with_colons():
    assert format_mac(bytes.fromhex("00155d0a0b0c")) == "00:15:5d:0a:0b:0c"
