"""A network that is somebody's function."""

import os
import sys
import textwrap
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from netvsp.endpoint import EndpointError
from netvsp.endpoints.script import MAX_FRAMES
from netvsp.endpoints.specs import open_endpoint
from netvsp.frames.frame import Frame
from netvsp.testing import ListeningPort
from netvsp.testing.port import MAC
from tests.support.patience import until, waits
from vmbus.errors import ConfigError


@pytest.fixture
def script(tmp_path):
    """Write a script; returns what opens it."""

    def write(text):
        path = tmp_path / "answers.py"
        path.write_text(textwrap.dedent(text))
        return f"script:{path}"

    return write


@asynccontextmanager
async def running(spec, port=None):
    endpoint, port = await open_endpoint(spec), port or ListeningPort()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.run, port)
        await trio.testing.wait_all_tasks_blocked()
        yield endpoint, port
        nursery.cancel_scope.cancel()
    await endpoint.aclose()


def frames(count, length=60):
    return [Frame(bytes([number % 256]) * length) for number in range(count)]


async def arrived(port, count):
    await until(lambda: len(port.frames) >= count)
    return [frame.head for frame in port.frames]


async def test_it_returns_a_frame_several_or_nothing(script):
    spec = script(
        """
        def answer(frame):
            if frame[0] == 0:
                return None
            if frame[0] == 1:
                return b"one" + frame[3:]
            return (bytearray(frame) for _ in range(frame[0]))
        """
    )
    async with running(spec) as (endpoint, port):
        assert endpoint.transmit(0, frames(4)) == 4
        found = await arrived(port, 6)
        assert found == [b"one" + bytes([1]) * 57, *[bytes([2]) * 60] * 2, *[bytes([3]) * 60] * 3]
        assert endpoint.snapshot()["answered"] == 6


async def test_it_is_asked_for_the_first_frame_of_each_life(script):
    spec = script(
        """
        lives = 0
        def start(mac):
            global lives
            lives += 1
            return mac + bytes([lives]) * 54
        def answer(frame):
            raise RuntimeError
        """
    )
    endpoint = await open_endpoint(spec)
    for life in (1, 2):
        port = ListeningPort()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.run, port)
            assert await arrived(port, 1) == [MAC + bytes([life]) * 54]
            nursery.cancel_scope.cancel()
    await endpoint.aclose()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "def answer(frame):\n    1 / 0",
            "division by zero (answers.py, line 2)",
        ),
        ("def answer(frame):\n    raise SystemExit(3)", "SystemExit: 3 (answers.py, line 2)"),
        ("def answer(frame):\n    return b'short'", "it returned a frame of 5 bytes"),
        ("def answer(frame):\n    return bytes(70000)", "it returned a frame of 70000 bytes"),
        ("def answer(frame):\n    return 'text'", "TypeError"),
        ("def answer(frame):\n    return 7", "TypeError"),
    ],
)
async def test_a_mistake_loses_the_frame_and_is_logged(script, text, problem, caplog):
    async with running(script(text)) as (endpoint, port):
        endpoint.transmit(0, frames(1))
        await until(lambda: endpoint.snapshot()["failed"])
        assert not port.frames
    (record,) = caplog.records
    assert problem in record.getMessage()
    assert record.getMessage().endswith("the frame is lost")


async def test_the_log_has_a_budget(script, caplog):
    async with running(script("def answer(frame):\n    return frame[99]")) as (endpoint, _port):
        assert endpoint.transmit(0, frames(500)) == 500
        await until(lambda: endpoint.snapshot()["failed"] == 500)
    assert len(caplog.records) < 100


async def test_a_function_without_an_end_is_cut_short(script):
    spec = script(
        """
        import itertools
        def answer(frame):
            return itertools.repeat(frame)
        """
    )
    async with running(spec) as (endpoint, port):
        endpoint.transmit(0, frames(1))
        await until(lambda: len(port.frames) == 4096)


