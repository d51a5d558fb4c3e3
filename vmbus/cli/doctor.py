"""``vmbus doctor``: what this machine can do, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import itertools
import platform

import click

from vmbus import __version__
from vmbus.cli.checks import Check, Outcome, general_checks
from vmbus.cli.kvm_checks import MODE_TEXT, SynicMode, check_guest, check_kvm
from vmbus.cli.output import STYLES, bold, print_json, safe, styled
from vmbus.cli.params import json_option
from vmbus.cli.program import EXIT_FAILED

NAME_WIDTH = 36


@click.command()
@json_option
@click.argument("directory", default=".", type=click.Path(exists=True, file_okay=False))
@click.pass_context
def command(ctx: click.Context, *, as_json: bool, directory: str) -> None:
    """Show what this machine can do, and what to do about the rest.

    DIRECTORY is where disk images are; by default, here. The exit code is 1 if something is
    missing without which no guest can be served; all else is optional.
    """
    kvm, mode, capabilities = check_kvm()
    if mode is not SynicMode.NONE:
        from vmbus.kvm.vcpu import ignore_kick_signal

        ignore_kick_signal()
        kvm.append(check_guest())
    checks = [*general_checks(directory), *kvm]
    missing = [check for check in checks if check.needed and check.outcome is Outcome.MISSING]
    if as_json:
        print_json(
            {
                "ok": not missing,
                "version": __version__,
                "kernel": platform.release(),
                "synic_mode": mode.value,
                "kvm_capabilities": capabilities,
                "checks": [dataclasses.asdict(check) for check in checks],
            }
        )
    else:
        for line in report(checks):
            click.echo(line)
        click.echo(f"\nSynIC mode of virtual machines here: {MODE_TEXT[mode]}")
        if missing:
            names = ", ".join(check.name for check in missing)
            click.echo(f"Guests cannot be served here; missing: {names}")
        else:
            click.echo("Guests can be served here.")
    if missing:
        ctx.exit(EXIT_FAILED)


def report(checks: list[Check]) -> list[str]:
    """Return the lines of the report."""
    lines: list[str] = []
    for group, members in itertools.groupby(checks, key=lambda check: check.group):
        if lines:
            lines.append("")
        lines.append(bold(group[0].upper() + group[1:]))
        for check in members:
            lines.append(f"  {_word(check)} {safe(check.name):<{NAME_WIDTH}} {safe(check.found)}")
            if check.advice:
                lines.append(f"  {'':7} {'':{NAME_WIDTH}} {check.advice}")
    return lines


def _word(check: Check) -> str:
    optional = check.outcome is Outcome.MISSING and not check.needed
    text = f"{'absent' if optional else check.outcome.value:<7}"
    if not styled():
        return text
    return click.style(text, dim=True) if optional else click.style(text, STYLES[check.outcome])
