"""A learning switch, without I/O: whoever drives it brings frames, takes frames, and has the clock.

======== ==========================================================================================
`switch` where a frame goes, and whether it may
`port`   VLANs, counters, what waits for it
`table`  addresses that were learnt
`queue`  a queue in which nobody takes another's place
======== ==========================================================================================
"""
