"""The initramfs and the root file system of guests.

The initramfs has busybox, the modules that a test may want, and ``init.sh``. It is all a guest
needs; programs that are more than busybox are on the root file system, a disk of ours like any
other, which the guest mounts when it is told to, or boots from.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.guest.rig.packages import RigError, building, run, say

INIT = Path(__file__).with_name("init.sh")
ROOT_LABEL = "tools"
ROOT_SIZE = "900M"
DPDK_SIZE = "96M"
MODULES = (
    "hv_vmbus", "hv_storvsc", "hv_netvsc", "hv_utils", "sd_mod", "sg", "sr_mod", "ext4", "isofs",
    "loop", "8021q", "virtio_pci", "virtio_scsi", "virtio_blk", "virtio_net", "crc32c_generic",
)  # fmt: skip
"""What guests can load; those of QEMU's virtual devices are for comparison."""
IF_THERE = {"crc32c_generic"}
"""Linux 6.14 and later have it built in; before, ext4 does not go without."""
ORDINARY_MODULES = (*MODULES, "uio_hv_generic")
"""What guests with the ordinary kernel can load; that for clouds has no drivers in user space."""
_LEAVE_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache",
              "usr/share/zoneinfo", "usr/lib/x86_64-linux-gnu/perl")  # fmt: skip


def module_order(modules: Path, wanted: Iterable[str]) -> list[str]:
    """Return the files of modules and of what they depend on, paths below ``modules``.

    Modules that the kernel has built in are no files. Raises RigError for one that is neither.
    """
    depends: dict[str, list[str]] = {}
    path_of: dict[str, str] = {}
    for line in _lines(modules / "modules.dep"):
        path, _, needs = line.partition(":")
        depends[path] = needs.split()
        path_of[_module_name(path)] = path
    built_in = {_module_name(line) for line in _lines(modules / "modules.builtin")}
    found: list[str] = []
    for name in wanted:
        if name in built_in or (name in IF_THERE and name not in path_of):
            continue
        if name not in path_of:
            raise RigError(f"{modules} has no module {name}")
        for path in (*reversed(depends[path_of[name]]), path_of[name]):
            if path not in found:
                found.append(path)
    return found


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError as error:
        raise RigError(f"{path.parent} is no directory of modules: no {path.name}") from error


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return gzip.decompress(data)
        case ".zst":
            try:
                return subprocess.run(
                    ["zstd", "-dcq", path], check=True, capture_output=True
                ).stdout
            except FileNotFoundError as error:
                raise RigError(f"{path} is compressed; zstd is needed") from error
        case _:
            return data


def initramfs(cache: Path, userland: Path, modules: Path, wanted: Sequence[str] = MODULES) -> Path:
    """Return an initramfs for the kernel that ``modules`` belong to. Raises RigError."""
    order = module_order(modules, wanted)
    made_by = INIT.read_bytes() + Path(__file__).read_bytes()
    digest = hashlib.sha256(made_by + str(modules).encode() + repr(order).encode())
    target = cache / f"initramfs-{modules.name}-{digest.hexdigest()[:12]}.cpio"
    with building(target) as part:
        if part is not None:
            say(f"making an initramfs for Linux {modules.name}")
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                _fill(Path(folder), userland, modules, order)
                _pack(Path(folder), part)
    return target


def _fill(tree: Path, userland: Path, modules: Path, order: list[str]) -> None:
    for name in ("bin", "dev", "proc", "sys", "tmp", "mnt", "tools", "run"):
        (tree / name).mkdir()
    shutil.copy2(userland / "usr/bin/busybox", tree / "bin/busybox")
    (tree / "bin/sh").symlink_to("busybox")
    (tree / "sbin").symlink_to("bin")  # where the kernel itself calls modprobe
    shutil.copy2(INIT, tree / "init")
    (tree / "init").chmod(0o755)
    release = tree / "lib/modules" / modules.name
    for path in order:
        # Without compression, so that busybox can load all of them.
        name = path
        for suffix in (".xz", ".gz", ".zst"):
            name = name.removesuffix(suffix)
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).write_bytes(_read_module(modules / path))
    for name in ("modules.builtin", "modules.order", "modules.builtin.modinfo"):
        if (modules / name).exists():
            shutil.copy2(modules / name, release / name)
    run("depmod", "-b", tree, modules.name)
    # The kernel opens it as standard input of init before devtmpfs is there.
    run("mknod", "-m", "600", tree / "dev/console", "c", "5", "1")


def _pack(tree: Path, target: Path) -> None:
    names = "\0".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*"))) + "\0"
    with open(target, "wb") as file:
        subprocess.run(
            ["cpio", "-o", "-0", "-H", "newc", "--quiet", "-R", "0:0"],
            cwd=tree, input=names.encode(), stdout=file, check=True,
        )  # fmt: skip


def root_image(cache: Path, userland: Path) -> Path:
    """Return an ext4 file system with the user land, labelled :data:`ROOT_LABEL`."""
    digest = hashlib.sha256(INIT.read_bytes() + userland.name.encode()).hexdigest()[:12]
    target = cache / f"root-{digest}.img"
    with building(target) as part:
        if part is not None:
            say("making the root file system")
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                tree = Path(folder) / "root"
                run("cp", "-a", "--reflink=auto", userland, tree)
                for name in _LEAVE_OUT:
                    shutil.rmtree(tree / name, ignore_errors=True)
                shutil.copy2(INIT, tree / "sbin/rig-init")
                for name in ("mnt", "tools", "tmp"):
                    (tree / name).mkdir(exist_ok=True)
                run("mke2fs", "-q", "-t", "ext4", "-L", ROOT_LABEL, "-d", tree, part, ROOT_SIZE)
    return target


def dpdk_image(cache: Path, tree: Path) -> Path:
    """Return an ext4 file system with DPDK: its libraries and testpmd.

    Args:
        cache: The rig's.
        tree: See :func:`tests.guest.rig.packages.dpdk`.
    """
    target = cache / f"{tree.name}.img"
    with building(target) as part:
        if part is not None:
            say("making the file system with DPDK")
            run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, part, DPDK_SIZE)
    return target
