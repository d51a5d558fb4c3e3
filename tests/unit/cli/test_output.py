"""How commands write: tables, sizes, JSON, and text of strangers."""

import sys

import click
import pytest

from tests.support.cli import Terminal
from vmbus.cli import output
from vmbus.cli.output import print_json, print_table, safe, size_text


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
