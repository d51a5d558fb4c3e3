"""The server's end of ``vmbus-user``.

================ ===========================================================================
`connections`    :func:`serve`: several guests at once; :func:`serve_operators`
`admission`      what guests are called, and that no two are called the same
`places`         who gets a place, and who loses it
`link`           one connection, reader and writer
`questions`      requests to the VMM, and their answers
`transport`      a :class:`vmbus.partition.transport.Transport` over a link
`lifecycle`      RESET, PAUSE and RESUME: one at a time, each answered once
`events`         what the VMM tells the bus, in order and bounded by credits
`calls`          raising event flags: the three tiers
`synics`         the VPs' SynICs, as far as the server sets flags itself
`delivery`       a message on its way into a slot, with the VMM
`guest_memory`   the memory table
`management`     QUERY and COMMAND
`listen`         sockets from paths, descriptors, systemd
================ ===========================================================================
"""

from vmbus.attach.server.admission import Admission as Admission, Names as Names, Roll as Roll
from vmbus.attach.server.connections import (
    Handler as Handler,
    accept as accept,
    serve as serve,
    serve_operators as serve_operators,
)
from vmbus.attach.server.link import ServerLimits as ServerLimits
from vmbus.attach.server.listen import (
    from_systemd as from_systemd,
    listen_path as listen_path,
    named_from_systemd as named_from_systemd,
    open_listener as open_listener,
)
from vmbus.attach.server.transport import SocketTransport as SocketTransport

__all__ = [
    "serve",
    "serve_operators",
    "accept",
    "Admission",
    "Names",
    "Roll",
    "Handler",
    "ServerLimits",
    "SocketTransport",
    "listen_path",
    "open_listener",
    "from_systemd",
    "named_from_systemd",
]