async def test_frames_wait_for_a_slow_function_and_then_the_guest_does(script):
    async with running(script("def answer(frame):\n    return frame"), ListeningPort(room=0)) as (
        endpoint,
        port,
    ):
        await until(lambda: endpoint.transmit(0, frames(MAX_FRAMES)) < MAX_FRAMES)
        assert endpoint.transmit(0, frames(MAX_FRAMES)) < MAX_FRAMES
        assert await waits(lambda: endpoint.wait_writable(0))
        port.make_room()
        await endpoint.wait_writable(0)
        assert endpoint.transmit(0, frames(1)) == 1


async def test_each_adapter_has_its_own_variables_and_leaves_nothing(script):
    spec = script(
        """
        import dataclasses
        count = 0
        @dataclasses.dataclass
        class Something:
            text: "str"
        def answer(frame):
            global count
            count += 1
            return bytes([count]) * 60
        """
    )
    before = set(sys.modules)
    async with running(spec) as (one, port_one), running(spec) as (other, port_other):
        one.transmit(0, frames(3))
        other.transmit(0, frames(1))
        assert (await arrived(port_one, 3))[-1] == bytes([3]) * 60
        assert await arrived(port_other, 1) == [bytes([1]) * 60]
    assert not {name for name in set(sys.modules) - before if name.startswith("netvsp_script")}


async def test_closing_ends_what_is_under_way(script):
    endpoint = await open_endpoint(script("def answer(frame):\n    return frame"))
    await endpoint.aclose()
    with pytest.raises(EndpointError, match="it is closed"):
        await endpoint._call(ListeningPort(), len, [b""])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1", "it has no function answer"),
        ("answer = 1", "it has no function answer"),
        ("def answer(frame): ...\nstart = 1", "a start that is none"),
        ("def answer(frame:", "SyntaxError"),
        ("\nimport no_such_module", r"ModuleNotFoundError: .* \(answers.py, line 2\)"),
    ],
)
async def test_a_file_that_will_not_do_is_said_with_a_reason(script, text, problem):
    with pytest.raises(ConfigError, match=problem):
        await open_endpoint(script(text))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("raise KeyboardInterrupt", "KeyboardInterrupt: (answers.py, line 12)"),
        ("raise GeneratorExit", "GeneratorExit: (answers.py, line 12)"),
        ("raise Silent", "Silent: ? (answers.py, line 12)"),
        ("raise ValueError('a\\nINFO b ' * 100000)", "ValueError: " + ("a INFO b " * 23)[:200]),
        ("return 7", "TypeError: 'int' object is not iterable"),
        ("return [frame, 7]", "TypeError: memoryview"),
        ("return [Short(frame)]", "it returned a frame of 3 bytes"),
        ("return endless()", "it returned more than 1048576 bytes for a frame"),
    ],
)
async def test_whatever_a_function_does_is_one_short_line(script, caplog, text, problem):
    spec = script(
        """
        class Silent(BaseException):
            def __str__(self):
                raise RuntimeError
        class Short(bytes):
            def __new__(cls, frame):
                return super().__new__(cls, frame[:3])
        def endless():
            while True:
                yield bytes(60000)
        def answer(frame):
            if not frame[0]: """
        + text
        + "\n            return frame\n"
    )
    async with running(spec) as (endpoint, port):
        assert endpoint.transmit(0, frames(2)) == 2
        assert await arrived(port, 1) == [bytes([1]) * 60]
        assert endpoint.snapshot()["failed"] == 1
    (line,) = [each.getMessage() for each in caplog.records]
    assert problem in " ".join(line.split())
    assert "\n" not in line
    assert len(line) < 600


async def test_a_pipe_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "answers.py")
    with pytest.raises(ConfigError, match="it is no file"):
        await open_endpoint(f"script:{tmp_path}/answers.py")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("script:", "needs a file of Python"),
        ("script:/no/such/file.py", "No such file"),
        ("script:/dev/null", "it is no file"),
        ("script:[x]a.py", "unknown option 'x'"),
    ],
)
async def test_what_cannot_be_had_is_said(spec, text):
    with pytest.raises(ConfigError, match=text):
        await open_endpoint(spec)
