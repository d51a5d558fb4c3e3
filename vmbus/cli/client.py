"""Asking a running server, with its refusals worded for the command line."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from vmbus.attach.client import operator
from vmbus.attach.protocol.messages import RefusedError
from vmbus.attach.protocol.sockets import CONTROL_SUFFIX
from vmbus.cli.program import Failure, UsageFailure
from vmbus.errors import AttachError


def ask_guests(path: str) -> dict[str, Any]:
    """Return what a server knows of its guests. Raises Failure, AttachError.

    Args:
        path: Of its socket for operators, or of the one for VMMs beside it.
    """
    return _ask(path, lambda: operator.query(path, "guests"))


def send_command(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Have a server do something; arguments and exceptions as for :func:`ask_guests`."""
    return _ask(path, lambda: operator.command(path, request))


def _ask(path: str, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return ask()
    except RefusedError as error:
        if error.errno == errno.EPERM and error.request == "HELLO":
            raise Failure(
                f"{path} is a socket for VMMs, and there is no {path}{CONTROL_SUFFIX}; operators "
                "have a socket of their own: --control of vmbus serve, or the path of its first "
                f"--socket with {CONTROL_SUFFIX} behind it"
            ) from error
        kind = UsageFailure if error.errno == errno.EINVAL else Failure
        raise kind(error.text) from error
    except AttachError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | ConnectionRefusedError):
            raise Failure(
                f"no server listens on {path}; start one with: vmbus serve --socket {path}"
            ) from error
        raise


def pick_guest(guests: list[dict[str, Any]], name: str | None) -> list[dict[str, Any]]:
    """Return the guest of that name, or all of them. Raises Failure if there is none."""
    if name is None:
        return guests
    found = [guest for guest in guests if guest["name"] == name]
    if not found:
        attached = ", ".join(str(guest["name"]) for guest in guests) or "none"
        raise UsageFailure(f"there is no guest {name!r}; attached are: {attached}")
    return found
