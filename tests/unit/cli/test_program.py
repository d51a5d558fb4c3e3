"""The group of commands: help, mistakes, exit codes, and how fast it starts."""

import importlib
import importlib.util
import json
import sys

import click
import pytest

import vmbus
from tests.support.cli import COMMAND, child_environment, run_child, run_cli
from tests.support.house import ROOT
from vmbus import cli
from vmbus.cli import program as program_module
from vmbus.cli.program import COMMANDS, explain, program
from vmbus.errors import (
    AttachError,
    ConfigError,
    DeviceError,
    GuestProtocolError,
    PeerProtocolError,
)
from vmbus.streams import OutputError

MANUAL = ROOT / "docs" / "reference" / "cli.md"


def all_commands(command=program, path=("vmbus",)):
    """Every command that does something itself, with its words."""
    context = click.Context(command)
    if not isinstance(command, click.Group):
        yield " ".join(path), command
        return
    for name in command.list_commands(context):
        sub = command.get_command(context, name)
        assert sub is not None
        yield from all_commands(sub, (*path, name))


def test_help_lists_every_command_and_the_exit_codes():
    result = run_cli("--help")
    assert result.exit_code == 0
    for name, line in COMMANDS.items():
        assert f"  {name}" in result.output
        assert line in " ".join(result.output.split())
    assert "Exit codes: 0 done" in result.output


def test_no_arguments_show_the_help():
    result = run_cli()
    assert result.exit_code == 2
    assert "Commands:" in result.output


def test_help_imports_neither_trio_nor_rich_nor_a_command():
    code = (
        "import sys\n"
        "from vmbus.cli.program import program\n"
        "program.main(['--help'], standalone_mode=False)\n"
        "import json; print(json.dumps(sorted(sys.modules)))\n"
    )
    import subprocess

    result = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    modules = json.loads(result.stdout.splitlines()[-1])
    assert "click" in modules
    assert not {"trio", "rich", "construct", "storvsp"} & set(modules)
    assert not {f"vmbus.cli.{name}" for name in COMMANDS} & set(modules)


def test_the_version_is_the_packages():
    result = run_child("--version")
    assert (result.returncode, result.stdout) == (0, f"vmbus {vmbus.__version__}\n")


@pytest.mark.parametrize(("typed", "meant"), [("serv", "did you mean 'serve'?"), ("xyzzy", "")])
def test_an_unknown_command_names_those_that_exist(typed, meant):
    result = run_cli(typed)
    assert result.exit_code == 2
    assert f"there is no command '{typed}'; {meant}" in result.output
    assert f"there are {', '.join(COMMANDS)}" in result.output


def test_an_unknown_option_is_a_mistake_of_use():
    assert run_cli("--nonsense").exit_code == 2


def test_unknown_names_are_no_commands():
    assert program.get_command(click.Context(program), "nonsense") is None


@pytest.mark.parametrize(("words", "command"), list(all_commands()))
def test_the_manual_describes_every_command_with_all_its_options(words, command):
    manual = MANUAL.read_text(encoding="utf-8")
    _, heading, rest = manual.partition(f"\n## {' '.join(words.split()[:2])}\n")
    assert heading, f"docs/reference/cli.md has no section {words}"
    section = rest.partition("\n## ")[0]
    assert words in section
    for parameter in command.params:
        for name in parameter.opts:
            shown = name if name.startswith("-") else name.upper()
            assert f"`{shown}" in section or f" {shown}" in section, (words, shown)


@pytest.mark.parametrize(("words", "command"), list(all_commands()))
def test_every_command_and_option_has_help(words, command):
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, (words, parameter.name)


def test_missing_packages_are_named_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main() == 1
    assert capsys.readouterr().err == (
        'vmbus: the command line needs click and rich; install with: pip install "vmbus[cli]"\n'
    )


