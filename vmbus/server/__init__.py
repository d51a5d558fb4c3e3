"""The guest server program: any number of attached guests, each with a bus and devices.

========== ==================================================================
`guests`   :class:`GuestServer`: makes a bus per guest, answers operators
`attached` one guest, and devices that come and go while it runs
`devices`  the devices of one guest, and which one an operator means
`keepers`  what guests share
`process`  memory and descriptors of the process
========== ==================================================================
"""

from vmbus.server.devices import DeviceSetup as DeviceSetup
from vmbus.server.guests import GuestServer as GuestServer
from vmbus.server.keepers import Keepers as Keepers
from vmbus.server.process import raise_descriptor_limit as raise_descriptor_limit

__all__ = ["GuestServer", "DeviceSetup", "Keepers", "raise_descriptor_limit"]
