"""A partition as the bus sees it: posts, slots, event flags, doorbells, memory, life cycle.

================ ===========================================================================
`transport`      the contract between a bus and whatever carries its partition
`events`         what a partition does: posts, life cycle, memory
`doorbell`       the eventfd behind a doorbell
`loopback`       a partition in this very process
`soft_machine`   a machine without processors, for guests written in Python
================ ===========================================================================

Partitions in other processes are in :mod:`vmbus.attach`.
"""
