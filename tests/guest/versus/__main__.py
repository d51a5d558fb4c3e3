"""Measure and print."""

from __future__ import annotations

import argparse
import shutil
import sys

from tests.guest.rig.assets import load_assets
from tests.guest.rig.comparison import ROUNDS, Results, machine_speed, report, table
from tests.guest.rig.processes import start_forking
from tests.guest.versus.contest import Contest
from tests.guest.versus.disk import DiskContest
from tests.guest.versus.network import NetworkContest
from tests.guest.versus.programs import MEMORY, Emulator

CONTESTS: dict[str, type[Contest]] = {"disk": DiskContest, "network": NetworkContest}
SECONDS = 5


def main() -> int:
    """Run the command line. Returns an exit code."""
    parser = argparse.ArgumentParser(description="Our devices beside QEMU's, for the same guest.")
    parser.add_argument("what", nargs="*", help=f"{' or '.join(CONTESTS)}; everything by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each job")
    parser.add_argument("--poll", type=int, help="microseconds, for vmbus serve")
    options = parser.parse_args()
    unknown = set(options.what) - set(CONTESTS)
    if unknown:
        parser.error(f"there is no comparison of {', '.join(sorted(unknown))}")
    assets = load_assets()
    if assets is None:
        print("runs in the rig: make guest-bench", file=sys.stderr)
        return 2
    folder = assets.scratch / "versus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start_forking()
    emulator = Emulator(assets, folder)
    contests = [
        CONTESTS[name](assets, folder, emulator, seconds=options.seconds, poll=options.poll)
        for name in options.what or CONTESTS
    ]
    machine: Results = {}
    for number in range(options.rounds):
        for title, value in machine_speed().items():
            machine.setdefault(title, []).append(value)
        for contest in contests:
            contest.round(number)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    comparison = []
    for contest in contests:
        comparison += ["", *table(contest.results, contest.kinds)]
    lines = report(
        guest=f"Linux {assets.release}, 1 processor, {MEMORY} MiB",
        emulator=emulator.version,
        machine=machine,
        comparison=comparison[1:],
        rounds=options.rounds,
    )
    print("\n".join(lines))
    memory = {name: size for each in contests for name, size in each.memory.items()}
    if memory:
        print("\n| memory | MiB |\n|---|---|")
    for name, value in memory.items():
        print(f"| {name} | {value:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
