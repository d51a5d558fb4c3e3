"""The endpoints that come with the network adapter.

Each module holds one, and its ``open_spec``, which is registered as an entry point in the group
``netvsp.endpoints`` exactly as a plug-in's would be:

============ ==========================================================================
``tap``      a TAP interface of the host
``nat``      the host's own network, through passt, or a small one that is built in
``pcap``     any other endpoint, with its frames written to a file, or out of one
``script``   a function of the user's
``loopback`` frames come back
``null``     frames end here
============ ==========================================================================

For writers of endpoints: :mod:`~netvsp.endpoints.wrapper` passes everything on to another one,
:mod:`~netvsp.endpoints.tasks` runs several tasks, :mod:`~netvsp.endpoints.stream` speaks the frames
of passt and QEMU.
"""
