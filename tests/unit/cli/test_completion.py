"""What shells complete."""

import pytest

from tests.support.cli import run_child


def complete(*words: str, shell: str = "bash") -> list[str]:
    """Return what is offered for the last word."""
    if shell == "fish":
        extra = {"COMP_WORDS": "vmbus " + " ".join(words[:-1]), "COMP_CWORD": words[-1]}
    else:
        extra = {"COMP_WORDS": "vmbus " + " ".join(words), "COMP_CWORD": str(len(words))}
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
    assert complete(*words) == [f"plain,{text}" for text in offered]


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
