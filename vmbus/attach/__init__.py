"""``vmbus-user``: attaching a VMM process to a bus server process over an AF_UNIX socket.

The protocol is specified in ``docs/reference/vmbus-user.md``.

================ ===========================================================================
`layout`         fixed little-endian layouts
`limits`         numbers and enumerations
`to_server`      payloads that VMM and operator send
`to_vmm`         payloads that the server sends
`protocol`       message numbers, the MESSAGES table, states
`framing`        the 16-byte header, frames with descriptors, SEQPACKET and STREAM readers
`descriptors`    what a received descriptor really is
`link`           server: one connection, reader and writer (trio)
`transport`      server: a :class:`vmbus.transport.Transport` over a link
`server`         server: `serve`, several guests and operators at once
`listen`         server: sockets from paths, descriptors, systemd
`client`         VMM: `Attachment`; needs neither trio nor an event loop
`delegate`       VMM: what it implements for the client
`operator`       management: `query` and `command`
================ ===========================================================================

Nothing is imported here, so that a VMM that uses the client does not load trio.
"""
