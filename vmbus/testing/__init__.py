"""Helpers for testing devices and back-ends; no test framework is needed to use them.

* :func:`~vmbus.testing.channels.channel_pair`: a channel without a bus, and its guest's end.
* :func:`~vmbus.testing.devices.check_device`: what every device owes its bus.
* :func:`storvsp.testing.check_disk`: what every disk owes the SCSI controller.
"""

from vmbus.testing.channels import (
    GuestEnd as GuestEnd,
    LoneHost as LoneHost,
    channel_pair as channel_pair,
    make_offer as make_offer,
)
from vmbus.testing.devices import check_device as check_device

__all__ = ["GuestEnd", "LoneHost", "channel_pair", "make_offer", "check_device"]
