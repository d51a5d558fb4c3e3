"""The monitor page."""

from __future__ import annotations

from vmbus.wire import messages, monitor


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
