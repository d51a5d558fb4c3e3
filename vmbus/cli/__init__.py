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

import contextlib
import importlib.util
import sys

from vmbus.streams import guarded

__all__ = ["main"]


def main() -> int:
    """Run the command with ``sys.argv``; the console script ``vmbus`` is this.

    Returns:
        The exit code.
    """
    missing = [name for name in ("click", "rich") if importlib.util.find_spec(name) is None]
    return guarded((lambda: _complain(missing)) if missing else _run)


def _complain(missing: list[str]) -> int:
    print(
        f"vmbus: the command line needs {' and '.join(missing)};"
        ' install with: pip install "vmbus[cli]"',
        file=sys.stderr,
    )
    return 1


def _run() -> int:
    import click

    from vmbus.cli.program import EXIT_INTERRUPTED, program

    try:
        # Without standalone mode, click leaves it to us how the program ends.
        code = program.main(prog_name="vmbus", standalone_mode=False)
    except click.Abort:
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        with contextlib.suppress(OSError):  # of standard error
            error.show()
        return error.exit_code
    return code if isinstance(code, int) else 0
