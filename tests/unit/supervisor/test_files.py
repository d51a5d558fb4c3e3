"""Which files a command line names."""

import pytest

from vmbus.errors import ConfigError
from vmbus.server import DeviceSetup
from vmbus.supervisor.files import named_files


def test_files_of_specifications_within_specifications(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.img", "b.img", "vm1.img"):
        (tmp_path / name).touch()
    (tmp_path / "dir").mkdir()
    setups = [
        DeviceSetup("storvsp", ("ram:64M", "raw:[ro]a.img", "overlay:[scratch=b.img]raw:a.img")),
        DeviceSetup(
            "storvsp", ("raw:[create=1M]{guest}.img", f"raw:[create=1M]{tmp_path}/dir/new")
        ),
        DeviceSetup(
            "other", ("raw:[create=1M]fresh.img", "cd:", "nonsense", "raw:no/such/dir.img")
        ),
    ]
    assert named_files(setups, "vm1") == sorted(
        ["a.img", "b.img", "vm1.img", f"{tmp_path}/dir", "."]
    )


def test_a_name_that_is_no_name_names_no_file():
    with pytest.raises(ConfigError, match="cannot stand for"):
        named_files([DeviceSetup("storvsp", ("raw:{guest}.img",))], "../etc/passwd")
