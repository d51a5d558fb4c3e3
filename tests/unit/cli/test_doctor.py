"""``vmbus doctor``: each check with what it can find, and the report."""

import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import socket
import stat

import click
import pytest

from tests.support.cli import install_plugin, run_cli
from vmbus.cli import checks, doctor
from vmbus.cli.checks import (
    Check,
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
    general_checks,
    try_eventfd,
    try_memfd,
    try_out,
    try_seqpacket,
)
from vmbus.cli.kvm_checks import CAPABILITIES, KVM_GET_API_VERSION, SynicMode, check_kvm

NET_ADMIN = 1 << 12


def outcome(check):
    assert bool(check.advice) is (check.outcome is not Outcome.OK), check
    return check.outcome


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
    assert outcome(check_plugins()) is Outcome.OK
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


class Kvm:
    """Answers the questions of check_kvm."""

    def __init__(self, *names, version=12, error=None):
        self.capabilities = {CAPABILITIES[f"KVM_CAP_{name}"] for name in names}
        self.version = version
        self.error = error

    def __call__(self, fd, number, argument):
        assert stat.S_ISREG(os.fstat(fd).st_mode)
        if self.error is not None:
            raise self.error
        if number == KVM_GET_API_VERSION:
            return self.version
        return 64 if argument == 66 else int(argument in self.capabilities)


IRQ = ("IRQCHIP", "IRQFD")
KERNEL = ("HYPERV", "HYPERV_SYNIC2", "HYPERV_VP_INDEX", "HYPERV_EVENTFD")


@pytest.mark.parametrize(
    ("kvm", "mode", "states"),
    [
        (Kvm(), SynicMode.NONE, "ok missing"),
        (Kvm(*IRQ), SynicMode.NONE, "ok ok missing missing"),
        (Kvm(*IRQ, "X86_USER_SPACE_MSR"), SynicMode.USER, "ok ok ok missing"),
        (
            Kvm(*IRQ, "X86_USER_SPACE_MSR", *KERNEL, "SYS_HYPERV_CPUID"),
            SynicMode.KERNEL,
            "ok ok ok ok",
        ),
        (Kvm(*IRQ, *KERNEL, "HYPERV_CPUID"), SynicMode.KERNEL, "ok ok missing ok"),
        (Kvm(*IRQ, *KERNEL), SynicMode.KERNEL, "ok ok missing ok limited"),
        (Kvm(version=11), SynicMode.NONE, "missing"),
        (Kvm(error=OSError(errno.ENOTTY, "no ioctl")), SynicMode.NONE, "missing"),
    ],
)
def test_the_synic_mode_follows_from_what_kvm_has(tmp_path, kvm, mode, states):
    node = tmp_path / "kvm"
    node.write_bytes(b"")
    found, got, capabilities = check_kvm(str(node), kvm)
    assert got is mode
    assert " ".join(outcome(check) for check in found) == states
    if kvm.error is None:
        assert capabilities.keys() == CAPABILITIES.keys()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (FileNotFoundError(errno.ENOENT, "not there"), "modprobe"),
        (PermissionError(errno.EACCES, "denied"), "usermod -aG kvm"),
        (OSError(errno.ENODEV, "no device"), "dmesg"),
    ],
)
def test_without_kvm_the_way_to_get_it_is_shown(monkeypatch, error, advice):
    def no_kvm(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_kvm)
        (check,), mode, capabilities = check_kvm()
    assert outcome(check) is Outcome.MISSING
    assert advice in check.advice
    assert (mode, capabilities, check.needed) == (SynicMode.NONE, {}, False)


def make_check(**changes):
    values = {"group": "serving guests", "name": "thing", "outcome": Outcome.OK, "found": "works"}
    return Check(**{**values, **changes})


def test_missing_and_needed_is_what_fails(monkeypatch):
    missing = make_check(outcome=Outcome.MISSING, advice="get one", name="arm")
    monkeypatch.setattr(doctor, "general_checks", lambda directory: [make_check(), missing])
    monkeypatch.setattr(doctor, "check_kvm", lambda: ([], SynicMode.NONE, {}))
    result = run_cli("doctor")
    assert result.exit_code == 0
    assert "absent  arm" in result.output
    assert "Guests can be served here." in result.output
    needed = make_check(outcome=Outcome.MISSING, advice="get one", name="leg", needed=True)
    monkeypatch.setattr(doctor, "general_checks", lambda directory: [missing, needed])
    result = run_cli("doctor")
    assert result.exit_code == 1
    assert "missing leg" in result.output
    assert "get one" in result.output
    assert "Guests cannot be served here; missing: leg" in result.output
    assert run_cli("doctor", "--json").exit_code == 1


def test_the_report_has_colour_on_a_terminal_only(monkeypatch):
    found = [
        make_check(),
        make_check(outcome=Outcome.LIMITED, advice="hm"),
        make_check(outcome=Outcome.MISSING, advice="hm", group="tools"),
        make_check(outcome=Outcome.MISSING, advice="hm", needed=True, group="tools"),
    ]
    plain = doctor.report(found)
    assert plain[0] == "Serving guests"
    assert "Tools" in plain
    assert not any("\x1b" in line for line in plain)
    monkeypatch.setattr(doctor, "on_terminal", lambda: True)
    coloured = doctor.report(found)
    assert [click.unstyle(line) for line in coloured] == plain
    assert "\x1b[32mok" in coloured[1]
    assert "\x1b[31mmissing" in "".join(coloured)


def test_json_has_a_fixed_form():
    result = run_cli("doctor", "--json")
    report = json.loads(result.output)
    assert report.keys() == {
        "ok", "version", "kernel", "synic_mode", "kvm_capabilities", "checks"
    }  # fmt: skip
    assert result.exit_code == (0 if report["ok"] else 1)
    assert report["synic_mode"] in {"kernel", "user", "none"}
    for check in report["checks"]:
        assert check.keys() == {"group", "name", "outcome", "needed", "found", "advice"}
        assert check["outcome"] in {"ok", "limited", "missing"}
        assert bool(check["advice"]) is (check["outcome"] != "ok")
    assert len({(check["group"], check["name"]) for check in report["checks"]}) == len(
        report["checks"]
    )


def test_the_directory_of_the_images_can_be_named(tmp_path):
    names = [check.name for check in general_checks(str(tmp_path))]
    assert f"reads that do not wait, in {tmp_path}" in names
    assert run_cli("doctor", str(tmp_path / "missing")).exit_code == 2
