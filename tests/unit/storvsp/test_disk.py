"""The errors of a disk, made of those of the kernel."""

import errno

import pytest

from storvsp.disk import DiskUnavailableError, MediumError, NoSpaceError, ReadOnlyError, disk_errors


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EROFS, ReadOnlyError),
        (errno.EPERM, ReadOnlyError),
        (errno.ENODEV, DiskUnavailableError),
        (errno.ENOENT, DiskUnavailableError),
        (errno.EIO, MediumError),
        (None, MediumError),
    ],
)
def test_an_os_error_becomes_the_disk_error_it_means(code, error):
    cause = OSError("strange") if code is None else OSError(code, "strange")
    with (
        pytest.raises(error, match="read failed: strange") as caught,
        disk_errors("read", offset=7),
    ):
        raise cause
    assert type(caught.value) is error
    assert caught.value.offset == 7
    assert caught.value.__cause__ is cause
