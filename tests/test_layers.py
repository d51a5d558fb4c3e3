"""Who may import whom: read from the syntax trees, and once from a running interpreter.

``tests/support/house.py`` has the rooms; ``docs/explanation/layers.md`` says why.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.support.house import (
    ROOMS,
    ROOT,
    circle,
    import_statements,
    imports,
    is_below,
    longest_prefix,
    module_graph,
    modules,
    ours,
    room,
    room_graph,
)

ORDER = list(ROOMS)
MODULES = sorted(modules())

# Nothing here waits, sleeps or logs: a test, a fuzzer or another event loop can drive it.
SANS_IO = ("vmbus.errors", "vmbus.wire", "vmbus.memory", "vmbus.ring", "vmbus.gpadl",
           "vmbus.engine", "vmbus.synic", "vmbus.watchers", "netvsp.wire", "netvsp.frames",
           "netvsp.switch",
           "storvsp.wire")  # fmt: skip
DEVICES = ("netvsp", "storvsp")
WAITING = {
    "asyncio",
    "datetime",
    "logging",
    "sched",
    "select",
    "selectors",
    "socket",
    "subprocess",
    "time",
    "trio",
}
"""A clock, a task or a log line."""

# Third-party packages by module; the longest prefix decides.
THIRD_PARTY: dict[str, set[str]] = {
    **{each: set() for each in SANS_IO},
    "vmbus.wire": {"construct"},
    "vmbus.attach.protocol": set(),
    "vmbus.attach.client": set(),
    "vmbus.attach.client.machine": {"trio"},
    "vmbus.cli": {"click", "rich", "trio"},
    "vmbus": {"trio"},
    "netvsp": {"trio"},
    "storvsp": {"trio"},
}

GUESTS = {
    "vmbus.guest": ("vmbus.guest", "vmbus.wire", "vmbus.errors"),
    "storvsp.guest": (
        "storvsp.guest",
        "storvsp.wire",
        "vmbus.guest",
        "vmbus.wire",
        "vmbus.errors",
    ),
    "netvsp.guest": (
        "netvsp.guest",
        "netvsp.wire",
        "vmbus.guest",
        "vmbus.wire",
        "vmbus.errors",
    ),
}
"""The driver half shares with the host only what both read in the specification."""


def test_the_packages_are_found():
    assert {"vmbus.ring", "vmbus.wire.messages", "vmbus.host.bus", "storvsp.session"} <= {*MODULES}
    assert "vmbus.memory" in imports("vmbus.ring")
    assert "vmbus.wire.layouts" in imports("vmbus.wire.messages")


def test_imports_in_functions_and_for_the_type_checker_count(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import one\n"
        "def function():\n    from two import three\n"
    )
    assert [ast.unparse(node) for node in import_statements(path)] == [
        "from typing import TYPE_CHECKING",
        "import one",
        "from two import three",
    ]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_only_downward(name):
    place = ORDER.index(room(name))
    for other in filter(ours, sorted(imports(name))):
        # The version number, the one public name that does not come from above.
        if other != "vmbus":
            assert ORDER.index(room(other)) <= place, f"{name} imports {other}, which is above it"


def test_every_room_has_somebody_in_it():
    assert {room(name) for name in MODULES} == set(ROOMS)


def test_no_circle_of_modules():
    found = circle(module_graph())
    assert not found, " -> ".join(found)


def test_no_circle_of_rooms():
    graph = room_graph()
    for each in graph.values():
        each.discard("vmbus")  # the version number
    found = circle(graph)
    assert not found, " -> ".join(found)


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_what_is_sans_io_knows_no_tasks_clocks_or_logs():
    for name in MODULES:
        if longest_prefix(name, SANS_IO):
            roots = {other.partition(".")[0] for other in imports(name)}
            assert not roots & WAITING, name


def test_third_party_packages_are_those_that_the_room_may_have():
    for name in MODULES:
        third = {other.partition(".")[0] for other in imports(name) if not ours(other)}
        third -= set(sys.stdlib_module_names)
        allowed = THIRD_PARTY[str(longest_prefix(name, THIRD_PARTY))]
        assert third <= allowed, f"{name} imports {sorted(third - allowed)}"


def test_the_bus_never_imports_a_device():
    for name in MODULES:
        if is_below(name, "vmbus"):
            assert not {each for each in imports(name) if each.startswith(DEVICES)}, name


def test_what_guests_share_has_no_word_of_a_device():
    """What one kind of driver does is in the device's own room, not in the bus's."""
    for name in MODULES:
        if longest_prefix(name, ("vmbus.guest", "vmbus.demo")):
            found = re.findall(r"(?i)vstor|scsi|storvsp|netvsp", modules()[name].read_text())
            assert not found, name


def test_the_guests_share_nothing_with_the_host_but_the_wire():
    for name in MODULES:
        guest = longest_prefix(name, GUESTS)
        if guest is not None:
            for other in filter(ours, imports(name)):
                assert longest_prefix(other, GUESTS[guest]), f"{name} imports {other}"


def test_a_device_uses_no_private_names_of_the_bus():
    for name in MODULES:
        if longest_prefix(name, DEVICES) is None:
            continue
        for node in import_statements(modules()[name]):
            if isinstance(node, ast.ImportFrom) and is_below(node.module or "", "vmbus"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, name


# -- in a running interpreter ----------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after ``statement``."""
    program = f"import sys\nbefore = set(sys.modules)\n{statement}\n"
    program += "print(*(set(sys.modules) - before), sep='\\n')"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "devices")))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        capture_output=True,
        text=True,
    )
    return set(done.stdout.split())


def roots_of(loaded: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in loaded}


@pytest.mark.parametrize("statement", ["import vmbus.host", "import vmbus.attach.server, storvsp"])
def test_the_runtime_loads_no_tool_for_people(statement):
    roots = roots_of(loaded_by(statement))
    assert "trio" in roots
    assert not roots & {"click", "rich", "scapy", "dissect", "hypothesis", "pytest"}


def test_the_bus_loads_no_device():
    assert "storvsp" not in roots_of(loaded_by("import vmbus.host, vmbus.plugins.devices"))


@pytest.mark.parametrize(
    "statement",
    ["import vmbus.engine, vmbus.ring, vmbus.gpadl, vmbus.synic", "import vmbus.attach.client"],
)
def test_what_needs_no_event_loop_loads_none(statement):
    loaded = loaded_by(statement)
    assert loaded & {"vmbus.engine", "vmbus.attach.client"}
    assert not roots_of(loaded) & {"trio", "asyncio"}


def test_the_guest_loads_no_host():
    loaded = {name for name in loaded_by("import vmbus.guest") if is_below(name, "vmbus")}
    assert "vmbus.guest.ring" in loaded
    assert {room(name) for name in loaded} == {"vmbus", "vmbus.errors", "vmbus.wire", "vmbus.guest"}
