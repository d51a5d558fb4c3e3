"""What a partition does: it posts, is reset, paused and resumed, and takes memory back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


class Once:
    """A callable of which only the first call counts, as the ``done`` of an event has to be.

    Args:
        function: What the first call does.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    @property
    def called(self) -> bool:
        """Whether there has been a call."""
        return self._function is None

    def call_off(self) -> bool:
        """Let no call count any more. Returns whether one would have."""
        function, self._function = self._function, None
        return function is not None

    def __call__(self) -> None:
        """Call the function, the first time."""
        function, self._function = self._function, None
        if function is not None:
            function()


def _nothing() -> None:
    """Nobody counts."""


@dataclasses.dataclass(frozen=True, slots=True)
class PostedMessage:
    """The guest called HvPostMessage."""

    connection_id: int
    message_type: int
    """SynIC message type; 1 for VMBus."""
    vp: int
    """VP that made the call."""
    payload: bytes
    """At most 240 bytes, chosen by the guest."""
    done: Callable[[], None] = dataclasses.field(default=_nothing, repr=False, compare=False)
    """Called by the bus, once, when it needs no more room for this message.

    A transport lets only so many messages be under way, counting those that are not done: that is
    how a guest is held up that does not take the replies to what it has posted. The bus takes
    events out of :meth:`vmbus.partition.transport.Transport.incoming` at any time, so life-cycle
    events are never held up.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class PartitionReset:
    """The VM was reset without the guest having unloaded; memory will be rewritten."""

    done: Callable[[], None]
    """Called by the bus once nothing of the old guest life touches memory any more."""
    failed: Callable[[str], None] | None = None
    """Called instead, with the reason, if that takes longer than it may: something of the old life
    may still touch memory. None: the partition waits however long it takes."""


@dataclasses.dataclass(frozen=True, slots=True)
class PartitionPaused:
    """All VPs are stopped. Nothing may be written to guest memory after ``done``."""

    done: Callable[[], None]
    """Called by the bus when it is quiet: no transfer in flight, no message or signal to come."""
    failed: Callable[[str], None] | None = None
    """Called instead, with the reason, if that takes longer than it may; the bus goes on as if it
    had not been asked. None: the partition waits however long it takes."""


@dataclasses.dataclass(frozen=True, slots=True)
class PartitionResumed:
    """The VPs run again."""

    done: Callable[[], None]
    """Called by the bus once it serves its channels again."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryRemoval:
    """The VMM wants memory back: the region is out of the map already, but may still be in use.

    The transport has called :meth:`vmbus.memory.GuestMemory.remove_region`; the bus drops what it
    holds there (it rescinds nothing: a VMM must not take away memory of open rings) and calls
    ``done``.
    """

    gpa: int
    """First byte of the region."""
    size: int
    """Bytes."""
    done: Callable[[], None]


PartitionEvent = PostedMessage | PartitionReset | PartitionPaused | PartitionResumed | MemoryRemoval
