"""What shells complete."""

import shlex
import subprocess

import pytest

from tests.support.cli import COMMAND, child_environment, run_child
from tests.support.patience import PATIENCE

BREAKS = " \t\n\"'@><=;|&(:"
"""bash's own."""


def complete(*words: str, shell: str = "bash") -> list[str]:
    """Return what is offered for the last word."""
    line = "vmbus " + " ".join(words)
    if shell == "fish":
        extra = {"COMP_WORDS": line.removesuffix(words[-1]), "COMP_CWORD": words[-1]}
    elif shell == "bash":
        extra = {"COMP_LINE": line, "COMP_BREAKS": BREAKS}
    else:
        extra = {"COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    result = run_child(_VMBUS_COMPLETE=f"{shell}_complete", **extra)
    assert (result.returncode, result.stderr) == (0, "")
    return [line for line in result.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("d",), ["demo", "disk", "devices", "doctor"]),
        (("disk", "re"), ["remove", "resize"]),
        (("top", "--in"), ["--interval"]),
        (("serve", "--disk", "ra"), ["ram:", "ram:[", "raw:", "raw:["]),
        (("disk", "add", "--socket", "s", "ov"), ["overlay:", "overlay:["]),
        (("disk", "insert", "1", "cd"), ["cd:", "cd:["]),
        (("boot", "--disk", "x"), []),
        (("demo", "--disk", "fault:ov"), ["fault:overlay:", "fault:overlay:["]),
    ],
    ids=str,
)
def test_commands_options_and_schemes_are_completed(words, offered):
    assert complete(*words, shell="zsh")[1::3] == offered


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("--device", "nothing"), []),
        (("--device", "sto"), ["storvsp", "storvsp max_subchannels=", "storvsp monitor=off"]),
        (("--device", "'storvsp mon"), ["storvsp monitor=on", "storvsp monitor=off"]),
        (("--device", "'storvsp monitor=on ra"), ["storvsp monitor=on ram:",
                                                  "storvsp monitor=on raw:["]),
        (("--device", "'nothing ra"), []),
    ],
    ids=str,
)  # fmt: skip
def test_the_words_of_a_device_are_completed(words, offered):
    for command in ("serve", "boot"):
        found = complete(command, *words, shell="zsh")[1::3]
        assert set(offered) <= set(found)
        assert bool(offered) == bool(found)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("serve", "--socket", "a"), "file"),
        (("serve", "--control", "a"), "file"),
        (("serve", "--allow", "a"), "file"),
        (("boot", "--socket", "a"), "file"),
        (("boot", "--kernel", "a"), "file"),
        (("boot", "--initrd", "a"), "file"),
        (("top", "--socket", "a"), "file"),
        (("disk", "list", "--socket", "a"), "file"),
        (("doctor", "a"), "dir"),
    ],
    ids=str,
)
def test_the_shell_itself_completes_paths(words, kind):
    assert complete(*words) == [f"{kind},a"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("--disk", "raw:th"), ["more,things/", "plain,things/an\\ image"]),
        (("--disk=raw:th",), ["more,things/", "plain,things/an\\ image"]),
        (("--disk", "'raw:[ro]th"), ["more,raw:[ro]things/", "plain,raw:[ro]things/an image"]),
        (("--disk", "overlay:raw:things/a"), ["plain,things/an\\ image"]),
        (("--disk", "ra"), ["more,ram:", "more,ram:[", "more,raw:", "more,raw:["]),
    ],
    ids=str,
)
def test_bash_gets_what_is_behind_the_characters_that_it_cuts_words_at(
    monkeypatch, tmp_path, words, offered
):
    (tmp_path / "things").mkdir()
    (tmp_path / "things/an image").touch()
    monkeypatch.chdir(tmp_path)
    assert complete("serve", *words) == offered


def test_the_script_for_bash_completes(tmp_path):
    (tmp_path / "an image").touch()
    command = tmp_path / "vmbus"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    command.chmod(0o755)
    script = run_child(_VMBUS_COMPLETE="bash_source").stdout
    line = f"{command} serve --disk raw:an"
    program = (
        f"{script}\nCOMP_LINE='{line} behind' COMP_POINT={len(line)}\n"
        f"_vmbus_completion {command}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    result = subprocess.run(
        ["bash", "-c", program],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert (result.stdout, result.stderr) == ("an\\ image\n", "")


@pytest.mark.parametrize("before", ["raw:", "raw:[ro]", "overlay:raw:[ro]"])
def test_paths_are_completed_where_the_shell_takes_a_word_as_a_whole(tmp_path, before):
    for name in ("disk.img", "disks", ".hidden"):
        (tmp_path / name).mkdir() if name == "disks" else (tmp_path / name).touch()
    words = ("disk", "add", f"{before}{tmp_path}/")
    assert complete(*words, shell="fish") == [
        f"plain,{before}{tmp_path}/disk.img",
        f"plain,{before}{tmp_path}/disks/",
    ]
    assert complete("disk", "add", f"raw:{tmp_path}/nowhere/x", shell="fish") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(shell):
    result = run_child(_VMBUS_COMPLETE=f"{shell}_source")
    assert result.returncode == 0
    assert f"_VMBUS_COMPLETE={shell}_complete" in result.stdout
