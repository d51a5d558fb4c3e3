"""The control page of a ring."""

from __future__ import annotations

from vmbus.wire import ring


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
