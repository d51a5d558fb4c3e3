"""What the records of a trace mean, layer by layer.

================== ==========================================================================
module             what is in it
================== ==========================================================================
`layers`           layers, and the contract of who takes a device's packets apart
`control`          control messages
`session`          a whole trace: which channel is what, which answer is to which request
================== ==========================================================================

What devices say to their drivers is known to plug-ins, entry points of the group
``vmbus.dissectors``; each is named as :func:`vmbus.wire.guids.class_name` names the class.
"""

from __future__ import annotations

from vmbus.dissect.layers import (
    ChannelDissector as ChannelDissector,
    Dissection as Dissection,
    Layer as Layer,
    RingPacket as RingPacket,
)
from vmbus.dissect.session import Dissector as Dissector

__all__ = ["ChannelDissector", "Dissection", "Dissector", "Layer", "RingPacket"]
