"""``vmbus-user``: attaching a VMM process to a bus server process over an AF_UNIX socket.

The protocol is specified in ``docs/reference/vmbus-user.md``. Both ends are here:

============ ===============================================================================
`protocol`   bytes: layouts, messages, frames, descriptors
`server`     the server's end, on trio: a :class:`vmbus.partition.transport.Transport`
`client`     the other end: VMMs and operators; needs neither trio nor an event loop
============ ===============================================================================
"""
