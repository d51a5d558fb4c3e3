"""Frames as the kernel hands them out: the tag beside the frame."""

from __future__ import annotations

import struct

from tests.guest.rig.wire import with_tag

FRAME = bytes(range(12)) + b"\x08\x00payload"


def beside(status: int, tag: int) -> bytes:
    return struct.pack("=IIIHHHH", status, len(FRAME), len(FRAME), 0, 14, tag, 0x8100)


def test_a_tag_that_the_kernel_has_taken_out_is_put_back():
    assert with_tag(FRAME, beside(0x10, 0x604D)) == (
        bytes(range(12)) + b"\x81\x00\x60\x4d\x08\x00payload"
    )


def test_a_frame_without_a_tag_is_left_alone():
    assert with_tag(FRAME, beside(0x01, 0)) == FRAME
