"""Remarks: what is no error, but should be known."""

import logging

from vmbus.plugins.remarks import remark, remarks

LOGGER = logging.getLogger("vmbus.test")


async def test_a_remark_is_logged_and_gathered_by_whoever_has_asked(caplog):
    with remarks() as found:
        remark(LOGGER, "100% odd")
        with remarks() as inner:
            remark(LOGGER, "odder")
    remark(LOGGER, "nobody asked")
    assert (found, inner) == (["100% odd"], ["odder"])
    assert caplog.messages == ["100% odd", "odder", "nobody asked"]
