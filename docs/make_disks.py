"""Write docs/reference/disks.md: every disk back-end of this project, from what its module says.

Options come from each module's ``OPTIONS``, the controller's too, the text from its docstring, the
grammar from ``vmbus/plugins/specs.py`` and what the controller takes of a disk from ``DiskSpec``.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "devices")]

import storvsp  # noqa: E402  # needs the path above
from storvsp.disks.specs import DISKS, DiskSpec  # noqa: E402
from tests.support.docstrings import inline, markdown  # noqa: E402
from vmbus.cli.devices import read_docstring  # noqa: E402
from vmbus.plugins import specs  # noqa: E402
from vmbus.plugins.options import Option, read_options  # noqa: E402

PAGE = ROOT / "docs/reference/disks.md"
ORDER = ("raw", "cd", "ram", "overlay", "delay", "fault")
"""Those that are used most come first; others follow by name."""
PLACES = {
    "path": "SCSI bus of the controller, 0 to 7 (default: 0)",
    "target": "SCSI target, 0 or 1 (default: 0)",
    "lun": "SCSI LUN, 0 to 254 (default: the lowest that is free)",
}
"""What the options are that say where a disk goes; of others, the controller's words will do."""

INTRODUCTION = """\
# Disks

<!-- Made by docs/make_disks.py from the back-ends themselves. Do not edit. -->

What can stand after `--disk`, in `vmbus disk add`, and in `open_disk`. `vmbus devices` shows what
is installed, others than these included; [write a disk](../howto/write-a-disk.md) says how to add
one.

| back-end | what it is | for example |
|---|---|---|
"""


SEVERAL = """\
## Several guests and one image

| write | what it is | who keeps it whole |
|---|---|---|
| `raw:{guest}.img` | an image for each guest, none is shared | the lock on each |
| `raw:[ro]base.img` | one image that all read | nobody can write it meanwhile |
| `overlay:raw:base.img` | the same, and each guest has what it writes for itself | likewise |
| `raw:[shared]cluster.img` | one disk that all guests of a server write, for cluster file systems: the server opens it once, and the guests keep each other away by its reservations | the guests |
| `raw:[share]disk.img` | no sharing at all: the image is opened without a lock, and nothing keeps others away from it, guest or program | **nobody**, whoever writes it twice ruins it |

`shared` is the controller's, for every kind of disk, and says what guests see: one disk. `share` is
that of `raw` and `cd`, and says what this program leaves out: its lock. Take it where locks do not
work (some network file systems), or where another program that has the image open only reads it."""  # noqa: E501  # tables

CONTROLLER = """\
The controller that the disks are behind. That of `--disk` is told by options of
[`vmbus serve`](cli.md#vmbus-serve) (`--subchannels`, `--max-transfer`, `--monitor`); others say it
themselves, before their disks: `--device 'storvsp monitor=on max_transfer_bytes=1M ram:64M'`."""


def registered() -> dict[str, ModuleType]:
    """Return the module of each back-end that this project registers."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    found = {
        name: importlib.import_module(value.partition(":")[0])
        for name, value in points[DISKS.group].items()
    }
    assert found.keys() >= set(ORDER)
    return {name: found[name] for name in (*ORDER, *sorted(found.keys() - set(ORDER)))}


def option_table(options: Iterator[Option] | list[Option]) -> list[str]:
    """Return options as a table."""
    lines = ["| option | without it | what it does |", "|---|---|---|"]
    for option in options:
        usage = option.usage.replace("|", "\\|")
        lines.append(
            f"| `{usage}` | {inline(option.default) or 'off'} | {inline(option.meaning)} |"
        )
    return lines


def parts(module: ModuleType) -> tuple[str, str]:
    """Return the first line of a module's docstring and the rest as Markdown."""
    first, _, rest = (inspect.getdoc(module) or "").partition("\n")
    return first, markdown(rest.strip("\n"), 3)


def section(name: str, module: ModuleType) -> list[str]:
    """Return all that there is to say of one back-end."""
    first, rest = parts(module)
    lines = [f"## {name}", "", inline(first), ""]
    options = list(read_options(module))
    lines += [*option_table(options), ""] if options else ["It has no options.", ""]
    return [*lines, rest, ""]


def controller() -> list[str]:
    """Return what the controller itself can be told."""
    return ["## storvsp", "", CONTROLLER, "", *option_table(list(read_options(storvsp)))]


def make() -> str:
    """Return the whole page."""
    modules = registered()
    lines = [INTRODUCTION.rstrip("\n")]
    for name, module in modules.items():
        text, example = read_docstring(inspect.getdoc(module) or "", DISKS.noun, name)
        lines.append(f"| [`{name}`](#{name}) | {text} | `{example}` |")
    lines += ["", "## How to write one", "", parts(specs)[1].partition("\n\nWhat a kind of")[0], ""]
    lines += [
        "These are the controller's, for any disk, and stand in the outermost brackets:",
        "",
        "| option | what it does |",
        "|---|---|",
        *(
            f"| `{name}=N` | {PLACES[name]} |" if name in PLACES else f"| `{name}` | {text} |"
            for name, text in DiskSpec.reserved.items()
        ),
        "",
    ]
    lines += [SEVERAL, ""]
    for name, module in modules.items():
        lines += section(name, module)
    return "\n".join([*lines, *controller()]).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(make(), encoding="utf-8")
