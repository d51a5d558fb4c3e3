"""What a service manager is told."""

import socket

import pytest

from vmbus.cli.notify import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_told(tmp_path, abstract):
    name = f"@vmbus-test-{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1))
        assert notify("READY=1", {"NOTIFY_SOCKET": name})
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("path", [None, "", "relative", "/nonexistent/socket"])
def test_without_a_service_manager_nothing_happens(path):
    assert not notify("READY=1", {} if path is None else {"NOTIFY_SOCKET": path})
