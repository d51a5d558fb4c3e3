"""Rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 500
LONG_MODULES = {
    "vmbus/wire/messages.py": "one class for each of 29 messages, and the table of them",
}
TEXT = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".json", ".sh", ""}
TOP = ("vmbus", "devices", "tests", "docs", "captures", ".ci")

ENGINE = "test_engine_machine.py: Bus"
SERVER = "test_attach_hostile_bytes.py: test_the_server_survives_any_attached_vmm_and_leaks_nothing"
PAYLOADS = "test_attach_hostile_bytes.py: test_arbitrary_payloads_raise_only_the_protocol_error"
SCSI = "test_scsi_commands.py: test_every_command_has_one_outcome_within_its_bounds"
SESSION = (
    "test_session_any_packets.py: test_every_packet_is_answered_exactly_once_if_it_asks_for_it"
)
ADAPTER = (
    "test_adapter_any_packets.py: test_every_packet_is_answered_exactly_once_if_it_asks_for_it"
)
CONTROL = "test_control.py: test_a_request_has_one_reply_that_drivers_take"
WISHES = "test_frames.py: test_a_guest_may_wish_anything_of_any_frame"
DISSECTED = "test_session_any_records.py: test_any_records_are_taken_apart"
TRACES = "test_reader_any_bytes.py: test_any_bytes_behind_a_section_are_read_or_an_error"
FRAMES = "test_messages.py: test_any_messages_are_frames_or_refused"
BOTH_WAYS = "test_transmit_both_ways.py: test_the_short_way_ends_where_the_long_way_does"
PAGES = "test_messages.py: test_any_pages_are_bytes_or_refused"
SWITCH = "test_switch_any_messages.py: test_no_stranger_and_no_other_switch_harms_one"
SERVING = "test_requests_both_ways.py: test_the_fast_path_does_what_the_long_way_does"
# Steps of a larger decoder. The property test of the whole, named here, gets into all of them:
# looked up with a profiler, not guessed.
REACHED_THROUGH = {
    "_obey_untrusted": "test_shared_any_records.py: test_no_guest_harms_a_keeper_or_its_neighbours",
    "_claim_untrusted": "test_parcels_any_bytes.py: test_any_message_is_taken_or_ends_the_worker",
    "_take_untrusted": "test_parcels_any_bytes.py: test_any_message_is_taken_or_ends_the_worker",
    "_answer_untrusted": DISSECTED,
    "_dissect_untrusted": DISSECTED,
    "_memory_untrusted": DISSECTED,
    "_byte_order_untrusted": TRACES,
    "_options_untrusted": TRACES,
    "_record_untrusted": TRACES,
    "blocks_untrusted": TRACES,
    "packets_untrusted": TRACES,
    "_apply_untrusted": CONTROL,
    "_capabilities_untrusted": CONTROL,
    "_initialize_untrusted": CONTROL,
    "_parameter_untrusted": CONTROL,
    "_query_untrusted": CONTROL,
    "_set_untrusted": CONTROL,
    "_checksum_untrusted": WISHES,
    "_large_send_untrusted": WISHES,
    "from_guest_untrusted": WISHES,
    "_frame_untrusted": FRAMES,
    "_frames_of_one_untrusted": FRAMES,
    "_frames_of_pieces_untrusted": FRAMES,
    "_items_untrusted": FRAMES,
    "large_frame_untrusted": BOTH_WAYS,
    "_pages_untrusted": PAGES,
    "_single_pages_untrusted": PAGES,
    "_control_untrusted": ADAPTER,
    "_init_untrusted": ADAPTER,
    "_message_untrusted": ADAPTER,
    "_packet_untrusted": ADAPTER,
    "_receive_buffer_untrusted": ADAPTER,
    "_send_buffer_untrusted": ADAPTER,
    "_subchannels_untrusted": ADAPTER,
    "completed_untrusted": ADAPTER,
    "read_untrusted": ADAPTER,
    "_check_pmi_untrusted": SCSI,
    "_check_sealed_untrusted": SERVER,
    "_check_whole_unit_untrusted": SCSI,
    "_command_untrusted": SERVING,
    "_create_subchannels_untrusted": SESSION,
    "_decode_name_untrusted": SERVER,
    "_extend_untrusted": ENGINE,
    "_greet_untrusted": SWITCH,
    "_negotiate_untrusted": SESSION,
    "_plan_untrusted": SCSI,
    "_read_cd_untrusted": SCSI,
    "_read_plan_untrusted": SCSI,
    "_receive_untrusted": SWITCH,
    "agree_untrusted": ENGINE,
    "answer_untrusted": SERVER,
    "body_untrusted": ENGINE,
    "check_eventfd_untrusted": SERVER,
    "check_memory_untrusted": SERVER,
    "check_srb_untrusted": SERVING,
    "external_data_untrusted": SERVING,
    "whole_packet_untrusted": SERVING,
    "close_reserved_untrusted": ENGINE,
    "data_out_untrusted": SCSI,
    "decode_text_untrusted": PAYLOADS,
    "header_untrusted": ENGINE,
    "index_untrusted": ("test_ring_hostile.py: test_any_ring_is_read_or_refused_with_ring_error"),
    "map_region_untrusted": SERVER,
    "modify_untrusted": ENGINE,
    "open_untrusted": ENGINE,
    "range_untrusted": SCSI,
    "remove_untrusted": SERVER,
    "replace_untrusted": SERVER,
    "set_sint_fd_untrusted": SERVER,
    "set_state_untrusted": SERVER,
    "teardown_untrusted": ENGINE,
    "unpack_untrusted": PAYLOADS,
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for each in folders for path in (ROOT / each).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def called(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call in a file with the last part of the name it is called by."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node.func.attr, node
            elif isinstance(node.func, ast.Name):
                yield node.func.id, node


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def documents() -> dict[str, str]:
    """Return the text files of the repository."""
    # In a second worktree .git is a file, which says where the first one is.
    paths = [
        path
        for path in ROOT.iterdir()
        if path.name != ".git" and not path.name.startswith(".coverage")
    ]
    for each in TOP:
        paths += [path for path in (ROOT / each).rglob("*") if "__pycache__" not in path.parts]
    return {
        relative(path): path.read_text()
        for path in sorted(paths)
        if path.is_file() and path.suffix in TEXT
    }


# -- shared memory ---------------------------------------------------------------------------------

SHARED = ["vmbus/ring.py", "vmbus/memory.py", "vmbus/host/doorbells.py", "vmbus/synic/model.py"]


@pytest.mark.parametrize("name", SHARED)
def test_shared_memory_is_never_packed_into(name):
    """``pack_into`` clears the bytes before it stores them, and another processor sees that."""
    for called_name, node in called(ROOT / name):
        assert called_name != "pack_into", f"line {node.lineno}"
    assert "pack_into" not in {
        node.attr for node in ast.walk(tree(ROOT / name)) if isinstance(node, ast.Attribute)
    }


def test_control_words_of_a_ring_are_items_of_a_cast_view():
    """What is stored to or loaded from ``control`` is one item, never a slice."""
    for node in ast.walk(tree(ROOT / "vmbus/ring.py")):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == "control"
        ):
            assert not isinstance(node.slice, ast.Slice), f"line {node.lineno}"


# -- construct -------------------------------------------------------------------------------------


def test_construct_is_interpreted():
    """Compiled layouts accept truncated input without an error."""
    for path in sources("vmbus", "devices", "docs"):
        for name, node in called(path):
            if name == "compile":
                assert isinstance(node.func, ast.Attribute), relative(path)
                owner = ast.unparse(node.func.value)
                assert owner == "re", f"{relative(path)}:{node.lineno}: {owner}.compile()"


# -- size and finish -------------------------------------------------------------------------------


def test_modules_are_short():
    long = {}
    for path in sources("vmbus", "devices"):
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES:
            long[relative(path)] = lines
    assert not long.keys() - LONG_MODULES.keys(), long
    assert not LONG_MODULES.keys() - long.keys(), "no longer long: take it off the list"


def test_every_module_says_what_it_is():
    for path in sources("vmbus", "devices", "tests", "docs"):
        if path.read_text().strip():
            assert ast.get_docstring(tree(path)), relative(path)


def test_no_error_is_swallowed_wholesale():
    for path in sources("vmbus", "devices"):
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            silent = all(isinstance(each, ast.Pass | ast.Continue) for each in node.body)
            assert not (broad and silent), f"{relative(path)}:{node.lineno}"


def test_nothing_is_left_for_later():
    unfinished = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|not (yet implemen|implemented y)\w+)\b")
    for path in sources("vmbus", "devices", "docs", "tests"):
        found = unfinished.search(path.read_text())
        assert not found, f"{relative(path)}: {found}"
    for path in sources("vmbus", "devices"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Raise) and node.exc is not None:
                assert "NotImplemented" + "Error" not in ast.unparse(node.exc), relative(path)


# Places of one machine, and numbers that mean something in one tracker only. Written in pieces,
# because this file is searched as well.
FOREIGN = [
    r"(?<![\w.])/wo" r"rk/",
    r"(?<![\w.])/tm" r"p/",
    r"\bshar" r"ed/(design|reference|hooks)",
    r"(?i)\b(issue|bug|ticket|pull request|pr) #?\d+\b",
    r"(?<![\w&])#\d{2,}(?![\w-])",
    r"(?i)\bas an ai\b",
    r"(?i)\blanguage mod" r"el\b",
]


@pytest.mark.parametrize("pattern", FOREIGN)
def test_the_repository_speaks_of_nothing_outside_of_it(pattern):
    rule = re.compile(pattern)
    found = []
    for name, text in documents().items():
        found += [
            f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
            for match in rule.finditer(text)
        ]
    assert not found, "\n".join(found)


# -- time decides no test --------------------------------------------------------------------------

CLOCKS = {
    "fail_after", "fail_at", "move_on_after", "move_on_at", "sleep", "sleep_until", "settimeout",
    "join", "wait", "wait_for", "acquire", "select", "communicate", "timeout",
}  # fmt: skip
"""What takes seconds by that name, as a number of its own or the last one."""
LIMITS = ("timeout", "grace", "patience", "deadline", "seconds")
"""What names of parameters end in that take seconds."""
MOCK_CLOCKS = {"autojump_clock", "mock_clock"}
"""In a test that has one of these, a minute passes at once."""


def numbers_of(module: ast.Module) -> dict[str, float]:
    """Return the constants of a module that are a plain number other than 0."""
    return {
        target.id: found
        for node in module.body
        if isinstance(node, ast.Assign) and (found := number_in(node.value, {}))
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def number_in(node: ast.AST | None, names: dict[str, float]) -> float:
    """Return the first number other than 0 in an expression, or 0."""
    for each in ast.walk(node) if node is not None else ():
        value = each.value if isinstance(each, ast.Constant) else None
        if isinstance(value, int | float) and value and value is not True:
            return float(value)
        if isinstance(each, ast.Name) and each.id in names:
            return names[each.id]
    return 0


def own_clocks(module: ast.Module) -> Iterator[ast.Call]:
    """Yield each call that is given a time of the module's own making, in seconds."""
    names = numbers_of(module)

    def look(node: ast.AST, *, mocked: bool) -> Iterator[ast.Call]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            mocked |= bool({each.arg for each in node.args.args} & MOCK_CLOCKS)
        if isinstance(node, ast.Call) and is_clock(node) and not mocked:
            yield node
        for each in ast.iter_child_nodes(node):
            yield from look(each, mocked=mocked)

    def is_clock(call: ast.Call) -> bool:
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        named = [each.value for each in call.keywords if (each.arg or "").endswith(LIMITS)]
        last = call.args[-1:] if name in CLOCKS else []
        return any(is_time(each) for each in (*named, *last))

    def is_time(node: ast.AST) -> bool:
        # A multiple of the one value, or a number by itself.
        if isinstance(node, ast.BinOp):
            parts = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            return not parts & {"PATIENCE", "LOOK", "SOON"} and bool(number_in(node, names))
        return isinstance(node, ast.Constant | ast.Name) and bool(number_in(node, names))

    yield from look(module, mocked=False)


