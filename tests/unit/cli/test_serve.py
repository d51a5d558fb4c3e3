"""``vmbus serve``: the command line, and how guests fared."""

import os

import click
import pytest

from tests.support.cli import run_cli
from vmbus.cli.serve import device_setups, parse_device
from vmbus.server import DeviceSetup

# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--disk", "disk.img"], "for an image file write raw:disk.img"),
        (["--disk", "rom:64M"], "did you mean 'ram'?"),
        (["--disk", "raw:missing.img"], "missing.img"),
        (["--disk", "ram:[lun=1]1M", "--disk", "ram:[lun=1]1M"], "0:0:1 is taken"),
        (["--disk", "ram:[lun=x]1M"], "needs a number"),
        (["--max-transfer", "5"], "multiple of 4K from 64K to 128M"),
        (["--max-transfer", "lots"], "'lots' is not a size"),
        (["--max-version", "7.0"], "is not one of '0.13', '1.1', '2.4'"),
        (["--max-vps", "0"], "'0' is not a whole number from 1 to 2048"),
        (["--subchannels", "x"], "'x' is not a whole number from 0 to 63"),
        (["--fd", "-1"], "'-1' is not a whole number from 0 on"),
        (["--max-transfer", "1K"], "'--max-transfer': '1K' is not a multiple of 4K from 64K"),
        (["--max-transfer", "70000"], "is not a multiple of 4K from 64K to 128M"),
        (["--permissions", "rw"], "as in 660"),
        (["--fd", "3"], "--socket and --fd are two places"),
        (["--device", "storvsc"], "did you mean 'storvsp'? known: netvsp and storvsp"),
        (
            ["--device", "storvsp speed=fast"],
            "unknown option 'speed'; known: max_subchannels, max",
        ),
        (["--device", "storvsp max_subchannels=many"], "'many' is not a whole number"),
        (["--device", "storvsp monitor=perhaps"], "'monitor' is 'perhaps'; it can be on or off"),
        (["--device", "storvsp max_transfer_bytes=1X"], "'1X' is not a size; write bytes, or"),
        (["--device", "storvsp 'ram:1M"], "no closing quotation"),
        (["--device", "storvsp monitor"], "'monitor' is neither OPTION=VALUE nor scheme:target"),
        (["--device", "ram:1M"], "does not begin with a device's name"),
        (["--device", ""], "does not begin with a device's name"),
        (["--device", "storvsp", "--monitor"], "write --device 'storvsp monitor=on ...'"),
    ],
)
def test_mistakes_are_found_before_there_is_a_socket(path, arguments, text):
    result = run_cli("serve", "--socket", path, *arguments)
    assert result.exit_code == 2, result.output
    assert text in result.output
    assert "Traceback" not in result.output
    assert not os.path.lexists(path)


def test_without_a_place_to_listen_the_ways_to_get_one_are_shown():
    result = run_cli("serve")
    assert result.exit_code == 2
    assert "give --socket PATH or --fd N, or pass a socket from systemd" in result.output
    assert "add --socket PATH" in run_cli("serve", "--stream").output


def test_a_socket_that_cannot_be_made_is_a_failure():
    result = run_cli("serve", "--socket", "/nonexistent/socket")
    assert result.exit_code == 1
    assert "cannot listen on /nonexistent/socket: No such file or directory" in result.output


def test_a_file_in_the_sockets_place_is_left_alone(tmp_path):
    file = tmp_path / "precious"
    file.write_text("data")
    result = run_cli("serve", "--socket", str(file))
    assert result.exit_code == 2
    assert "exists and is not a socket" in result.output
    assert file.read_text() == "data"


def test_the_first_device_is_the_controller_of_the_disks():
    assert device_setups(("ram:1M",), (), (), {}) == (DeviceSetup("storvsp", ("ram:1M",)),)
    assert device_setups((), (), (), {}) == (DeviceSetup("storvsp"),)
    assert device_setups((), (), ("nic",), {}) == (DeviceSetup("nic"),)
    assert device_setups(("ram:1M",), ("null:",), ("nic",), {"monitor": True}) == (
        DeviceSetup("storvsp", ("ram:1M",), {"monitor": True}),
        DeviceSetup("nic"),
        DeviceSetup("netvsp", ("null:",)),
    )


def test_a_device_is_a_name_options_and_specifications():
    assert parse_device("storvsp monitor=on x=OFF n=3 size=2M w=word 'raw:[ro]a b' ram:1M") == (
        DeviceSetup(
            "storvsp",
            ("raw:[ro]a b", "ram:1M"),
            {"monitor": "on", "x": "OFF", "n": "3", "size": "2M", "w": "word"},
        )
    )


def test_an_option_after_a_specification_is_a_specification():
    assert parse_device("nic tap:0 a=b").specs == ("tap:0", "a=b")


def test_a_device_may_not_look_like_a_path():
    with pytest.raises(click.UsageError, match="does not begin with a device's name"):
        parse_device("a/b")
