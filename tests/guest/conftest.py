"""Tests with a real Linux kernel. They run in the rig: ``make guest-test``."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.guest.rig.account import Said, server_account
from tests.guest.rig.assets import Assets, load_assets
from tests.guest.rig.claims import load_claims, take_or_leave
from tests.guest.rig.guest import Guest, GuestError, until
from tests.guest.rig.host_tools import open_tools
from tests.guest.rig.namespaces import Place
from tests.guest.rig.processes import Command, start_forking
from tests.support.patience import PATIENCE

if TYPE_CHECKING:
    from tests.guest.network_bench import NetworkBench

TOOLS_LUN = 40
"""Where the root file system is, for guests that mount it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and load_assets() is None:
            item.add_marker(pytest.mark.skip(reason="runs in the rig: make guest-test"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Leave a test to another machine that has taken it."""
    return take_or_leave(item, nextitem)


def pytest_runtest_logfinish(nodeid: str) -> None:
    claims = load_claims()
    if claims is not None:
        claims.finish(nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say why a test is tried again: whatever comes of that, it has failed once."""
    if str(report.outcome) == "rerun":  # of pytest-rerunfailures
        print(f"\n{report.nodeid} has failed:\n{report.longreprtext[-3000:]}")
        for title, text in report.sections:
            print(f"--- {title}\n{text[-3000:]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show guests and servers of a failed test."""
    report = yield
    for lab in getattr(item, "funcargs", {}).values():
        if report.failed and isinstance(lab, Lab):
            report.sections.append(("what server and guests say", lab.account()))
    return report


class Server:
    """A running ``vmbus serve``, and what operators can do with it.

    Args:
        folder: For socket and log.
        arguments: Behind ``vmbus serve --socket PATH``.
        place: The network that it has; None: the machine's own.
        details: Have it log every control message. There are few once a guest is up, but some 600
            for each life of a network adapter, which has large buffers.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        arguments: Sequence[str],
        *,
        place: Place | None = None,
        details: bool = True,
    ) -> None:
        self.socket = str(folder / f"server{number}.sock")
        self.command = Command(
            ["serve", f"--socket={self.socket}", *["--verbose"] * (1 + details), *arguments],
            folder / f"server{number}.log",
            place=place,
        )
        until(
            lambda: not self.command.alive or "listening on" in self.command.log(),
            what="the server's start",
        )
        assert self.command.alive, self.command.log()

    def disk(self, *arguments: str) -> dict[str, Any]:
        """Carry out a ``vmbus disk`` request: add, remove or resize, as operators do."""
        from vmbus.cli.client import send_command

        action, *rest = arguments
        names = {"add": ("spec",), "remove": ("address",), "resize": ("address", "size")}[action]
        request = dict(zip(names, rest, strict=True))
        return send_command(self.socket, {"device": "storvsp", "action": action, **request})

    def nic(self, index: int = 0, **request: object) -> dict[str, Any]:
        """Carry out an operator's request on a network adapter."""
        from vmbus.cli.client import send_command

        answer: dict[str, Any] = send_command(
            self.socket, {"backend": "endpoint", "index": index, **request}
        )
        return answer

    def adapters(self, guest: int = 0) -> list[dict[str, Any]]:
        """Return what the server says of a guest's network adapters."""
        devices = self.guests()[guest]["devices"]
        return [each for each in devices if each.get("backend") == "endpoint"]

    def guests(self) -> list[dict[str, Any]]:
        """Return what the server says of its guests."""
        from vmbus.cli.client import ask_guests

        guests: list[dict[str, Any]] = ask_guests(self.socket)["guests"]
        return guests

    def account(self, guest: str = "guest") -> list[Said]:
        """Return the control messages of a guest that the server has seen and made so far."""
        return server_account(self.command.log(), guest)

    def stop(self) -> None:
        """Have it end in order."""
        self.command.send_signal(signal.SIGTERM)
        assert self.command.wait(PATIENCE) == 0, self.command.log()


class Lab:
    """Makes servers and guests for one test, and ends them all.

    Args:
        assets: What guests are made of.
        folder: For disks, sockets and logs.
    """

    def __init__(self, assets: Assets, folder: Path) -> None:
        self.assets = assets
        self.folder = folder
        self.servers: list[Server] = []
        self.all_guests: list[Guest] = []
        self._numbers = itertools.count(1)

    @property
    def tools(self) -> str:
        """The specification of the root file system, read only, at :data:`TOOLS_LUN`."""
        return f"raw:[ro,lun={TOOLS_LUN}]{self.assets.root}"

    def file(self, name: str, size: int = 0) -> Path:
        """Return a path for a disk; made, sparse, if it has a size."""
        path = self.folder / name
        if size:
            with open(path, "wb") as file:
                file.truncate(size)
        return path

    def serve(
        self,
        *disks: str,
        options: Sequence[str] = (),
        place: Place | None = None,
        details: bool = True,
    ) -> Server:
        """Start a server with these disks; see :class:`Server`."""
        arguments = [*(f"--disk={disk}" for disk in disks), *options]
        server = Server(self.folder, next(self._numbers), arguments, place=place, details=details)
        self.servers.append(server)
        return server

    def boot(
        self,
        server: Server | None = None,
        *arguments: str,
        ready: bool = True,
        ordinary: bool = False,
        **options: Any,
    ) -> Guest:
        """Boot a guest, on a server if one is given; ready for commands.

        Args:
            server: The server.
            arguments: More for ``vmbus boot``.
            ready: Wait until it is ready.
            ordinary: With Debian's kernel for machines instead of that for clouds.
            options: See :class:`~tests.guest.rig.guest.Guest`.
        """
        if server is not None:
            arguments = (f"--socket={server.socket}", *arguments)
        log = self.folder / f"guest{next(self._numbers)}.log"
        assets = self.assets.ordinary() if ordinary else self.assets
        guest = Guest(assets, log, arguments, **options)
        self.all_guests.append(guest)
        if ready:
            guest.wait_ready()
        return guest

    def account(self) -> str:
        """Return what guests and servers have to say."""
        parts = []
        for guest in self.all_guests:
            if guest.vmm.alive:
                with contextlib.suppress(GuestError):
                    log = guest.attempt("dmesg", 20)[1]
                    parts.append(f"--- the guest's log, its end\n{log[-6000:]}")
            parts.append(guest.account())
        for server in self.servers:
            parts.append(f"--- the server's log, its end\n{server.command.log()[-12000:]}")
            with contextlib.suppress(Exception):
                parts.append(f"--- the server's guests\n{server.guests()}")
        return "\n".join(parts)

    def close(self) -> None:
        """End everything."""
        for guest in self.all_guests:
            guest.kill()
        for server in self.servers:
            server.command.kill()


@pytest.fixture(scope="session")
def assets() -> Assets:
    found = load_assets()
    assert found is not None
    start_forking()
    return found


@pytest.fixture(scope="session")
def host_tools(assets: Assets) -> Iterator[Path]:
    """The guests' root file system, for programs that run here."""
    with open_tools(assets.root, assets.scratch / "host-tools") as tree:
        yield tree


@pytest.fixture(scope="session")
def network_bench(assets: Assets, host_tools: Path) -> Iterator[NetworkBench]:
    """A guest on a network, for all tests that need no other."""
    from tests.guest.network_bench import open_network_bench

    with open_network_bench(assets, host_tools) as bench:
        yield bench


@pytest.fixture
def lab(assets: Assets, request: pytest.FixtureRequest) -> Iterator[Lab]:
    folder = assets.scratch / request.node.name.replace("/", "_")[:60]
    folder.mkdir(parents=True)
    lab = Lab(assets, folder)
    try:
        yield lab
    finally:
        lab.close()
        shutil.rmtree(folder, ignore_errors=True)
