"""Descriptions of options, and modules that have none or something else by that name."""

from __future__ import annotations

from types import ModuleType

import pytest

from vmbus.plugins.options import Option, read_options


def module_with(**attributes: object) -> ModuleType:
    module = ModuleType("plugin")
    vars(module).update(attributes)
    return module


def test_an_option_is_shown_as_it_is_written():
    assert Option("ro", "refuse writes").usage == "ro"
    assert Option("sector", "logical sector", "512|4096", "512").usage == "sector=512|4096"


def test_the_options_of_a_module_are_found_in_their_order():
    options = (Option("b", "second"), Option("a", "first"))
    assert list(read_options(module_with(OPTIONS=options))) == list(options)


@pytest.mark.parametrize("value", [None, 7, "ro,share", {"ro": "refuse"}, ("ro", "share")])
def test_what_is_no_description_is_left_out(value):
    assert list(read_options(module_with(OPTIONS=value))) == []


def test_a_module_need_not_say_anything():
    assert list(read_options(module_with())) == []
    assert list(read_options(None)) == []
