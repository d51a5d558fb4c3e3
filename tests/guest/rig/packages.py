"""Debian packages: kernels, a user land for guests, and an emulator for the outer machine.

They come through ``apt-get`` and ``debootstrap`` from wherever this machine gets its packages. It
needs root, as the two programs do.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

OUTER_KERNEL = "linux-image-amd64"
GUEST_KERNEL = "linux-image-cloud-amd64"
EMULATOR_SUITE = "forky"
"""QEMU 11. Older ones lose state of nested guests more often: docs/explanation/nested-rig.md."""
NEW_SUITES = "/usr/share/debootstrap/scripts/sid"
"""How to install suites that are younger than this machine's debootstrap."""
EMULATOR_PACKAGES = ("qemu-system-x86", "seabios")
USERLAND_SUITE = "bookworm"
USERLAND_PACKAGES = (
    "busybox-static", "e2fsprogs", "ethtool", "fio", "genisoimage", "iperf3", "iproute2",
    "kexec-tools", "kmod", "libiscsi-bin", "procps", "sg3-utils", "tcpdump", "util-linux",
)  # fmt: skip
DPDK_SUITE = "trixie"
"""DPDK 24.11. With 22.11 testpmd forwards nothing: it takes the driver's queues for stopped, as the
driver does not say that they have started."""
DPDK = "dpdk-dev"
"""Has ``dpdk-testpmd``; the package ``dpdk`` has scripts only."""
DPDK_DRIVERS = ("librte-bus-vmbus", "librte-mempool-ring", "librte-net-netvsc")
"""What testpmd opens when it runs; the end of their names is the version of their interface."""
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
HOST_TOOLS = {
    "cpio": "cpio",
    "debootstrap": "debootstrap",
    "depmod": "kmod",
    "mke2fs": "e2fsprogs",
}
"""Programs the rig itself needs, and their packages."""


class RigError(Exception):
    """The rig cannot be made here; the text says why."""


def run(
    *command: str | os.PathLike[str], cwd: Path | None = None, env: dict[str, str] | None = None
) -> str:
    """Run a program and return what it printed.

    Raises:
        RigError: It failed; with the end of its output.
    """
    try:
        result = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise RigError(f"{command[0]}: not installed") from error
    if result.returncode:
        tail = "\n".join(result.stdout.splitlines()[-15:])
        raise RigError(f"{' '.join(map(str, command))}: exit code {result.returncode}\n{tail}")
    return result.stdout


def say(text: str) -> None:
    """Tell what takes its time."""
    print(f"rig: {text}", file=sys.stderr, flush=True)


def _search_path() -> str:
    """``PATH`` with the directories of the administrator's programs."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def ensure_tools() -> None:
    """Install the programs that the rig itself needs. Raises RigError."""
    os.environ["PATH"] = _search_path()
    missing = {package for program, package in HOST_TOOLS.items() if shutil.which(program) is None}
    if not missing:
        return
    if os.geteuid():
        raise RigError(f"missing; to be installed as root: apt install {' '.join(sorted(missing))}")
    say(f"installing {', '.join(sorted(missing))}")
    _update_lists()
    run("apt-get", "install", "-qy", "--no-install-recommends", *sorted(missing))


def _update_lists() -> None:
    """Fetch apt's lists unless there are some that know the kernel."""
    if not run("apt-cache", "search", "--names-only", f"^{GUEST_KERNEL}$").strip():
        run("apt-get", "update", "-q")


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path | None]:
    """Make something in the cache, once.

    Yields:
        A path to make it at, which becomes ``target`` at the end of the block; None if it is
        there already. Two that want the same wait for each other.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        part = target.parent / f".{target.name}.part"
        _remove(part)
        yield part
        part.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def kernel(cache: Path, meta: str, suite: str | None = None) -> Path:
    """Return the unpacked package of the kernel that ``meta`` depends on.

    Args:
        cache: The rig's.
        meta: Name of the package that depends on the newest kernel.
        suite: Debian's suite that it is to come from, instead of this machine's own.

    Raises:
        RigError: There is none.
    """
    options = _suite_options(cache, suite) if suite else ()
    if not suite:
        _update_lists()
    depends = run("apt-cache", *options, "depends", "--no-recommends", "--no-suggests", meta)
    names = re.findall(r"Depends: (linux-image-\S+)", depends)
    if len(names) != 1:
        raise RigError(f"{meta} depends on no kernel:\n{depends}")
    policy = run("apt-cache", *options, "policy", names[0])
    candidate = re.search(r"Candidate: (\S+)", policy)
    if candidate is None:
        raise RigError(f"there is no {names[0]} to be had")
    target = cache / f"{names[0]}_{candidate[1].replace(':', '_')}"
    with building(target) as part:
        if part is not None:
            say(f"fetching {names[0]} {candidate[1]}")
            _unpack(names[0], part, options)
            _, modules = kernel_files(part)
            run("depmod", "-b", part, modules.name)
    return target


def _suite_options(cache: Path, suite: str) -> tuple[str, ...]:
    """Return options with which apt's programs know the packages of another suite, and no other.

    It is taken from where this machine gets its own suite, with the same keys.
    """
    folder = cache / f"apt-{suite}"
    (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.list"
    options = (
        *("-o", f"Dir::Etc::SourceList={sources}", "-o", "Dir::Etc::SourceParts=/dev/null"),
        *("-o", f"Dir::State::Lists={folder / 'lists'}", "-o", "APT::Sandbox::User=root"),
        *("-o", f"Dir::Cache={folder}", "-o", "Dir::Etc::Preferences=/dev/null"),
    )
    uris = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages").split()
    # The archive itself: that of security updates has its suites named otherwise.
    archives = [uri for uri in uris if "security" not in uri]
    if not archives:
        raise RigError("this machine's apt has no archive to look for other suites in")
    with open(folder / "lock", "w", encoding="ascii") as lock:
        # apt does not wait for another one that fetches lists.
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources.write_text(f"deb [signed-by={KEYRING}] {archives[0]} {suite} main\n")
        run("apt-get", *options, "update", "-q")
    return options


def _unpack(name: str, target: Path, options: Sequence[str]) -> None:
    """Download a kernel's package and unpack it, without installing it."""
    download = target.with_name(target.name + ".deb")
    _remove(download)
    download.mkdir()
    depends = run("apt-cache", *options, "depends", "--no-recommends", "--no-suggests", name)
    # Since Linux 7 Debian has the image and the modules in packages of their own.
    parts = re.findall(r"Depends: (linux-(?:base|binary|modules)-\S+)", depends)
    # As root, apt would download as a user who may not write here.
    sandbox = ("-o", "APT::Sandbox::User=root")
    run("apt-get", "download", "-q", *sandbox, *options, name, *parts, cwd=download)
    target.mkdir()
    for package in sorted(download.glob("*.deb")):
        run("dpkg-deb", "-x", package, target)
    _remove(download)
    if not (target / "lib").exists():
        (target / "lib").symlink_to("usr/lib")


