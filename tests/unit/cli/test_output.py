"""How commands write: tables, sizes, JSON, and text of strangers."""

import contextlib
import io
import logging
import os
import pty
import re
import subprocess
import sys

import click
import pytest

from tests.support.cli import COMMAND, Terminal, child_environment
from tests.support.patience import PATIENCE
from vmbus.cli import output
from vmbus.cli.logs import logging_to
from vmbus.cli.output import console, print_json, print_table, safe, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (512, "512 B"),
        (1010, "1010 B"),
        (1536, "1.5 KiB"),
        (64 << 20, "64 MiB"),
        (1023 << 20, "1023 MiB"),
        (1 << 40, "1 TiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes_are_written_for_people(size, text):
    assert size_text(size) == text


def test_text_of_strangers_cannot_steer_a_terminal():
    assert safe("vm\x1b[2J\x9b1m\u202eé 1") == "vm?[2J?1m?é 1"


def test_tables_in_a_pipe_are_aligned_and_not_cut(capsys):
    long = "x" * 300
    print_table(("a", "long one"), [("1", long), ("333", "\x1b[2J")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["a    long one", f"1    {long}", "333  ?[2J"]


def test_tables_on_a_terminal_show_what_rich_must_not_interpret(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_table(("name", "state"), [("[red]x", "broken"), ("y" * 60, "fine")])
    text = terminal.getvalue()
    assert "[red]x" in text
    assert "\x1b[31mbroken" in text
    assert click.unstyle(text).count("y") == 60


def test_json_is_one_line(capsys):
    print_json({"a": ["é", 1]})
    assert capsys.readouterr().out == '{"a": ["é", 1]}\n'


def test_a_pipe_is_no_terminal():
    assert output.on_terminal() is sys.stdout.isatty()


@pytest.mark.parametrize(
    ("environment", "terminal", "colours"),
    [
        ({}, True, True),
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "0"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "unknown"}, False, False),
    ],
    ids=str,
)
def test_the_environment_says_what_a_terminal_can_do(monkeypatch, environment, terminal, colours):
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen = Terminal()
    assert (output.on_terminal(screen), output.styled(screen)) == (terminal, colours)
    monkeypatch.setattr(sys, "stdout", screen)
    print_table(("state",), [("broken",)])
    console().print("[ok]", style="red")
    click.echo(output.bold("bold"))
    with logging_to(screen):
        logging.getLogger("vmbus.cli").error("ouch")
    assert ("\x1b" in screen.getvalue()) == colours
    assert output.on_terminal(io.StringIO()) is output.styled(io.StringIO()) is False


def run_on_a_terminal(*arguments: str, **extra: str) -> str:
    """Run a command whose standard output and error are a terminal; return what it shows."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env=child_environment(**extra),
    )
    os.close(slave)
    shown = b""
    with open(master, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # its end
        while data := terminal.read(65536):
            shown += data
    process.wait(PATIENCE)
    return shown.decode()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("devices",), "storvsp"),
        (("doctor",), "Serving guests"),
        (("serve", "--socket", "/nowhere/s"), "cannot listen"),
        (("demo", "--size", "1M", "--seconds", "0", "--disk", "ram:[lun=0]1M"), "is taken"),
    ],
    ids=lambda value: value[0],
)
def test_who_wants_no_colours_gets_none_from_any_command(arguments, text):
    shown = run_on_a_terminal(*arguments, TERM="xterm", NO_COLOR="1")
    assert text in shown
    assert not re.search("\x1b\\[[0-9;]*m", shown)
    dumb = run_on_a_terminal(*arguments, TERM="dumb")
    assert text in dumb
    assert "\x1b" not in dumb
