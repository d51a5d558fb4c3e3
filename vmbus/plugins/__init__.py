"""What comes from other packages by name.

========== =============================================================================
`devices`  devices, from the entry points in the group ``vmbus.devices``
========== =============================================================================
"""
