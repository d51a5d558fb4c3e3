"""Sizes, numbers and permissions on the command line."""

import click
import pytest

from storvsp import ScsiController
from vmbus.cli.params import (
    MAX_TRANSFER,
    MIN_TRANSFER,
    Number,
    parse_permissions,
    parse_size,
    parse_transfer,
)
from vmbus.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("64k", 65536), ("3M", 3 << 20), ("1G", 1 << 30)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "1.5M", "-1", "1KB", "²"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(click.BadParameter, match="is not a size; write bytes"):
        parse_size(text)


def takes(size):
    try:
        ScsiController(max_transfer_bytes=size)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("size", [MIN_TRANSFER, 1 << 20, MAX_TRANSFER])
def test_transfers_are_those_that_a_controller_takes(size):
    for each in (size, size - 4096, size + 4096, size + 512):
        if takes(each):
            assert parse_transfer(str(each)) == each
        else:
            with pytest.raises(click.BadParameter, match="not a multiple of 4K from 64K to 128M"):
                parse_transfer(str(each))


@pytest.mark.parametrize(
    ("number", "text", "words"),
    [
        (Number(1, 16), "0", "'0' is not a whole number from 1 to 16"),
        (Number(1, 16), "17", "'17' is not a whole number from 1 to 16"),
        (Number(1, 16), "x", "'x' is not a whole number from 1 to 16"),
        (Number(0), "-1", "'-1' is not a whole number from 0 on"),
        (Number(0), "1_0", "'1_0' is not a whole number from 0 on"),
        (Number(0), "9" * 5000, "9' is not a whole number from 0 on"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_number_within_bounds_is_told_them(number, text, words):
    with pytest.raises(click.BadParameter) as caught:
        number.convert(text, None, None)
    assert caught.value.message.endswith(words)


def test_numbers_within_bounds_are_read():
    assert [Number(1, 16).convert(text, None, None) for text in ("1", "16")] == [1, 16]
    assert Number(0).convert(7, None, None) == 7


def test_permissions_are_octal():
    assert parse_permissions("660") == 0o660
    for text in ("6", "999", "0o660", "rw-", ""):
        with pytest.raises(click.BadParameter, match="as in 660"):
            parse_permissions(text)
