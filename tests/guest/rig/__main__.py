"""``python -m tests.guest.rig``: run the tests with real guest kernels."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.guest.rig import images, outer, packages
from tests.guest.rig.assets import ENVIRONMENT, Assets
from tests.guest.rig.contained import contained, end_in_order
from tests.guest.rig.packages import RigError, say

PASSED_ON = ("VMBUS_LONG", "VMBUS_SEED", "VMBUS_TEST_PATIENCE")
"""Variables of the environment that the command in the rig gets too."""


def default_cache() -> Path:
    """Where things that take long to make are kept."""
    own = os.environ.get("VMBUS_RIG_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmbus-rig"


def kvm_suffices() -> bool:
    """Whether this machine's KVM has the Hyper-V support that it takes."""
    from contextlib import closing

    from vmbus.errors import ConfigError
    from vmbus.kvm.synic_kernel import is_possible
    from vmbus.kvm.vm import Vm
    from vmbus.memory import GuestMemory

    try:
        with closing(Vm(GuestMemory())) as vm:
            return is_possible(vm)
    except (ConfigError, OSError):
        return False


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    result = argparse.ArgumentParser(
        prog="python -m tests.guest.rig",
        description="Run tests with real guest kernels, in an outer machine if need be.",
    )
    result.add_argument("--kernel", type=Path, help="the guests' bzImage, instead of Debian's")
    result.add_argument("--modules", type=Path, help="its modules, lib/modules/RELEASE")
    result.add_argument(
        "--suite", help="the guests' kernels are those of this suite of Debian, for example sid"
    )
    result.add_argument(
        "--where", choices=("auto", "here", "nested"), default="auto",
        help="use this machine's KVM, or that of an emulated machine (default: as is possible)",
    )  # fmt: skip
    result.add_argument(
        "--cpus", type=int, default=outer.CPUS, help="processors of the emulated machine"
    )
    result.add_argument(
        "--machines", type=int, default=1,
        help="emulated machines that share the tests out; each needs 8 GiB",
    )  # fmt: skip
    result.add_argument("--cache", type=Path, default=default_cache(), help="where to keep things")
    result.add_argument("--prepare", action="store_true", help="only make what the tests need")
    result.add_argument(
        "command", nargs="*",
        help="arguments for Python in the rig, for example -- -m pytest tests/guest",
    )  # fmt: skip
    return result


def main() -> int:
    """Run the command line. Returns an exit code."""
    options = parser().parse_args()
    end_in_order()
    if (options.kernel is None) != (options.modules is None):
        print("rig: KERNEL and MODULES belong together; give both", file=sys.stderr)
        return 2
    try:
        return _run(options)
    except RigError as error:
        print(f"rig: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    cache = options.cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    packages.ensure_tools()
    if options.kernel is None:
        unpacked = packages.kernel(cache, packages.GUEST_KERNEL, options.suite)
        kernel, modules = packages.kernel_files(unpacked)
    else:
        kernel, modules = options.kernel.absolute(), options.modules.absolute()
    userland = packages.userland(cache)
    if not options.command and not options.prepare:
        raise RigError("what is to be run? for the tests: make guest-test")
    nested = options.where == "nested" or (options.where == "auto" and not kvm_suffices())
    outer_kernel, _ = packages.kernel_files(packages.kernel(cache, packages.OUTER_KERNEL))
    # Guests that need what clouds' kernels have not have one like that, of their suite.
    ordinary = packages.kernel(cache, packages.OUTER_KERNEL, options.suite)
    ordinary_kernel, ordinary_modules = packages.kernel_files(ordinary)
    assets = Assets(
        kernel=kernel,
        initramfs=images.initramfs(cache, userland, modules),
        root=images.root_image(cache, userland),
        scratch=cache / "scratch",
        emulator=packages.emulator(cache),
        release=modules.name,
        ordinary_kernel=ordinary_kernel,
        ordinary_initramfs=images.initramfs(
            cache, userland, ordinary_modules, images.ORDINARY_MODULES
        ),
        ordinary_release=ordinary_modules.name,
        dpdk=images.dpdk_image(cache, packages.dpdk(cache)),
    )
    if options.prepare:
        return 0
    command = [sys.executable, *options.command]
    environment = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "TERM": "dumb",
                   "PYTHONPATH": f"{outer.REPOSITORY}:{outer.REPOSITORY / 'devices'}"}  # fmt: skip
    environment |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if nested:
        return outer.run_inside(
            command, assets,
            kernel=outer_kernel, busybox=userland / "bin/busybox", cache=cache,
            environment=environment, cpus=options.cpus, machines=max(options.machines, 1),
        )  # fmt: skip
    say("this machine's KVM is used")
    assets.scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        description = Path(folder) / "assets.json"
        assets.save(description)
        environment[ENVIRONMENT] = str(description)
        everything = {**os.environ, **environment}
        with contained(command, env=everything, cwd=outer.REPOSITORY) as process:
            code: int = process.wait()
            return code


if __name__ == "__main__":
    sys.exit(main())
