"""What is named exists: paths, modules and links in the documents, references in docstrings.

A path may be written from the root of the repository or, for the device, from ``devices/``. A
dotted name that begins with one of our packages is imported as far as it goes and looked up from
there. References in docstrings are looked up where they stand: in the class, in the module.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.house import PACKAGES, ROOT, modules

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = {
    **modules(),
    **{
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for folder in ("docs", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
    },
}
"""What has docstrings and comments, by the name it would be imported under."""

PATH = re.compile(
    r"(?<![\w./<{-])(?:vmbus|devices|netvsp|storvsp|tests|docs|captures)(?:/[\w.*-]+)+/?"
)
DOTTED = re.compile(r"(?<![\w./:@\"'{-])(?:vmbus|netvsp|storvsp|tests)(?:\.\w+)+(?![\w/-])")
QUOTED = re.compile(r"(?<=[\"'])(?:vmbus|netvsp|storvsp)(?:\.\w+)+(?=[\"'])")
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc|obj):`([^`]*)`")
FILE = re.compile(r"`([a-z]\w*\.py)`")
PLACE = re.compile(r"`([\w/]+\.py): ([\w.]+)`")
INLINE_IMPORT = re.compile(r"`from ([\w.]+) import ([\w, ]+)`")
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)

DEVICES = ("netvsp/", "storvsp/")
NOT_MODULES = {
    "vmbus.devices": "group of entry points",
    "vmbus.dissectors": "group of entry points",
    "vmbus.sock": "the file of a socket, in examples",
    "vmbus.socket": "a unit of systemd",
    "vmbus.service": "a unit of systemd",
}
NOT_OURS = {"chess.py": "the reader's, in the tutorial"}


def position(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def path_exists(written: str) -> bool:
    """Whether a path, perhaps with ``*`` in it, names something."""
    name = written.rstrip("./")
    bases = (ROOT, ROOT / "devices") if written.startswith(DEVICES) else (ROOT,)
    return any(any(base.glob(name)) for base in bases)


@cache
def look_up(name: str) -> bool:
    """Whether a dotted name can be imported, or is an attribute of something that can."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module not in modules() and not module.startswith("tests"):
            continue
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            continue
        return has(found, parts[length:])
    return False


def has(thing: object, attributes: list[str]) -> bool:
    """Whether attributes can be got at, one after the other."""
    for at, attribute in enumerate(attributes):
        if hasattr(thing, attribute):
            thing = getattr(thing, attribute)
        else:
            return at == len(attributes) - 1 and isinstance(thing, type) and is_member(
                thing, attribute
            )  # fmt: skip
    return True


def is_member(cls: type, name: str) -> bool:
    """Whether instances have an attribute that the class has not: annotated, or set by a method."""
    for each in cls.__mro__:
        if name in getattr(each, "__annotations__", {}) or name in getattr(each, "__slots__", ()):
            return True
        if each.__module__.partition(".")[0] in PACKAGES:
            source = inspect.getsource(each)
            if re.search(rf"\bself\.{name}\b(:| =|, )", source):
                return True
    return dataclasses.is_dataclass(cls) and name in {each.name for each in dataclasses.fields(cls)}


# -- documents -------------------------------------------------------------------------------------