def test_an_interrupt_outside_of_a_command_has_its_exit_code(monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "main", interrupt)
    assert cli.main() == 130


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (click.Abort(), 130),
        (click.UsageError("no"), 2),
        (program_module.ProtocolFailure("no"), 3),
        (SystemExit(1), 1),
    ],
    ids=repr,
)
def test_however_a_command_ends_there_is_an_exit_code(monkeypatch, end, code):
    def ended(**_):
        raise end

    monkeypatch.setattr(program, "main", ended)
    assert cli.main() == code


def test_the_entry_point_runs_the_program(monkeypatch):
    seen = []
    monkeypatch.setattr(program, "main", lambda **options: seen.append(options))
    assert cli.main() == 0
    assert seen == [{"prog_name": "vmbus", "standalone_mode": False}]


@pytest.fixture
def failing(monkeypatch):
    """Makes ``vmbus doctor`` raise."""

    def prepare(error):
        @click.command()
        def command():
            raise error

        monkeypatch.setattr(importlib.import_module("vmbus.cli.doctor"), "command", command)
        return run_cli("doctor")

    return prepare


def wrapped(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("write ram:64M"), 2, "Error: write ram:64M\n"),
        (GuestProtocolError("bad ring"), 3, "Error: bad ring\n"),
        (PeerProtocolError("bad frame", errno=22), 3, "Error: bad frame\n"),
        (
            wrapped(AttachError("nonsense"), PeerProtocolError("x", errno=22)),
            3,
            "Error: nonsense\n",
        ),
        (AttachError("cannot connect"), 1, "Error: cannot connect\n"),
        (DeviceError("broken disk"), 1, "Error: broken disk\n"),
        (FileNotFoundError(2, "No such file", "x.img"), 1, "Error: x.img: No such file\n"),
        (OSError(5, "I/O error"), 1, "Error: I/O error\n"),
        (OSError("strange"), 1, "Error: strange\n"),
        (BaseExceptionGroup("", [ConfigError("alone")]), 2, "Error: alone\n"),
        (
            ExceptionGroup("", [ExceptionGroup("", [DeviceError("deep")])]),
            1,
            "Error: deep\n",
        ),
    ],
)
def test_expected_exceptions_become_messages_and_exit_codes(failing, error, code, text):
    result = failing(error)
    assert (result.exit_code, result.output) == (code, text)


def test_an_interrupt_has_its_exit_code_and_no_message(failing):
    result = failing(KeyboardInterrupt())
    assert (result.exit_code, result.output) == (130, "")


@pytest.mark.parametrize(
    "error",
    [
        ExceptionGroup("", [ConfigError("one"), ConfigError("two")]),
        ExceptionGroup("", [ValueError("a bug")]),
    ],
)
def test_what_nobody_expected_keeps_its_traceback(failing, error):
    assert failing(error).exception is error


def test_output_that_is_not_taken_is_left_to_who_runs_the_program():
    assert explain(OutputError(32, "Broken pipe", "standard output")) is None


@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", "devices", "doctor --json", "disk add --help", "demo --size 1M"],
)
@pytest.mark.parametrize(
    ("shell", "told"),
    [
        ("{} > /dev/full", "Error: standard output: No space left on device\n"),
        ("{} >&-", "Error: standard output: Bad file descriptor\n"),
        ("{} | true", ""),
        ("{} >&- 2>&- <&-", ""),
    ],
)
def test_output_that_is_not_taken_is_no_traceback(arguments, shell, told):
    import subprocess

    result = subprocess.run(
        shell.format(f"{' '.join(COMMAND)} {arguments}"),
        shell=True,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == told
    if "|" not in shell:
        assert result.returncode == 1


@pytest.mark.parametrize(("arguments", "code"), [("devices", 0), ("nothing", 2), ("top", 2)])
def test_messages_that_are_not_taken_change_no_exit_code(arguments, code):
    import subprocess

    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*COMMAND, arguments],
            env=child_environment(),
            stdout=subprocess.DEVNULL,
            stderr=full,
            check=False,
        )
    assert result.returncode == code


def test_commands_are_modules_of_their_own():
    for name in COMMANDS:
        module = importlib.import_module(f"vmbus.cli.{name}")
        assert isinstance(module.command, click.Command)
        assert module.__doc__
    assert program_module.__doc__
