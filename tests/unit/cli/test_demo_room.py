"""Disks that a machine cannot hold are refused before anything is made."""

import pytest

from tests.support.cli import run_cli
from vmbus.cli.demo_room import available_memory, check_room
from vmbus.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("MemTotal: 9 kB\nMemAvailable:  100 kB\nSwapFree: 28 kB\nHugePages_Total: 5\n", 128 << 10),
        ("MemTotal: 9 kB\n", None),
        ("MemAvailable: x kB\nSwapFree: 1 kB\n", None),
    ],
)
def test_memory_is_what_the_kernel_says(tmp_path, text, size):
    (tmp_path / "meminfo").write_text(text)
    assert available_memory(tmp_path / "meminfo") == size
    assert available_memory(tmp_path / "nothing") is None


@pytest.mark.parametrize("memory", [1 << 30, None])
def test_what_fits_is_taken(memory):
    check_room(1 << 30, memory=memory, disk=1 << 30, directory="/tmp")


@pytest.mark.parametrize(
    ("memory", "disk", "text"),
    [
        (1 << 20, 1 << 40, "--size 1 GiB: .* in memory, of which 1 MiB are available"),
        (None, 1 << 20, "--size 1 GiB: .* an image in /tmp, where 1 MiB are free; TMPDIR"),
    ],
)
def test_what_does_not_fit_is_refused(memory, disk, text):
    with pytest.raises(ConfigError, match=text):
        check_room(1 << 30, memory=memory, disk=disk, directory="/tmp")


def test_the_demo_asks_first(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = run_cli("demo", "--size", "4096T")
    assert result.exit_code == 2
    assert "--size 4096 TiB: one of the disks is" in result.output
    assert list(tmp_path.iterdir()) == []
