"""Write docs/reference/endpoints.md: every endpoint of this project, from what its module says.

Options come from each module's ``OPTIONS``, the text from its docstring, as for disks.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "devices"), str(ROOT / "docs")]

from make_disks import option_table, parts  # noqa: E402  # needs the path above

from netvsp.endpoints.specs import ENDPOINTS  # noqa: E402
from tests.support.docstrings import inline  # noqa: E402
from vmbus.cli.devices import read_docstring  # noqa: E402
from vmbus.plugins.options import read_options  # noqa: E402

PAGE = ROOT / "docs/reference/endpoints.md"
ORDER = ("tap", "nat", "pcap", "script", "loopback", "null")
"""Those that are used most come first; others follow by name."""

INTRODUCTION = """\
# Endpoints

<!-- Made by docs/make_endpoints.py from the endpoints themselves. Do not edit. -->

What can be behind a network adapter, as `open_endpoint` takes it;
[write an endpoint](../howto/write-an-endpoint.md) says how to add one. How to write options is the
same as [for disks](disks.md#how-to-write-one).

| endpoint | what it is | for example |
|---|---|---|
"""


def registered() -> dict[str, ModuleType]:
    """Return the module of each endpoint that this project registers."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    found = {
        name: importlib.import_module(value.partition(":")[0])
        for name, value in points[ENDPOINTS.group].items()
    }
    assert found.keys() >= set(ORDER)
    return {name: found[name] for name in (*ORDER, *sorted(found.keys() - set(ORDER)))}


def section(name: str, module: ModuleType) -> list[str]:
    """Return all that there is to say of one endpoint."""
    first, rest = parts(module)
    options = list(read_options(module))
    table = option_table(options) if options else ["It has no options."]
    return [f"## {name}", "", inline(first), "", *table, "", rest, ""]


def make() -> str:
    """Return the whole page."""
    modules = registered()
    lines = [INTRODUCTION.rstrip("\n")]
    for name, module in modules.items():
        text, example = read_docstring(inspect.getdoc(module) or "", ENDPOINTS.noun, name)
        lines.append(f"| [`{name}`](#{name}) | {text} | `{example}` |")
    lines.append("")
    for name, module in modules.items():
        lines += section(name, module)
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(make(), encoding="utf-8")
