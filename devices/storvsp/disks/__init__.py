"""The disks that come with the controller.

Each module holds one back-end and its ``open_spec``, which is registered as an entry point in the
group ``storvsp.disks`` exactly as a plug-in's would be:

==========  ==========================================================================
``ram``     sparse memory, gone when it is closed
``raw``     an image file or a block device, byte for byte
``cd``      an ISO image as a read-only optical medium
``overlay`` copy on write over any other disk; what is written is thrown away
``delay``   any other disk, slower
``fault``   any other disk, failing on demand
==========  ==========================================================================

For writers of back-ends: :mod:`~storvsp.disks.buffers` cuts scatter lists,
:mod:`~storvsp.disks.wrapper` passes everything on to another disk, and
:mod:`~vmbus.watchers` keeps the list behind ``Disk.watch``.
"""
