"""An archive of packages as apt would read it."""

from __future__ import annotations

import hashlib
import urllib.request

from tests.guest.rig.archive import Package, make_archive, serve_archive
from tests.guest.rig.packages import run
from tests.support.patience import PATIENCE

TELL = Package("tell", {"usr/bin/tell": b"#!/bin/sh\n"}, depends=("words", "more"))
WORDS = Package("words", {"usr/share/words": b"words"})


def test_an_archive_says_where_each_package_is_and_what_it_needs(tmp_path):
    make_archive(tmp_path, TELL, WORDS)

    first, second = (tmp_path / "Packages").read_text().split("\n\n")

    data = (tmp_path / "tell_1.0_all.deb").read_bytes()
    assert "Package: tell\n" in first
    assert "Depends: words, more\n" in first
    assert f"Size: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}" in first
    assert "Package: words\n" in second
    assert "Depends" not in second


def test_programs_can_be_run_and_other_files_cannot(tmp_path):
    make_archive(tmp_path, TELL, WORDS)

    assert "-rwxr-xr-x root/root" in run("dpkg-deb", "-c", tmp_path / "tell_1.0_all.deb")
    assert "-rw-r--r-- root/root" in run("dpkg-deb", "-c", tmp_path / "words_1.0_all.deb")


def test_an_archive_is_served(tmp_path):
    make_archive(tmp_path, WORDS)

    with serve_archive(tmp_path, "127.0.0.1", 0) as port:
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/Packages", timeout=PATIENCE)
        assert answer.read() == (tmp_path / "Packages").read_bytes()
