"""The runtime of one partition's bus, on trio: what the engine decides is done here.

====================== ===========================================================================
`bus`                  :func:`open_bus`: joins a partition, the engine and devices
`roster`               the devices of a bus: offered, failed, removed, closed
`runner`               one open channel's task: rings made, device run, everything given back
`channel`              an open channel, as a device uses it
`device`               what a device is to the bus
`delivery`             control messages on their way into the guest's slots
`doorbells`            monitor pages and interrupt page: the doorbells that are memory
`bell`, `lookout`      waiting for a channel's doorbell; looking on before sleeping
`account`              the control plane as lines of a log
`log_budget`           how many lines a guest can cause
`statistics`           counters of a channel
====================== ===========================================================================
"""

from vmbus.host.bus import Bus as Bus, open_bus as open_bus
from vmbus.host.channel import Channel as Channel
from vmbus.host.config import BusConfig as BusConfig
from vmbus.host.device import Device as Device, Offer as Offer

__all__ = ["open_bus", "Bus", "BusConfig", "Channel", "Device", "Offer"]
