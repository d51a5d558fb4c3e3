"""Writes docs/reference/states.md from the tables of vmbus.engine.states.

Run it after a change to the tables: ``python docs/make_state_diagrams.py``. A test compares the
page with what this makes.
"""

from __future__ import annotations

from pathlib import Path

from vmbus.engine import states
from vmbus.wire.messages import MESSAGES, Direction

PAGE = Path(__file__).parent / "reference" / "states.md"

INTRODUCTION = """\
# States of the bus

<!-- Made by docs/make_state_diagrams.py from vmbus/engine/states.py. Do not edit. -->

Four machines make up the engine: one for the connection, two for every channel and one for every
GPADL. An arrow is labelled with what causes it: a message in capitals, a call of the host program
or the device in small letters. Whatever has no arrow in a state is refused there: a message of
the guest becomes a `Fault` (with a reply saying so where the protocol has one), a call raises
`LocalProtocolError`.
"""

SECTIONS: tuple[tuple[str, str, states.Table], ...] = (
    (
        "Connection",
        "What the guest as a whole is up to.",
        states.CONNECTION,
    ),
    (
        "Presence of a channel",
        "What the guest knows of a channel.",
        states.PRESENCE,
    ),
    (
        "Life of a channel",
        "What the device has been told, and what it has answered.",
        states.LIFE,
    ),
    (
        "GPADL",
        "A list of pages that the guest shares.",
        states.GPADL,
    ),
)


def describe(state: type) -> str:
    """Return the first paragraph of a state's docstring, on one line."""
    text = (state.__doc__ or "").split("\n\n", maxsplit=1)[0]
    return " ".join(text.split())


def draw(table: states.Table) -> list[str]:
    """Return a Mermaid state diagram of one table."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(table)).__name__}"]
    for state, row in table.items():
        for trigger, successor in row.items():
            target = "[*]" if successor is states.Gone else successor.__name__
            lines.append(f"    {state.__name__} --> {target}: {trigger.value}")
    return [*lines, "```"]


def list_states(table: states.Table) -> list[str]:
    """Return a Markdown table of the states and their meanings."""
    rows = [
        f"| `{state.__name__}` | {describe(state)} |" for state in table if state is not states.Gone
    ]
    return ["| state | meaning |", "|---|---|", *rows]


def list_messages() -> list[str]:
    """Return a Markdown table of the guest's messages and where they are accepted."""
    columns = list(states.CONNECTION)
    lines = [
        "| message | " + " | ".join(f"`{each.__name__}`" for each in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    seen = set()
    for spec in sorted(MESSAGES, key=lambda spec: spec.message.TYPE):
        message = spec.message
        if spec.direction is Direction.GUEST_TO_HOST and message not in seen:
            seen.add(message)
            marks = ["yes" if each in states.ACCEPTED[message] else "" for each in columns]
            lines.append(f"| {message.TYPE} {message.NAME} | " + " | ".join(marks) + " |")
    return lines


def make() -> str:
    """Return the whole page."""
    lines = INTRODUCTION.split("\n")
    for title, text, table in SECTIONS:
        lines += [f"## {title}", "", text, "", *draw(table), "", *list_states(table), ""]
    lines += [
        "## Which message is accepted when",
        "",
        "By the state of the connection; the states of channels and GPADLs decide further. Which "
        "version and feature a message needs is in the table of `vmbus/wire/messages.py`.",
        "",
        *list_messages(),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(make(), encoding="utf-8")