def test_time_decides_no_test():
    """What has to come is waited for with ``tests/support/patience.py`` alone."""
    found = []
    for path in sources("tests"):
        if path.parts[-2] in BENCHMARKS or relative(path) in TIME_IS_THEIR_TASK:
            continue
        found += [f"{relative(path)}:{each.lineno}" for each in own_clocks(tree(path))]
    assert not found, "\n".join(found)


TIME_IS_THEIR_TASK = {
    "tests/support/patience.py": "is where the time is",
}
BENCHMARKS = ("bench", "versus")
"""Directories."""


@pytest.mark.parametrize(
    ("text", "clocks"),
    [
        ("with trio.fail_after(30): pass", 1),
        ("LIMIT = 30\nthread.join(LIMIT)", 1),
        ("done.wait(timeout=2.5)", 1),
        ("ServerLimits(hello_timeout=0.05)", 1),
        ("trio.move_on_after(trio.current_time() + 5)", 1),
        ("pytestmark = pytest.mark.timeout(3600)", 1),
        ("async def test(autojump_clock):\n    await trio.sleep(60)", 0),
        ("async def test(tmp_path):\n    await trio.sleep(60)", 1),
        ("trio.fail_after(PATIENCE); thread.join(2 * PATIENCE)", 0),
        ("trio.sleep(0); ', '.join(parts); process.wait()", 0),
    ],
)
def test_a_clock_is_seen_wherever_it_is(text, clocks):
    assert len(list(own_clocks(ast.parse(text)))) == clocks


