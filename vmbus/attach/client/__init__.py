"""The client's end of ``vmbus-user``: VMMs, and operators.

================ ===========================================================================
`attachment`     VMM: :class:`Attachment`, the connection of one VM
`delegate`       VMM: what it implements for the attachment
`ports`          VMM: event ports and call descriptors of an attachment
`synic`          VMM: what every VMM with a SynIC of its own does for the server
`machine`        VMM: attaching a :class:`vmbus.partition.soft_machine.SoftMachine` (trio)
`channel_io`     both: frames over a socket, blocking
`request_loop`   both: requests and answers over one socket
`connect`        both: the connecting side's sockets
`operator`       management: :func:`query` and :func:`command`
================ ===========================================================================

Only `machine` loads trio: a VMM in Python needs no event loop.
"""

from vmbus.attach.client.attachment import Attachment as Attachment
from vmbus.attach.client.delegate import Delegate as Delegate, Done as Done, Region as Region
from vmbus.attach.client.operator import command as command, query as query

__all__ = ["Attachment", "Delegate", "Done", "Region", "query", "command"]
