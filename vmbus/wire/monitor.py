"""Layout of a monitor page: a guest's way to ring many doorbells without a hypercall.

The guest sets bit ``monitor_id % 32`` of group ``monitor_id // 32`` in the *second* page it named
in INITIATE_CONTACT; the host polls. Source: linux/include/linux/hyperv.h (``struct
hv_monitor_page``), linux/drivers/hv/channel.c (``vmbus_setevent``).
"""

from __future__ import annotations

TRIGGER_STATE = 0
"""u32 at byte 0."""
TRIGGER_GROUPS = 8
"""Byte offset of four groups {pending u32, armed u32}."""
GROUP_COUNT = 4
GROUP_BITS = 32
LATENCY = 0x240
"""Byte offset of u16[4][32], in 100 ns ticks."""
PARAMETERS = 0x440
"""Byte offset of [4][32] {connection_id u32, flag u16, reserved u16}."""
PARAMETER_SIZE = 8
MONITOR_PAGE_SIZE = 4096


def pending_word(group: int) -> int:
    """Index of a group's pending word for ``memoryview.cast("I")``."""
    return (TRIGGER_GROUPS + 8 * group) // 4
