"""Each check of ``vmbus doctor`` with what it can find."""

import errno
import fcntl
import os
import platform
import resource
import shutil
import socket

import pytest

from tests.support.checks import outcome
from tests.support.cli import install_plugin
from vmbus.cli import checks
from vmbus.cli.checks import (
    Outcome,
    check_architecture,
    check_descriptors,
    check_huge_pages,
    check_nowait,
    check_plugins,
    check_python,
    check_tap,
    check_tool,
    effective_capabilities,
    try_eventfd,
    try_memfd,
    try_out,
    try_seqpacket,
)

NET_ADMIN = 1 << 12


def test_this_interpreter_and_its_processor_can_serve():
    assert outcome(check_python()) is Outcome.OK
    assert outcome(check_architecture("x86_64")) is Outcome.OK


def test_another_interpreter_is_said_to_be_untested(monkeypatch):
    monkeypatch.setattr(platform, "python_implementation", lambda: "PyPy")
    assert outcome(check_python()) is Outcome.LIMITED


def test_another_processor_cannot_serve():
    check = check_architecture("aarch64")
    assert outcome(check) is Outcome.MISSING
    assert check.needed


@pytest.mark.parametrize("attempt", [try_memfd, try_eventfd, try_seqpacket])
def test_what_the_kernel_needs_is_tried_out(attempt):
    check = try_out("thing", attempt, "get another kernel")
    assert (outcome(check), check.found, check.needed) == (Outcome.OK, "works", True)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSYS, "no such call"), AttributeError("eventfd")]
)
def test_what_does_not_work_is_missing(error):
    def attempt():
        raise error

    check = try_out("thing", attempt, "get another kernel")
    assert (outcome(check), check.advice) == (Outcome.MISSING, "get another kernel")
    assert check.found in {"no such call", "eventfd"}


def test_a_seal_that_does_not_hold_is_noticed(monkeypatch):
    monkeypatch.setattr(fcntl, "fcntl", lambda *_: 0)
    assert outcome(try_out("memfd", try_memfd, "x")) is Outcome.MISSING


def test_a_file_that_does_not_arrive_is_noticed(monkeypatch):
    monkeypatch.setattr(socket, "send_fds", lambda sock, data, fds: sock.send(data[0]))
    assert outcome(try_out("sockets", try_seqpacket, "x")) is Outcome.MISSING


def test_a_doorbell_that_counts_wrong_is_noticed(monkeypatch):
    monkeypatch.setattr(os, "eventfd_read", lambda fd: 2)
    assert outcome(try_out("eventfd", try_eventfd, "x")) is Outcome.MISSING


@pytest.mark.parametrize(
    ("soft", "hard", "expected", "found"),
    [
        (1024, 1 << 20, Outcome.OK, "1024, can be raised to 1048576"),
        (1024, resource.RLIM_INFINITY, Outcome.OK, "1024, can be raised to unlimited"),
        (256, 1024, Outcome.LIMITED, "256, can be raised to 1024"),
    ],
)
def test_too_few_open_files_are_a_limit(soft, hard, expected, found):
    check = check_descriptors(soft, hard)
    assert (outcome(check), check.found) == (expected, found)


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("always within_size [advise] never deny force\n", Outcome.OK, "advise"),
        ("[always] within_size advise never deny force\n", Outcome.OK, "always"),
        ("always within_size advise [never] deny force\n", Outcome.LIMITED, "never"),
        ("nonsense\n", Outcome.LIMITED, "unknown to this kernel"),
        (None, Outcome.LIMITED, "unknown to this kernel"),
    ],
)
def test_huge_pages_for_guest_memory_are_the_kernels_choice(tmp_path, text, expected, found):
    setting = tmp_path / "shmem_enabled"
    if text is not None:
        setting.write_text(text)
    check = check_huge_pages(str(setting))
    assert (outcome(check), check.found) == (expected, found)
    assert (str(setting) in check.advice) is (expected is Outcome.LIMITED)


def test_plugins_are_tried(tmp_path, monkeypatch):
    check = check_plugins()
    assert outcome(check) is Outcome.OK
    assert check.found.startswith("2 devices, ")
    assert check.found.endswith(" disk back-ends, 0 broken")
    install_plugin(tmp_path, "storvsp.disks", "bad", "baddisk2:open_spec", "import nonsense_")
    monkeypatch.syspath_prepend(tmp_path)
    check = check_plugins()
    assert (outcome(check), check.advice) == (Outcome.LIMITED, "see vmbus devices for disk bad")
    monkeypatch.setattr(checks, "find_plugins", list)
    assert outcome(check_plugins()) is Outcome.MISSING


def test_reads_that_do_not_wait_are_tried_in_the_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda *_: 4096)
    assert outcome(check_nowait(str(tmp_path))) is Outcome.OK
    for error, expected in (
        (BlockingIOError(errno.EAGAIN, "not cached"), Outcome.OK),
        (OSError(errno.EOPNOTSUPP, "not supported"), Outcome.LIMITED),
    ):

        def preadv(*_, error=error):
            raise error

        monkeypatch.setattr(os, "preadv", preadv)
        assert outcome(check_nowait(str(tmp_path))) is expected
    check = check_nowait(str(tmp_path / "missing"))
    assert outcome(check) is Outcome.LIMITED
    assert "cannot make a file there" in check.found


def test_capabilities_are_read_from_the_kernel(tmp_path):
    assert effective_capabilities() >= 0
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapEff:\t0000000000001000\n")
    assert effective_capabilities(str(status)) == NET_ADMIN
    for text in ("Name:\tx\n", "CapEff:\tzz\n"):
        status.write_text(text)
        assert effective_capabilities(str(status)) == 0
    assert effective_capabilities(str(tmp_path / "missing")) == 0


def test_tap_is_looked_for(tmp_path, monkeypatch):
    node = tmp_path / "tun"
    assert outcome(check_tap(str(node), NET_ADMIN)) is Outcome.MISSING
    node.write_bytes(b"")
    check = check_tap(str(node), NET_ADMIN)
    assert (outcome(check), "not a TUN device" in check.found) == (Outcome.MISSING, True)
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    assert outcome(check_tap(str(node), NET_ADMIN)) is Outcome.OK
    assert outcome(check_tap(str(node), 0)) is Outcome.LIMITED
    assert outcome(check_tap(str(tmp_path), NET_ADMIN)) is Outcome.MISSING


def test_tools_are_optional(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    check = check_tool("vng", "runs guests")
    assert (outcome(check), check.needed) == (Outcome.MISSING, False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    check = check_tool("vng", "runs guests")
    assert (outcome(check), check.found) == (Outcome.OK, "/usr/bin/vng")
