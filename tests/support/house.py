"""The house: its rooms, what is in them, and who imports whom, read from the syntax trees.

A room is a package, or a module that stands by itself. Every import counts, those in functions and
those for the type checker too: what a module cannot be understood without is what it knows.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]

ROOMS: dict[str, str] = {
    "vmbus.errors": "what can go wrong, and whose fault it is",
    "vmbus.wire": "bytes: messages, packets, versions, GUIDs, GPA ranges, SynIC layouts",
    "vmbus.memory": "guest memory: regions, views, scatter lists, the full fence",
    "vmbus.ring": "the ring buffers",
    "vmbus.gpadl": "GPADLs: page lists from messages",
    "vmbus.watchers": "callbacks to be told of a change",
    "vmbus.workers": "threads for blocking calls",
    "vmbus.log_budget": "how many lines others can cause in a log",
    "vmbus.streams": "standard streams that cannot be relied on",
    "vmbus.trace": "traces as files",
    "vmbus.engine": "the control plane, without I/O",
    "vmbus.synic": "the SynIC and its hypercalls, without I/O",
    "vmbus.guest": "the driver half, for guests in Python; knows no device",
    "vmbus.partition": "a partition as the bus sees it; in-process ones",
    "vmbus.attach": "the face of `vmbus-user`: no more than what its three rooms are",
    "vmbus.attach.protocol": "`vmbus-user` as bytes",
    "vmbus.attach.client": "`vmbus-user`: VMMs and operators",
    "vmbus.attach.server": "`vmbus-user`: the server's end",
    "vmbus.host": "the runtime of one bus: channels, tasks, delivery, devices' contract",
    "vmbus.capture": "what is said on a bus becomes a trace",
    "vmbus.plugins": "devices and back-ends by name; the grammar of specifications",
    "vmbus.dissect": "what the records of a trace mean",
    "vmbus.demo": "a demo's guest as far as it knows no device, and the seam for those",
    "vmbus.testing": "checks and scenery for authors of devices and back-ends",
    "vmbus.server": "the guest server program",
    "vmbus.supervisor": "guests in processes of their own",
    "vmbus.kvm": "the reference VMM",
    "storvsp.wire": "vstor as bytes",
    "storvsp.disk": "the contract of a disk",
    "storvsp.disks": "disk back-ends",
    "storvsp.scsi": "SCSI logical units",
    "storvsp.dissect": "vstor and SCSI in a trace",
    "storvsp.shared": "a disk that several guests have, wherever they are served",
    "storvsp": "the SCSI controller: handshake, requests, units, plug-in",
    "storvsp.guest": "the storage driver, for guests in Python",
    "storvsp.testing": "what every disk owes the controller",
    "storvsp.demo": "the storage half of a demo's guest",
    "netvsp.wire": "NVSP and RNDIS as bytes",
    "netvsp.frames": "Ethernet frames, their checksums, what is left to do for them",
    "netvsp.dissect": "NVSP and RNDIS in a trace",
    "netvsp.switch": "a learning switch, without I/O",
    "netvsp.spec": "the grammar of endpoints",
    "netvsp.shared": "a switch that several guests are connected to, wherever they are served",
    "netvsp.endpoint": "the contract of an endpoint",
    "netvsp.endpoints": "endpoints",
    "netvsp": "the network adapter: handshake, RNDIS, frames both ways, plug-in",
    "netvsp.guest": "the network driver, for guests in Python",
    "netvsp.demo": "the network half of a demo's guest",
    "netvsp.testing": "what every endpoint owes the adapter",
    "vmbus.cli": "the command line",
    "vmbus": "public names, taken from anywhere below",
}
"""From the ground up: a room may import those above it in this list, which are below it in the
house."""

PACKAGES = {"vmbus": ROOT, "netvsp": ROOT / "devices", "storvsp": ROOT / "devices"}


def is_below(name: str, prefix: str) -> bool:
    """Whether module ``name`` is ``prefix`` or in it."""
    return name == prefix or name.startswith(prefix + ".")


def longest_prefix(name: str, prefixes: Iterable[str]) -> str | None:
    """Return the entry of ``prefixes`` that describes module ``name`` best."""
    return max((each for each in prefixes if is_below(name, each)), key=len, default=None)


@cache
def modules() -> dict[str, Path]:
    """Return all modules of the packages by name."""
    found = {}
    for package, base in PACKAGES.items():
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def import_statements(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield all imports of a file, wherever they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


@cache
def imports(name: str) -> frozenset[str]:
    """Return the modules that module ``name`` imports, as exactly as they can be told."""
    found = set()
    for node in import_statements(modules()[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        assert not node.level, f"{name}: a relative import"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            found.add(whole if whole in modules() else str(node.module))
    return frozenset(found - {name})


def ours(name: str) -> bool:
    """Whether a module is one of the project's."""
    return name.partition(".")[0] in PACKAGES


def room(name: str) -> str:
    """Return the room that a module is in."""
    found = longest_prefix(name, ROOMS)
    # The bare package is the list of public names, not a place for new modules.
    assert found is not None, f"{name} is in no room: give it one in ROOMS"
    assert found != "vmbus" or name == "vmbus", f"{name} is in no room: give it one in ROOMS"
    return found


def module_graph() -> dict[str, set[str]]:
    """Return each module's imports of the project's own modules."""
    return {name: {other for other in imports(name) if other in modules()} for name in modules()}


def room_graph() -> dict[str, set[str]]:
    """Return each room's imports of other rooms."""
    graph: dict[str, set[str]] = {each: set() for each in ROOMS}
    for name, others in module_graph().items():
        graph[room(name)] |= {room(other) for other in others} - {room(name)}
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return a way through the graph that leads back to its beginning, or nothing."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []
