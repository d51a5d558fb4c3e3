"""The runtime of one partition's bus, on trio: what the engine decides is done here.

====================== ===========================================================================
`bus`                  :func:`open_bus`: joins a partition, the engine and devices
`roster`               the devices of a bus: offered, failed, removed, closed
`runner`               one open channel's task: rings made, device run, everything given back
`channel`              an open channel, as a device uses it
`undertakings`         requests that take their time: weighed, held while paused, named
`waking`               tasks that wait for the same, woken some at a time
`stops`                pauses, resets and the end of a bus, each within its bound
`device`               what a device is to the bus
`serving`              :class:`Life`: the loop that serves the channels of a device
`buffer`               leases of GPADLs: pages go back when the device has let go
`transactions`         requests of a device to its guest, and their completions
`outgoing`             the outgoing half of a channel
`channel_host`         what a channel needs of its bus
`services`             what the parts of a bus may ask of it
`config`               how a bus behaves
`observer`             listening to a bus: messages, packets, signals, faults
`delivery`             control messages on their way into the guest's slots
`doorbells`            monitor pages and interrupt page: the doorbells that are memory
`bell`, `lookout`      waiting for a channel's doorbell; looking on before sleeping
`account`              the control plane as lines of a log
`statistics`           counters of a channel
====================== ===========================================================================
"""

from vmbus.host.bus import Bus as Bus, open_bus as open_bus
from vmbus.host.channel import Channel as Channel
from vmbus.host.config import BusConfig as BusConfig
from vmbus.host.device import (
    Device as Device,
    Offer as Offer,
    Retargetable as Retargetable,
    Retiring as Retiring,
    Saveable as Saveable,
)
from vmbus.host.observer import MemoryUse as MemoryUse, Observer as Observer
from vmbus.host.serving import Life as Life

__all__ = [
    "open_bus",
    "Bus",
    "BusConfig",
    "Channel",
    "Device",
    "Offer",
    "Retargetable",
    "Retiring",
    "Saveable",
    "Life",
    "MemoryUse",
    "Observer",
]