def kernel_files(unpacked: Path) -> tuple[Path, Path]:
    """Return ``(bzImage, modules)`` of an unpacked kernel package. Raises RigError."""
    modules = sorted(unpacked.glob("lib/modules/*"))
    images = [*unpacked.glob("boot/vmlinuz-*"), *unpacked.glob("lib/modules/*/vmlinuz")]
    if len(images) != 1 or len(modules) != 1:
        raise RigError(f"{unpacked} is not an unpacked kernel package")
    return images[0], modules[0]


def system(cache: Path, name: str, suite: str, packages: Sequence[str]) -> Path:
    """Return a directory with a minimal Debian and some packages. Raises RigError."""
    target = cache / f"{name}-{suite}"
    with building(target) as part:
        if part is not None:
            say(f"installing a minimal Debian {suite} with {', '.join(packages)}")
            script = Path(NEW_SUITES).with_name(suite)
            extra = () if script.exists() else ("", NEW_SUITES)
            run(
                *("debootstrap", "--variant=minbase", f"--include={','.join(packages)}"),
                *(suite, part, *extra),
            )
            shutil.rmtree(part / "var/cache/apt", ignore_errors=True)
            shutil.rmtree(part / "var/lib/apt/lists", ignore_errors=True)
    return target


def emulator(cache: Path) -> Path:
    """Return a program that runs QEMU's ``qemu-system-x86_64``. Raises RigError.

    It is started with its own loader and libraries, where it lies: no chroot.
    """
    tree = system(cache, "emulator", EMULATOR_SUITE, EMULATOR_PACKAGES)
    wrapper = cache / "qemu-system-x86_64"
    wrapper.write_text(
        "#!/bin/sh\n"
        f"tree='{tree}'\n"
        'exec "$tree/lib64/ld-linux-x86-64.so.2" \\\n'
        '  --library-path "$tree/usr/lib/x86_64-linux-gnu" \\\n'
        '  "$tree/usr/bin/qemu-system-x86_64" \\\n'
        '  -L "$tree/usr/share/qemu" -L "$tree/usr/share/seabios" "$@"\n'
    )
    wrapper.chmod(0o755)
    return wrapper


def userland(cache: Path) -> Path:
    """Return the guest's user land. Raises RigError."""
    return system(cache, "userland", USERLAND_SUITE, USERLAND_PACKAGES)


def dpdk(cache: Path) -> Path:
    """Return a directory with DPDK's testpmd, and all libraries that it needs. Raises RigError."""
    target = cache / f"dpdk-{DPDK_SUITE}"
    with building(target) as part:
        if part is not None:
            say(f"fetching DPDK of Debian {DPDK_SUITE}")
            nothing_installed = ("-o", "Dir::State::status=/dev/null", "-o", "Debug::NoLocking=1")
            _unpack_dpdk(part, (*_suite_options(cache, DPDK_SUITE), *nothing_installed))
    return target


def _unpack_dpdk(target: Path, options: Sequence[str]) -> None:
    depends = run("apt-cache", *options, "depends", "--no-recommends", "--no-suggests", DPDK)
    # Not the Python of its scripts, and not what programs are compiled with.
    libraries = set(re.findall(r"Depends: (lib\S+)", depends)) - {"libdpdk-dev"}
    names = run("apt-cache", *options, "pkgnames", "librte-").split()
    drivers = [
        name for name in names for driver in DPDK_DRIVERS if re.fullmatch(rf"{driver}-?\d+", name)
    ]
    uris = run(
        *("apt-get", "install", "-qq", "--print-uris", "--no-install-recommends", *options),
        *(*sorted(libraries), *drivers),
    )
    # Libraries come with programs that set a machine up, of which there is none.
    needed = re.findall(r"^\S+ ((?:lib|ibverbs-)[^_\s]+)_\S+\.deb ", uris, re.MULTILINE)
    download = target.with_name(target.name + ".deb")
    _remove(download)
    download.mkdir()
    run("apt-get", "download", "-q", *options, DPDK, *needed, cwd=download)
    target.mkdir()
    for package in sorted(download.glob("*.deb")):
        run("dpkg-deb", "-x", package, target)
    _remove(download)
    for program in target.glob("usr/bin/*"):
        if program.name != "dpdk-testpmd":
            program.unlink()
    for name in ("usr/share", "usr/include"):
        shutil.rmtree(target / name, ignore_errors=True)
