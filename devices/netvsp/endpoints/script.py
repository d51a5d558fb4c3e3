"""``script:FILE.py``: a network that is a function of yours.

``script:answers.py``. The file defines ``answer``, which is called with every frame that the guest
sends, and returns what the guest is to get for it: a frame, several, or nothing::

    def answer(frame: bytes) -> bytes | Iterable[bytes] | None: ...

It may define ``start``, too, which is called with the address of the adapter when the guest comes
up, and returns what comes first::

    def start(mac: bytes) -> bytes | Iterable[bytes] | None: ...

Frames are whole Ethernet frames, without frame check sequence: those of the guest have all their
sums and are no longer than its MTU, and what is returned is to have its sums, too. ``answer`` is
called in a thread, for one frame after the other, and may take its time; frames wait meanwhile, and
then the guest does. If it raises, the frame is lost, and the log says why. One that does not return
holds up no more than its adapter's traffic: when the guest ends, it is waited for two seconds, and
given up then; the link is down from there on.

Each adapter has the file for itself: what it keeps in its variables is that adapter's own, and
stays from one life to the next. The directory of the file is not on the path for imports.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import trio

from netvsp.endpoint import Endpoint, EndpointError, Port
from netvsp.endpoints.files import open_to_read
from netvsp.endpoints.tasks import CLOSED
from netvsp.frames.frame import ETHERNET_HEADER, MAX_FRAME, Frame
from netvsp.spec import EndpointSpec
from vmbus.log_budget import LogBudget
from vmbus.workers import AbandonedError, abandon, shared_pool, work_for

MAX_FRAMES = 1024
"""Frames that wait for the function; there is room for no more until some are through."""
PATIENCE = 2.0
"""Seconds that a function may take to return when the guest, or the adapter, is gone."""
TURN = 64
"""Frames that it gets in one call of a thread."""
MAX_ANSWERS = 4096
"""Frames that one call may return; a generator without an end is a mistake."""
MAX_ANSWER_SIZE = 1 << 20
"""Bytes of them."""
_LONGEST_TEXT = 200
"""Characters of an error that are logged."""

Answer = bytes | Iterable[bytes] | None
Said = tuple[list[bytes], str]
"""What came of a call: frames, and what went wrong."""

_STUCK = "a function of its file has not returned"

_log = logging.getLogger("vmbus.netvsp")
_numbers = itertools.count()


class ScriptEndpoint(Endpoint):
    """A function as a network.

    Args:
        answer: Called in a thread with each frame; returns frames for the guest.
        start: The same with the adapter's address, when a guest comes up.
        name: What people call it.
        closed: Called when it is closed, and none of its functions is under way any more.
        patience: Seconds that a function may take to return when nobody wants its frames any more.
            It is given up then, and the endpoint is at its end.
    """

    def __init__(
        self,
        answer: Callable[[bytes], Answer],
        *,
        start: Callable[[bytes], Answer] | None = None,
        name: str = "script",
        closed: Callable[[], None] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self._answer = answer
        self._start = start
        self._name = name
        self._when_closed = closed
        self._patience = patience
        self._stuck = False
        """Whether a call was given up; its thread may come back or not."""
        self._frames: deque[bytes] = deque()
        self._arrived = trio.Event()
        self._room = trio.Event()
        self._closed = False
        self._pool = shared_pool()
        self._budget = LogBudget()
        self._answered = self._failed = 0

    def transmit(self, queue: int, frames: Sequence[Frame]) -> int:
        """See :meth:`netvsp.endpoint.Endpoint.transmit`."""
        del queue
        if self._closed:
            return len(frames)
        taken = min(len(frames), MAX_FRAMES - len(self._frames))
        self._frames += [frame.tobytes() for frame in frames[:taken]]
        if taken < len(frames) and self._room.is_set():
            self._room = trio.Event()
        self._arrived.set()
        return taken

    async def wait_writable(self, queue: int) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.wait_writable`."""
        del queue
        if self._closed or len(self._frames) < MAX_FRAMES:
            await trio.lowlevel.checkpoint()
        else:
            await self._room.wait()

    async def run(self, port: Port) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.run`."""
        self._forget()
        if self._start is not None:
            await self._call(port, self._start, [port.mac])
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            while self._frames:
                count = min(len(self._frames), TURN)
                some = [self._frames.popleft() for _ in range(count)]
                self._room.set()
                await self._call(port, self._answer, some)

    async def _call(
        self, port: Port, function: Callable[[bytes], Answer], items: Sequence[bytes]
    ) -> None:
        """Call a function with each item, and hand over what it returns."""
        said = await self._ask(function, items)
        for answers, problem in said:
            self._answered += len(answers)
            if problem:
                self._failed += 1
                if self._budget.spend():
                    left_out = self._budget.left_out()
                    _log.warning("%s: %s; the frame is lost%s", self._name, problem, left_out)
        frames = [Frame(each) for answers, _problem in said for each in answers]
        while frames:
            some = frames[:TURN]
            taken = port.receive(some)
            del frames[:taken]
            if taken < len(some):
                await port.wait_room()
            await trio.lowlevel.checkpoint()

    async def _ask(self, function: Callable[[bytes], Answer], items: Sequence[bytes]) -> list[Said]:
        """Call a function in a thread; if it does not return, a life's end does not wait for it."""
        if self._closed:
            raise EndpointError(CLOSED)
        if self._stuck:
            raise EndpointError(_STUCK)
        back = trio.Event()
        said: list[Said] = []
        reason = ""

        async def call() -> None:
            nonlocal said, reason
            work_for(self)
            try:
                said = await self._pool.run(_call_all, function, items)
            except AbandonedError:
                reason = _STUCK
            except trio.ClosedResourceError:
                reason = CLOSED
            finally:
                back.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            try:
                await back.wait()
            except trio.Cancelled:
                await self._lose_patience(back)
                raise
        if reason:
            raise EndpointError(reason)
        return said

    async def _lose_patience(self, back: trio.Event) -> None:
        """Give a call up that does not come back in time."""
        with trio.CancelScope(shield=True), trio.move_on_after(self._patience):
            await back.wait()
            return
        self._stuck = True
        abandon(self)

    def _forget(self) -> None:
        self._frames.clear()
        self._arrived = trio.Event()
        self._room.set()

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`netvsp.endpoint.Endpoint.snapshot`."""
        return {
            "script": self._name,
            "waiting": len(self._frames),
            "answered": self._answered,
            "failed": self._failed,
        }

    async def aclose(self) -> None:
        """See :meth:`netvsp.endpoint.Endpoint.aclose`."""
        if not self._closed:
            self._closed = True
            self._forget()
            done = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lose_patience, done)
                await self._pool.aclose()
                done.set()
            if self._when_closed is not None:
                self._pool.when_back(self._when_closed)
        await trio.lowlevel.checkpoint()


def _call_all(function: Callable[[bytes], Answer], items: Sequence[bytes]) -> list[Said]:
    return [_call_one(function, item) for item in items]


def _call_one(function: Callable[[bytes], Answer], item: bytes) -> Said:
    found: list[bytes] = []
    left = MAX_ANSWER_SIZE
    try:
        answer = function(item)
        if answer is None:
            return [], ""
        if isinstance(answer, bytes | bytearray | memoryview):
            answer = [bytes(answer)]
        for each in itertools.islice(answer, MAX_ANSWERS):
            found.append(bytes(memoryview(each)))
            size = len(found[-1])
            if not ETHERNET_HEADER <= size <= MAX_FRAME:
                text = f"it returned a frame of {size} bytes; {ETHERNET_HEADER} to {MAX_FRAME}"
                return [], f"{text} are possible"
            left -= size
            if left < 0:
                return [], f"it returned more than {MAX_ANSWER_SIZE} bytes for a frame"
    except BaseException as error:  # whatever it raises is its own, in a thread that is ours
        return [], _where(error)
    return found, ""


def _where(error: BaseException) -> str:
    """Return an error of somebody's file in one short line, with its last place."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    try:
        text = " ".join(str(error)[: 5 * _LONGEST_TEXT].split())[:_LONGEST_TEXT]
    except Exception:  # its text is the file's own, too
        text = "?"
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}, line {last.lineno})"


def load_script(path: str) -> ModuleType:
    """Import a file under a name of its own. Blocks; raises whatever the file does, and OSError."""
    with open_to_read(path):
        pass  # it can be read, and reading it does not wait for anybody
    name = f"netvsp_script_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no file of Python: its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


async def open_spec(spec: EndpointSpec) -> ScriptEndpoint:
    """Open ``script:FILE``."""
    spec.reader().finish()
    if not spec.target:
        raise spec.error("needs a file of Python, as in script:answers.py")
    await trio.lowlevel.checkpoint()
    try:
        module = load_script(spec.target)
    except OSError as error:
        raise spec.error(error.strerror or str(error)) from error
    except (Exception, SystemExit) as error:
        raise spec.error(_where(error)) from error
    name = module.__name__

    def forget() -> None:
        sys.modules.pop(name, None)

    functions = [getattr(module, name, None) for name in ("answer", "start")]
    if not callable(functions[0]) or not (functions[1] is None or callable(functions[1])):
        forget()
        raise spec.error("it has no function answer(frame), or a start that is none")
    return ScriptEndpoint(functions[0], start=functions[1], name=spec.target, closed=forget)
