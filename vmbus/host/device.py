"""What a device is to the bus.

A device is one offer and a coroutine. The bus offers it to the guest; when the guest opens the
primary channel, the bus calls :meth:`Device.run` with it, and when the guest closes the channel,
rescinds, unloads, is reset or vanishes, the channel ends: ``receive_batch`` raises
``trio.EndOfChannel`` and ``run`` is expected to finish what is in flight and return. One call of
``run`` is one life of the device; the next OPEN calls it again, from the beginning.

::

    offered --OPEN--> run(primary) --- accept_subchannel() --> more channels of the same life
       ^                   |
       +---- returned <----+-- CLOSE, rescind, UNLOAD, reset, guest gone

What a device may rely on:

* ``run`` is called in its own task; there is never a second call while the first has not returned.
* An exception from ``run`` ends that channel and nothing else. The offer is rescinded, so that
  the guest learns of it, and made again when the guest has let go of the old one.
* ``run`` is cancelled if it does not return within the bus's grace period after the channel ended.

A device may have more to it, which the bus looks for by itself: :class:`Retargetable`,
:class:`Retiring`, :class:`Saveable`.

What the bus relies on:

* When ``run`` returns, nothing of that life touches guest memory any more. A transfer handed to
  a worker thread must be waited for.
* Everything read from the channel is untrusted.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from vmbus.engine.offers import Offer
from vmbus.host.channel import Channel

__all__ = ["Device", "Offer", "Retargetable", "Retiring", "Saveable"]


class Device(Protocol):
    """A synthetic device; see the module text for its life."""

    @property
    def offer(self) -> Offer:
        """Class, instance and properties. Constant while the device is on a bus."""

    async def run(self, primary: Channel) -> None:
        """Serve one life of the device, from OPEN to close. Is a checkpoint.

        Raises:
            vmbus.errors.GuestProtocolError: The guest broke a rule beyond repair.
            trio.EndOfChannel: Allowed to escape from ``primary.receive_batch``.
        """

    def snapshot(self) -> dict[str, Any]:
        """Describe the device for people, as JSON types. Cannot block, never raises."""

    async def aclose(self) -> None:
        """The device leaves the bus for good; release back-ends. Idempotent. Is a checkpoint."""


@runtime_checkable
class Retargetable(Protocol):
    """A device that wants to know which VP serves which of its channels.

    A channel says so in :attr:`vmbus.host.Channel.target_vp`; this hook tells of changes.
    """

    def retarget(self, channel: Channel) -> None:
        """The guest has moved a channel's interrupts (MODIFYCHANNEL). Cannot block."""


@runtime_checkable
class Retiring(Protocol):
    """A device whose guest should come to rest before it hears that the device is taken away.

    What a guest sends between the last answer and the news of the removal is never answered: the
    channel is over for the host, and a driver may wait for those answers for ever.
    """

    async def retire(self) -> None:
        """Have the guest stop, as far as it can be told to. Is a checkpoint.

        Cancelled after ``close_grace``; the device is removed then all the same. Must not raise.
        """

    def stay(self) -> None:
        """It is not taken away after all: serve as before. Cannot block."""


@runtime_checkable
class Saveable(Protocol):
    """A device with a state that outlives the process: what a guest has set and expects to find.

    Not in it are rings, channels and requests: those are the guest's own memory and the bus's.
    """

    def save(self) -> dict[str, Any]:
        """Return the state as JSON types. Cannot block; nothing is in flight."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state that :meth:`save` has returned. Cannot block.

        Called before the guest opens the device.

        Raises:
            ConfigError: It is not such a state, or belongs to a device that is set up otherwise.
        """
