"""The SynIC and its hypercalls, for VMMs whose kernel has none. No I/O.

========= ==============================================================================
`model`   :class:`Synic`: message slots, event flags, HvPostMessage, HvSignalEvent
`msrs`    the registers
`queue`   messages that wait for their slot
========= ==============================================================================
"""

from vmbus.synic.model import Delivery as Delivery, Features as Features, Synic as Synic
from vmbus.synic.queue import MessageQueue as MessageQueue

__all__ = ["Synic", "Features", "Delivery", "MessageQueue"]
