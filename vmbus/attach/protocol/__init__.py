"""``vmbus-user`` as bytes: what both ends know.

================ ===========================================================================
`layout`         fixed little-endian layouts
`limits`         numbers and enumerations
`to_server`      payloads that VMM and operator send
`to_vmm`         payloads that the server sends
`messages`       message numbers, the MESSAGES table, states
`framing`        the 16-byte header, frames with descriptors, SEQPACKET and STREAM readers
`closing`        closing what a peer has passed, without waiting for it
`descriptors`    what a received descriptor really is
`sockets`        the kinds of socket, and sockets that were inherited
================ ===========================================================================

Nothing here waits, but for a thread of `closing` that nobody waits for.
"""
