"""The list behind :meth:`storvsp.disk.Disk.watch`."""

from __future__ import annotations

from collections.abc import Callable


class Watchers:
    """Callbacks to be told of a change. Belongs to the trio thread."""

    __slots__ = ("_callbacks",)

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[[], None]] = {}

    def add(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Add a callback; the same one may be added twice.

        Returns:
            A function that takes this one away again; calling it twice is harmless.
        """
        key = object()
        self._callbacks[key] = changed

        def remove() -> None:
            self._callbacks.pop(key, None)

        return remove

    def notify(self) -> None:
        """Call all of them, in the order they were added."""
        for callback in list(self._callbacks.values()):
            callback()
