"""``vmbus boot``, as a process."""

from __future__ import annotations

import os
import pty
import subprocess

import pytest

from tests.support.cli import COMMAND, child_environment, run_cli, serving
from tests.support.kvm import assemble, bzimage, needs_kvm
from tests.support.patience import PATIENCE

needs_guests = [needs_kvm]


def boot(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, "boot", *arguments],
        env=child_environment(),
        input=stdin,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture
def echo(tmp_path):
    path = tmp_path / "echo.bz"
    path.write_bytes(bzimage(assemble("echo")))
    return str(path)


@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="not on Linux")
def test_a_kernel_that_is_not_there_is_named(tmp_path):
    result = run_cli("boot", "--kernel", str(tmp_path / "vmlinuz"))

    assert result.exit_code == 2
    assert "vmlinuz: No such file or directory" in result.output


def test_disks_are_the_servers_if_there_is_one():
    result = run_cli("boot", "--kernel", "k", "--socket", "s", "--disk", "ram:1M")

    assert result.exit_code == 2
    assert "give them to vmbus serve" in " ".join(result.output.split())


def test_something_that_is_no_kernel_is_refused(tmp_path):
    (tmp_path / "text").write_text("no kernel")

    result = run_cli("boot", "--kernel", str(tmp_path / "text"))

    assert result.exit_code == 2


class TestWithAGuest:
    pytestmark = needs_guests

    def test_the_console_is_standard_input_and_output(self, echo):
        result = boot("--kernel", echo, "--memory", "4M", "--disk", "ram:1M", stdin=b"hello q")

        assert result.returncode == 0, result.stderr
        assert result.stdout == b"hello q"
        assert result.stderr == b""

    def test_verbose_tells_what_the_vmm_does_too(self, echo):
        result = boot("--kernel", echo, "--memory", "4M", "--disk", "ram:1M", "-v", stdin=b"q")

        assert result.returncode == 0, result.stderr
        assert b"the SynIC is the " in result.stderr
        assert b"attached with 1 device(s)" in result.stderr

    @pytest.mark.parametrize(("option", "code"), [("exit", 3), ("continue", 1)])
    def test_a_panic_is_reported_and_the_end_or_not(self, tmp_path, option, code):
        path = tmp_path / "crash.bz"
        path.write_bytes(bzimage(assemble("crash")))

        result = boot("--kernel", str(path), "--memory", "4M", f"--on-panic={option}")

        assert result.returncode == code, result.stderr
        assert b"the guest panicked" in result.stderr
        assert (b"debug exit with 0x9" in result.stderr) is (option == "continue")

    def test_a_server_that_does_not_start_is_reported(self, echo):
        result = boot("--kernel", echo, "--memory", "4M", "--disk", "nothing:1", stdin=b"q")

        assert result.returncode == 2
        assert b"nothing" in result.stderr
        assert b"the server did not come up" in result.stderr

    def test_it_attaches_to_a_server_that_is_there(self, echo, tmp_path):
        path = str(tmp_path / "s")
        with serving("--socket", path, "--disk", "ram:1M") as server:
            result = boot(
                "--kernel", echo, "--memory", "4M", "--socket", path, "--name", "vm7", stdin=b"q"
            )
            server.wait_line("vm7: gone")

        assert result.returncode == 0, result.stderr

    def test_the_escape_key_ends_the_guest_on_a_terminal(self, echo):
        ours, theirs = pty.openpty()
        try:
            process = subprocess.Popen(
                [*COMMAND, "boot", "--kernel", echo, "--memory", "4M"],
                env=child_environment(),
                stdin=theirs,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            with process:
                assert process.stderr is not None
                assert process.stdout is not None
                # It says so when the terminal is raw; from then on no key is lost to it.
                assert b"Ctrl-] ends it" in process.stderr.readline()
                os.write(ours, b"a\x03\n")
                # Ctrl-C has come through to the guest and back.
                assert process.stdout.read(3) == b"a\x03\n"
                os.write(ours, b"\x1d")
                assert process.wait(PATIENCE) == 130
        finally:
            os.close(ours)
            os.close(theirs)
