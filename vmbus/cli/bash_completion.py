r"""bash's side of completion: where a word begins, and what of it bash replaces.

click asks bash for the words of the line as bash has cut them, and bash cuts at ``:`` and ``=``
(COMP_WORDBREAKS, bash(1)), which stand in the middle of specifications. So this takes the line
itself and cuts it as a shell does that runs a command. What is offered is then cut once more: bash
replaces only what is behind the last such character, or behind a quote that is open.
"""

from __future__ import annotations

import os
import re
from typing import ClassVar, NamedTuple

from click.shell_completion import BashComplete, CompletionItem

_SPECIAL = re.compile(r"([\s\\'\"`$&;|<>()*?!#])")
_ESCAPED = r"\\\1"
_UNFINISHED = ("/", ":", "=", "[")
"""What a word ends with that goes on, so that no space belongs behind it."""

_SCRIPT = """\
%(complete_func)s() {
    local IFS=$'\\n' item response
    response=$(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_BREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1")
    COMPREPLY=()
    for item in $response; do
        case $item in
            file,*) compopt -o default ;;
            dir,*) compopt -o dirnames ;;
            more,*) compopt -o nospace; COMPREPLY+=("${item#*,}") ;;
            plain,*) COMPREPLY+=("${item#*,}") ;;
        esac
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Line(NamedTuple):
    """A command line as far as the cursor."""

    words: list[str]
    """Those that are complete, without their quotes."""
    word: str
    """The last one, without its quotes; empty behind a space."""
    kept: int
    """Characters of the last word that bash keeps: it replaces what is behind them."""
    quote: str
    """The quote that is open, or empty."""


def split_line(text: str, breaks: str) -> Line:
    """Cut a line into words.

    Args:
        text: As typed, as far as the cursor.
        breaks: Characters at which bash cuts words, COMP_WORDBREAKS.
    """
    words: list[str] = []
    word, started, kept, quote, before = "", False, 0, "", 0
    rest = iter(text)
    for character in rest:
        if quote:
            if character == quote:
                quote, kept = "", before
            elif character == "\\" and quote == '"':
                follower = next(rest, "")
                word += follower if follower in '"\\$`' else character + follower
            else:
                word += character
        elif character.isspace():
            if started:
                words.append(word)
            word, started, kept = "", False, 0
        else:
            started = True
            if character in "'\"":
                quote, before, kept = character, kept, len(word)
            elif character == "\\":
                word += next(rest, "")
            else:
                word += character
                if character in breaks:
                    kept = len(word)
    return Line(words, word, kept, quote)


class SpecComplete(BashComplete):
    """Completes words with ``:`` and ``=`` in them; see :class:`BashComplete`."""

    source_template: ClassVar[str] = _SCRIPT
    _line = Line([], "", 0, "")

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor, and the one at it."""
        breaks = os.environ.get("COMP_BREAKS", "")
        self._line = split_line(os.environ.get("COMP_LINE", ""), breaks)
        return self._line.words[1:], self._line.word

    def format_completion(self, item: CompletionItem) -> str:
        """Return what the script takes: what to do, and the text behind what bash keeps."""
        value = str(item.value)
        kind = "more" if item.type == "plain" and value.endswith(_UNFINISHED) else item.type
        kept = self._line.kept
        if not value.startswith("-") and self._line.word.startswith("-"):
            kept -= self._line.word.find("=") + 1  # --disk=raw:..., of which the value is offered
        text = value[max(kept, 0) :]
        return f"{kind},{text if self._line.quote else _SPECIAL.sub(_ESCAPED, text)}"
