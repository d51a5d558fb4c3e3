"""The command ``vmbus``. See ``docs/reference/cli.md``.

===== ==========================================================================================
exit  meaning
===== ==========================================================================================
0     done
1     it could not be done: no server there, a file is busy, something needed is missing
2     what was typed cannot be honoured; the message says what to type instead
3     a guest or the other end of a socket broke a protocol
130   interrupted from the keyboard
===== ==========================================================================================

One file per command, listed in :mod:`vmbus.cli.program` and imported when it is called.
"""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]


def main() -> int:
    """Run the command with ``sys.argv``; the console script ``vmbus`` is this.

    Returns:
        The exit code, if the command did not exit by itself.
    """
    missing = [name for name in ("click", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"vmbus: the command line needs {' and '.join(missing)};"
            ' install with: pip install "vmbus[cli]"',
            file=sys.stderr,
        )
        return 1
    try:
        from vmbus.cli.program import program

        program.main(prog_name="vmbus")
    except KeyboardInterrupt:  # before or after the command itself
        return 130
    return 0
