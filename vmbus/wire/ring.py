"""Layout of a ring's control page, the first page of each of the two rings of a channel.

Source: linux/include/linux/hyperv.h (``struct hv_ring_buffer``). Data begins 4096 bytes behind
the start of the control page; indices are byte offsets into the data, multiples of 8. Equal
indices mean empty, so a writer always leaves at least one byte free.
"""

from __future__ import annotations

CONTROL_SIZE = 4096

# Indices of u32 words, for ``memoryview.cast("I")``.
WRITE_INDEX = 0
READ_INDEX = 1
INTERRUPT_MASK = 2
"""Not 0: the reader of this ring does not want to be interrupted."""
PENDING_SEND_SIZE = 3
"""Bytes of room the writer of this ring is waiting for, or 0."""
FEATURE_BITS = 16
"""u32 at byte 64."""
FEATURE_PENDING_SEND_SIZE = 1
"""The other side understands PENDING_SEND_SIZE."""
