"""The server's end of ``vmbus-user``.

================ ===========================================================================
`connections`    :func:`serve`: several guests and operators at once
`link`           one connection, reader and writer
`transport`      a :class:`vmbus.partition.transport.Transport` over a link
`events`         what the VMM tells the bus, in order and bounded by credits
`calls`          raising event flags: the three tiers
`delivery`       a message on its way into a slot, with the VMM
`guest_memory`   the memory table
`management`     QUERY and COMMAND
`listen`         sockets from paths, descriptors, systemd
================ ===========================================================================
"""

from vmbus.attach.server.connections import Handler as Handler, serve as serve
from vmbus.attach.server.link import ServerLimits as ServerLimits
from vmbus.attach.server.listen import (
    from_systemd as from_systemd,
    listen_path as listen_path,
    open_listener as open_listener,
)
from vmbus.attach.server.transport import SocketTransport as SocketTransport

__all__ = [
    "serve",
    "Handler",
    "ServerLimits",
    "SocketTransport",
    "listen_path",
    "open_listener",
    "from_systemd",
]
