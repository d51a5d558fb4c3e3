"""Sizes and permissions on the command line."""

import click
import pytest

from vmbus.cli.params import parse_permissions, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("64k", 65536), ("3M", 3 << 20), ("1G", 1 << 30)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "1.5M", "-1", "1KB", "²"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(click.BadParameter, match="is not a size; write bytes"):
        parse_size(text)


def test_permissions_are_octal():
    assert parse_permissions("660") == 0o660
    for text in ("6", "999", "0o660", "rw-", ""):
        with pytest.raises(click.BadParameter, match="as in 660"):
            parse_permissions(text)