def test_the_documents_are_found():
    names = {path.name for path in DOCUMENTS}
    assert {"README.md", "SECURITY.md", "CONTRIBUTING.md", "layers.md", "wire.md"} <= names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document):
    text = document.read_text()
    wrong = [
        f"{position(text, match.start())}: {match[0]}"
        for match in PATH.finditer(text)
        if not path_exists(match[0])
    ]
    for pattern in (DOTTED, QUOTED):
        wrong += [
            f"{position(text, match.start())}: {match[0]}"
            for match in pattern.finditer(text)
            if match[0] not in NOT_MODULES and not look_up(match[0])
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_without_their_folder_exist(document):
    """``engine.py`` in a table of a package, or beside the page."""
    known = {path.name for path in SOURCES.values()}
    assert set(FILE.findall(document.read_text())) <= known | NOT_OURS.keys()


@cache
def defined(path: Path) -> set[str]:
    """Return the functions and classes of a file, and the methods of these: ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{each.name}"
                for each in node.body
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_named_with_their_file_are_in_it(document):
    """As in ```vmbus/host/bus.py: Bus.pump```, of which data-flow.md is full."""
    text = document.read_text()
    wrong = [f"{file}: {name}" for file, name in PLACE.findall(text) if not is_there(file, name)]
    assert not wrong, "\n".join(wrong)


def is_there(file: str, name: str) -> bool:
    path = (ROOT / "devices" if file.startswith(DEVICES) else ROOT) / file
    return path.exists() and name in defined(path)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    wrong = []
    for target in LINK.findall(text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        page = (document.parent / name) if name else document
        if not page.exists() or (
            anchor and page.suffix == ".md" and anchor not in anchors(page)
        ):  # fmt: skip
            wrong.append(target)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_in_examples_work(document):
    wrong = []
    for source in FENCE.findall(document.read_text()):
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue  # a piece out of the middle
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                wrong += [name for name in names if not look_up(name)]
    for package, names in INLINE_IMPORT.findall(document.read_text()):
        wrong += [name for name in names.split(", ") if not look_up(f"{package}.{name}")]
    assert not wrong, "\n".join(wrong)


def test_every_page_is_on_the_first_one():
    listed = set(LINK.findall((ROOT / "docs/index.md").read_text()))
    pages = {
        str(path.relative_to(ROOT / "docs"))
        for path in (ROOT / "docs").rglob("*.md")
        if path.name != "index.md"
    }
    assert listed == pages


# -- docstrings and comments -----------------------------------------------------------------------


def docstrings(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Yield (class, line, text) of the strings that stand by themselves; class may be empty."""

    def walk(node: ast.AST, where: str) -> Iterator[tuple[str, int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                if isinstance(child.value.value, str):
                    yield where, child.lineno, child.value.value
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{where}.{child.name}".lstrip("."))
            else:
                yield from walk(child, where)

    yield from walk(tree, "")


def resolves(reference: str, module: str, where: str) -> bool:
    """Whether a reference means something at a place of a module."""
    name = reference.strip("~.").removesuffix("()")
    if "<" in name:  # text <target>
        name = name.partition("<")[2].rstrip(">")
    if name.partition(".")[0] in PACKAGES and look_up(name):
        return True
    places = [f"{module}.{where}.{name}"] if where else []
    if where and name.partition(".")[0] not in PACKAGES:
        # Another method of an enclosing class.
        places += [f"{module}.{where.rpartition('.')[0]}.{name}"] if "." in where else []
    return any(look_up(place) for place in [*places, f"{module}.{name}"]) or outside(name)


def outside(name: str) -> bool:
    """Whether a name is one of the standard library's or of trio's."""
    module, _, rest = name.partition(".")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    return bool(rest) and has(found, rest.split("."))


@pytest.mark.parametrize("module", [name for name in modules() if "__main__" not in name])
def test_references_in_docstrings_resolve(module):
    tree = ast.parse(SOURCES[module].read_text())
    wrong = [
        f"{line}: {reference}"
        for where, line, text in docstrings(tree)
        for reference in ROLE.findall(text)
        if not resolves(" ".join(reference.split()), module, where)
    ]
    assert not wrong, "\n".join(wrong)


PACKAGES_WITH_A_TABLE = [
    name
    for name, path in modules().items()
    if path.name == "__init__.py" and re.search(r"^=+ =+$", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("package", PACKAGES_WITH_A_TABLE)
def test_the_table_in_a_package_lists_its_modules(package):
    text = ast.get_docstring(ast.parse(SOURCES[package].read_text())) or ""
    cells = re.findall(r"^((?:`\w+`(?:, )?)+) ", text, re.MULTILINE)
    if not cells:
        return  # a table of something else
    below = {name.rpartition(".")[2] for name in modules() if name.rpartition(".")[0] == package}
    assert {name for cell in cells for name in re.findall(r"\w+", cell)} == below


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of docstrings and comments."""
    for _, line, text in docstrings(ast.parse(source)):
        yield line, text
    for number, row in enumerate(source.splitlines(), 1):
        comment = re.search(r"(?:^|\s)#(?: |:)(.*)$", row)
        if comment:
            yield number, comment[1]


@pytest.mark.parametrize("module", SOURCES)
def test_what_docstrings_and_comments_name_exists(module):
    wrong = []
    for line, text in prose(SOURCES[module].read_text()):
        plain = ROLE.sub("", text)
        wrong += [f"{line}: {name}" for name in PATH.findall(plain) if not path_exists(name)]
        wrong += [
            f"{line}: {name}"
            for name in DOTTED.findall(plain)
            if name not in NOT_MODULES and not look_up(name)
        ]
    assert not wrong, "\n".join(wrong)