# -- hostile input ---------------------------------------------------------------------------------


def untrusted_functions() -> dict[str, str]:
    """Return each ``*_untrusted`` function of the packages and where it is."""
    found = {}
    for path in sources("vmbus", "devices"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.endswith(
                "_untrusted"
            ):
                found[node.name] = f"{relative(path)}:{node.lineno}"
    return found


def names_in(path: Path) -> set[str]:
    """Return all names that a file uses, attributes included."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def test_every_function_that_reads_hostile_bytes_has_a_property_test():
    used: set[str] = set()
    for path in sources("tests/property", "tests/fuzz", "tests/reference", "vmbus/fuzz"):
        if "hypothesis" in path.read_text() or "fuzz" in path.parts:
            used |= names_in(path)
    missing = []
    for name, place in sorted(untrusted_functions().items()):
        if name not in used and name not in REACHED_THROUGH:
            missing.append(f"{place}: {name}")
    assert not missing, "\n".join(missing)


def test_the_list_of_detours_is_true():
    functions = untrusted_functions()
    for name, detour in REACHED_THROUGH.items():
        assert name in functions, f"{name} is gone: take it off the list"
        file, test = detour.split(": ")
        (path,) = (ROOT / "tests/property").rglob(file)
        defined = {
            node.name
            for node in tree(path).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert test in defined, detour
