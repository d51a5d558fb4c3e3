"""Where the server's sockets come from."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from vmbus.attach.server import from_systemd, listen, listen_path, open_listener
from vmbus.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


@pytest.mark.parametrize(
    ("mode", "kind"), [("seqpacket", socket.SOCK_SEQPACKET), ("stream", socket.SOCK_STREAM)]
)
def test_a_listener_is_its_owners_alone_and_leaves_nothing(
    tmp_path: Path, mode: str, kind: int
) -> None:
    with open_listener(tmp_path / "s", mode=mode) as sock:
        assert sock.type == kind
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    assert not (tmp_path / "s").exists()


def test_permissions_can_be_wider(tmp_path: Path) -> None:
    with open_listener(tmp_path / "s", permissions=0o660):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660


@pytest.mark.parametrize("old", ["seqpacket", "stream"])
def test_a_stale_socket_file_is_replaced(tmp_path: Path, old: str) -> None:
    listen_path(tmp_path / "s", mode=old).close()
    assert (tmp_path / "s").exists()
    with open_listener(tmp_path / "s"):
        pass


@pytest.mark.parametrize("mode", ["seqpacket", "stream"])
def test_a_live_server_is_not_replaced(tmp_path: Path, mode: str) -> None:
    with open_listener(tmp_path / "s"):
        with pytest.raises(ConfigError, match="another server"):
            listen_path(tmp_path / "s", mode=mode)
        assert (tmp_path / "s").exists()


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        listen_path(tmp_path / "s")


def test_a_successors_socket_file_is_left_alone(tmp_path: Path) -> None:
    with open_listener(tmp_path / "s"):
        (tmp_path / "s").unlink()
        other = listen_path(tmp_path / "s")
    assert (tmp_path / "s").exists()
    other.close()
    with open_listener(tmp_path / "t"):
        (tmp_path / "t").unlink()
    assert not (tmp_path / "t").exists()


def test_paths_and_modes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="107"):
        listen_path(tmp_path / ("x" * 120))
    with pytest.raises(ConfigError, match="datagram"):
        listen_path(tmp_path / "s", mode="datagram")
    with pytest.raises(FileNotFoundError):
        listen_path(tmp_path / "no" / "s")


def activation(**changes: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "OTHER": "x", **changes}


def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two sockets with neighbouring numbers, as if systemd had passed them."""
    numbers: list[int] = []
    while len(numbers) < 2 or numbers[-1] != numbers[-2] + 1:
        numbers.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach())
    monkeypatch.setattr(listen, "_LISTEN_FDS_START", numbers[-2])
    for number in numbers[:-2]:
        os.close(number)
    return numbers[-2:]


def test_systemd_passes_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = passed(monkeypatch)
    environ = activation(LISTEN_FDNAMES="guest:operator")
    sockets = from_systemd(environ=environ)
    assert [sock.fileno() for sock in sockets] == numbers
    assert environ == {"OTHER": "x"}
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize(
    ("name", "names", "index"),
    [("guest", "guest:operator", 0), ("operator", "guest:operator", 1), ("unknown", "guest", 1)],
)
def test_systemd_sockets_have_names(
    monkeypatch: pytest.MonkeyPatch, name: str, names: str, index: int
) -> None:
    numbers = passed(monkeypatch)
    (sock,) = from_systemd(name, environ=activation(LISTEN_FDNAMES=names))
    with sock:
        assert sock.fileno() == numbers[index]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(numbers[1 - index])  # nobody else would close it


def test_sockets_for_another_process_are_not_ours() -> None:
    assert from_systemd(environ=activation(LISTEN_PID="1")) == []
    assert from_systemd(environ={}) == []
    assert from_systemd(environ={"LISTEN_FDNAMES": "x"}) == []


@pytest.mark.parametrize("change", [{"LISTEN_PID": "x"}, {"LISTEN_FDS": "-1"}])
def test_nonsense_from_the_service_manager_is_said_so(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="socket activation"):
        from_systemd(environ=activation(**change))


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert from_systemd() == []
    assert "LISTEN_FDS" not in os.environ
