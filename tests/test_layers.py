"""Who may import whom: read from the syntax trees, and once from a running interpreter.

``docs/explanation/layers.md`` says why. Imports under ``if TYPE_CHECKING`` do not count: they are
not there at run time.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up; a module may import what stands on its own line or above it here, which is
# below it in the layers. The longest prefix decides. Within a layer the order matters as well:
# a channel knows its transport, not the other way round.
ORDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("L0", ("vmbus.errors",)),
    ("L0", ("vmbus.wire",)),
    ("L1", ("vmbus.memory",)),
    ("L1", ("vmbus.memory_file", "vmbus.ring", "vmbus.gpadl", "vmbus.statistics")),
    ("L2", ("vmbus.engine", "vmbus.synic_msrs")),
    ("L2", ("vmbus.synic",)),
    ("L2", ("vmbus.synic_queue",)),
    ("L3", ("vmbus.transport", "vmbus.log_budget", "vmbus.lookout", "vmbus.bell")),
    ("L3", ("vmbus.channel", "vmbus.delivery", "vmbus.account")),
    # What a device is to the bus is layer 4; it has to be said before the bus that runs devices.
    ("L4", ("vmbus.device",)),
    ("L3", ("vmbus.doorbells", "vmbus.roster")),
    ("L3", ("vmbus.runner",)),
    ("L3", ("vmbus.bus",)),
    ("L3", ("vmbus.loopback", "vmbus.attach", "vmbus.guest")),
    ("L3", ("vmbus.soft_machine",)),
    ("L4", ("vmbus.plugins",)),
    ("L5", ("storvsp",)),
    (
        "L6",
        ("vmbus.server", "vmbus.testing", "vmbus.trace", "storvsp.guest", "storvsp.testing"),
    ),
    ("L6", ("vmbus.fuzz", "storvsp.demo", "storvsp.demo_trial")),
    ("L6", ("vmbus.kvm",)),
    ("L6", ("vmbus.cli",)),
    # Public names, taken from anywhere below.
    ("L6", ("vmbus",)),
)
RANKS = {prefix: rank for rank, (_layer, group) in enumerate(ORDER) for prefix in group}
LAYERS = {prefix: layer for layer, group in ORDER for prefix in group}
PACKAGES = ("vmbus", "storvsp")

# A clock, a task or a log line does not belong below layer 3.
NOT_BELOW_L3 = {
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
THIRD_PARTY = {
    "vmbus.wire": {"construct"},
    "vmbus.cli": {"click", "rich", "trio"},
    "vmbus": {"trio"},
    "storvsp": {"trio"},
}
"""Third-party packages by module, the longest prefix decides; none below layer 3 otherwise."""

GUESTS = {
    "vmbus.guest": ("vmbus.guest", "vmbus.wire", "vmbus.errors"),
    "storvsp.guest": (
        "storvsp.guest",
        "storvsp.wire",
        "vmbus.guest",
        "vmbus.wire",
        "vmbus.errors",
    ),
}
"""The driver half shares with the host only what both read in the specification."""


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def longest_prefix(name: str, prefixes: object) -> str | None:
    """Return the entry of ``prefixes`` that describes module ``name`` best."""
    found = [each for each in iter(prefixes) if is_below(name, each)]  # type: ignore[call-overload]
    return max(found, key=len) if found else None


@cache
def modules() -> dict[str, Path]:
    """Return all modules of the packages by name."""
    found = {}
    for package, base in (("vmbus", ROOT), ("storvsp", ROOT / "devices")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def statements(tree: ast.AST, *, nested: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield imports, leaving out those for the type checker; with ``nested`` also those in
    functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from statements(other, nested=nested)
        elif nested or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(node, nested=nested)


@cache
def imports(name: str, *, nested: bool = True) -> frozenset[str]:
    """Return the modules that module ``name`` imports, as exactly as they can be told."""
    path = modules()[name]
    found = set()
    for node in statements(ast.parse(path.read_text()), nested=nested):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = f"{package}.{base}" if base else package
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            found.add(whole if whole in modules() else base)
    return frozenset(found)


@cache
def rank(name: str) -> int:
    prefix = longest_prefix(name, RANKS)
    assert prefix is not None
    # The bare package is the list of public names, not a place for new modules.
    assert prefix != "vmbus" or name == "vmbus", f"{name} has no layer: give it one in ORDER"
    return RANKS[prefix]


def layer(name: str) -> str:
    rank(name)
    return LAYERS[str(longest_prefix(name, LAYERS))]


def ours(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


MODULES = sorted(modules())


def test_the_packages_are_found():
    assert {"vmbus.ring", "vmbus.wire.messages", "vmbus.bus", "storvsp.session"} <= set(MODULES)
    assert "vmbus.memory" in imports("vmbus.ring")
    assert "vmbus.wire.layouts" in imports("vmbus.wire.messages")


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_only_downward(name):
    for other in sorted(imports(name)):
        # The version number, the one public name that does not come from above.
        if ours(other) and other != "vmbus":
            assert rank(other) <= rank(name), f"{name} imports {other}, which is above it"


def test_nothing_below_layer_3_knows_tasks_clocks_or_logs():
    for name in MODULES:
        if layer(name) < "L3":
            roots = {other.partition(".")[0] for other in imports(name)}
            assert not roots & NOT_BELOW_L3, name


def test_third_party_packages_are_those_that_the_layer_may_have():
    for name in MODULES:
        third = {other.partition(".")[0] for other in imports(name)}
        third -= set(sys.stdlib_module_names) | set(PACKAGES)
        allowed = THIRD_PARTY[str(longest_prefix(name, THIRD_PARTY))]
        if layer(name) < "L3":
            allowed = allowed - {"trio"}
        assert third <= allowed, f"{name} imports {sorted(third - allowed)}"


def test_the_bus_never_imports_a_device():
    for name in MODULES:
        if is_below(name, "vmbus"):
            assert not {each for each in imports(name) if each.startswith("storvsp")}, name


def test_the_guests_share_nothing_with_the_host_but_the_wire():
    for name in MODULES:
        guest = longest_prefix(name, GUESTS)
        if guest is not None:
            for other in filter(ours, imports(name)):
                assert longest_prefix(other, GUESTS[guest]), f"{name} imports {other}"


def test_a_device_uses_no_private_names_of_the_bus():
    for name in MODULES:
        if not is_below(name, "storvsp"):
            continue
        for node in statements(ast.parse(modules()[name].read_text()), nested=True):
            if isinstance(node, ast.ImportFrom) and is_below(node.module or "", "vmbus"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, name


def test_no_module_imports_itself_by_a_detour():
    graph = {
        name: {other for other in imports(name, nested=False) if other in modules()}
        for name in MODULES
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


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


@pytest.mark.parametrize("statement", ["import vmbus.bus", "import vmbus.attach.server, storvsp"])
def test_the_runtime_loads_no_tool_for_people(statement):
    roots = roots_of(loaded_by(statement))
    assert "trio" in roots
    assert not roots & {"click", "rich", "scapy", "dissect", "hypothesis", "pytest"}


def test_the_bus_loads_no_device():
    assert "storvsp" not in roots_of(loaded_by("import vmbus.bus, vmbus.plugins"))


def test_the_lower_layers_load_no_trio():
    loaded = loaded_by("import vmbus.engine, vmbus.ring, vmbus.gpadl, vmbus.synic_queue")
    assert "vmbus.engine" in loaded
    assert not roots_of(loaded) & {"trio", "logging", "asyncio"}


def test_the_guest_loads_no_host():
    loaded = {name for name in loaded_by("import vmbus.guest") if is_below(name, "vmbus")}
    assert "vmbus.guest.ring" in loaded
    assert not {name for name in loaded if name != "vmbus" and rank(name) > rank("vmbus.wire")} - {
        name for name in loaded if is_below(name, "vmbus.guest")
    }
