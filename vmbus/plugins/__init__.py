"""What comes from other packages by name.

========== =============================================================================
`registry` one look-up of entry points for all kinds of plug-ins
`devices`  devices, from the entry points in the group ``vmbus.devices``
`opening`  what a specification names, opened and checked
`sharing`  back-ends that several guests have at once
`remarks`  what an operator should know of what was done as asked
`options`  what the options of a back-end mean
`specs`    the grammar of specifications, ``scheme:[options]target``
`words`    enumerations and suggestions in messages
========== =============================================================================
"""
