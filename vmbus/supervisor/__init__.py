"""Guests in processes of their own: a supervisor, and a worker process for each attached VMM.

============ =======================================================================================
`supervisor` :class:`Supervisor`: accepts VMMs, hands each to a worker, speaks for all to operators
`workers`    one worker, as the supervisor sees it
`zygote`     the process that all workers are copies of
`worker`     what runs in a worker: a :class:`vmbus.server.GuestServer` with one guest
`parcels`    messages between these processes, bounded
`sandbox`    what a worker cannot do any more
`keeping`    what guests share, and the lines to it
`files`      which files the command line names
`garbage`    when a worker looks for garbage
`relay`      lines of a worker's log on their way to the supervisor's
`plan`       what workers have to know before there is a guest
============ =======================================================================================
"""

from vmbus.supervisor.plan import Plan as Plan
from vmbus.supervisor.supervisor import Supervisor as Supervisor

__all__ = ["Plan", "Supervisor"]
