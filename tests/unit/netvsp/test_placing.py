"""How long the parts of a receive buffer are."""

from __future__ import annotations

import pytest

from netvsp.placing import COALESCED_PART, COALESCED_PARTS, LONGEST_CONTROL, ROOM, part_size

ENOUGH = COALESCED_PART * COALESCED_PARTS


@pytest.mark.parametrize(
    ("max_frame", "buffer", "size"),
    [
        (60, 0, LONGEST_CONTROL),
        (1514, 0, 2048),
        (1514, ENOUGH - 1, 2048),
        (1514, ENOUGH, COALESCED_PART),
        (9014, 0, 12288),
        (9014, ENOUGH, COALESCED_PART),
        (65000, ENOUGH, 65536),
    ],
)
def test_a_part_holds_the_longest_frame_and_a_good_piece_of_a_coalesced_segment(
    max_frame, buffer, size
):
    assert part_size(max_frame, buffer) == size
    assert size >= max_frame + ROOM
