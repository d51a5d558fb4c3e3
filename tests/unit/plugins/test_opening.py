"""Opening what a specification names: the same for every kind of back-end."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable

import pytest
import trio

from vmbus.errors import ConfigError
from vmbus.plugins.opening import MAX_NESTING, open_backend
from vmbus.plugins.registry import Registry
from vmbus.plugins.specs import Spec

TOASTERS = Registry("tests.toasters", "toaster", "scheme")


class Toaster:
    """What the device expects."""


async def open_good(spec: Spec) -> Toaster:
    await trio.lowlevel.checkpoint()
    return Toaster()


async def open_wrong(spec: Spec) -> str:
    await trio.lowlevel.checkpoint()
    return "toast"


async def open_missing(spec: Spec) -> Toaster:
    raise FileNotFoundError(2, "No such file or directory")


async def open_nameless(spec: Spec) -> Toaster:
    raise OSError("nobody knows why")


async def open_vast(spec: Spec) -> Toaster:
    raise OverflowError("more than any file has")


def open_synchronously(spec: Spec) -> Toaster:
    return Toaster()


async def open_within(spec: Spec) -> Toaster:
    """Open as many within each other as the target says."""
    depth = int(spec.target)
    return await open_toaster(f"mine:{depth - 1}") if depth > 1 else Toaster()


NO_OPENER = 3


async def open_toaster(text: str) -> Toaster:
    found = await open_backend(TOASTERS, Spec.parse(text), Toaster)
    assert isinstance(found, Toaster)
    return found


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def register(name: str) -> None:
        # pytest imports this module under a name of its own choosing: make it findable again.
        monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
        point = importlib.metadata.EntryPoint("mine", f"mine:{name}", TOASTERS.group)
        found = importlib.metadata.EntryPoints([point])
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)

    return register


async def test_what_is_named_is_opened(plug_in):
    plug_in("open_good")
    assert isinstance(await open_toaster("mine:x"), Toaster)
    with pytest.raises(ConfigError, match=r"unknown toaster scheme 'yours'"):
        await open_toaster("yours:x")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "NO_OPENER",
            "toaster plug-in 'mine' is broken: it has to be an async function of one Spec",
        ),
        ("open_synchronously", "is broken: it has to be an async function of one Spec"),
        ("open_wrong", "toaster plug-in 'mine' is broken: it returned str, no Toaster"),
        ("open_missing", "mine:x: No such file or directory"),
        ("open_nameless", "mine:x: nobody knows why"),
        ("open_vast", "mine:x: more than any file has"),
    ],
)
async def test_what_goes_wrong_is_one_error_that_names_it(plug_in, name, text):
    plug_in(name)
    with pytest.raises(ConfigError) as caught:
        await open_toaster("mine:x")
    assert text in str(caught.value)


async def test_back_ends_may_be_within_each_other_but_not_without_end(plug_in):
    plug_in("open_within")
    for _ in range(2):  # a refusal leaves nothing behind
        assert isinstance(await open_toaster(f"mine:{MAX_NESTING}"), Toaster)
        with pytest.raises(
            ConfigError, match=f"more than {MAX_NESTING} toasters within each other"
        ):
            await open_toaster(f"mine:{MAX_NESTING + 1}")


async def test_others_that_are_opened_at_the_same_time_count_for_themselves(plug_in):
    plug_in("open_within")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(open_toaster, f"mine:{MAX_NESTING}")
