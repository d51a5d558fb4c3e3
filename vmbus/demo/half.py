"""The seam between a demo's guest and its devices: what one kind of device brings along."""

from __future__ import annotations

import argparse
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import trio

from vmbus.demo.story import Story
from vmbus.errors import VMBusError
from vmbus.guest import Driver, Guest, Personality
from vmbus.wire.messages import OfferChannel

NOTICE_SECONDS = 10.0
"""The host is to have told of a change of its devices by then."""

T = TypeVar("T")
D = TypeVar("D", bound=Driver)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The part of the command line that is no device's own."""

    socket: str
    """Path of the server's socket."""
    personality: Personality
    """Whose drivers the guest plays."""
    channels: int
    """Of a device, and VPs of the guest."""
    seconds: float
    """For the work of each half."""
    name: str = "demo"
    """What the server calls the guest."""


class Half(ABC, Generic[D]):
    """What the guest of a demo does with one kind of device; lives as long as the guest.

    Args:
        options: The common part of the command line.
        arguments: All of it as parsed: members named as in :meth:`add_options`.
        story: Gets its lines.
    """

    def __init__(self, options: Options, arguments: argparse.Namespace, story: Story) -> None:
        self.options = options
        self.story = story

    @classmethod
    @abstractmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add this half's own options to those of the program."""

    @property
    @abstractmethod
    def ram(self) -> int:
        """Bytes of guest RAM that its rings and its data take."""

    @abstractmethod
    async def attach(self, guest: Guest, offers: Sequence[OfferChannel]) -> D:
        """Attach the driver to its device, and tell of it. A checkpoint.

        Args:
            guest: A connected guest.
            offers: All that it serves, those of other halves too.

        Returns:
            The driver, with all its channels open. The guest tells of these, and closes them.

        Raises:
            VMBusError: There is no such device, or it does not want.
        """

    @abstractmethod
    async def use(self, driver: D) -> None:
        """Try the device for as long as the options say. A checkpoint.

        What is wrong with a part of the device is told as a problem, so that the other parts get
        their turn.

        Args:
            driver: From :meth:`attach`.

        Raises:
            VMBusError: It makes no sense to go on.
        """

    async def ask(self, action: str, told: Callable[[], Awaitable[T]]) -> T:
        """Ask the operator for something, and wait until the host tells of it. A checkpoint.

        Args:
            action: What to do with a device, for the line ``ready``.
            told: Waits for the notification and returns what is in it.

        Raises:
            VMBusError: The host has not told of it in time.
        """
        self.story.emit("ready", action=action)
        with trio.move_on_after(NOTICE_SECONDS):
            return await told()
        raise VMBusError(f"no notification within {NOTICE_SECONDS:g} s of: {action}")
