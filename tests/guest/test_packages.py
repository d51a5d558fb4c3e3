"""A guest that lives on a disk of ours installs software over a network of ours, as people do."""

from __future__ import annotations

import contextlib
import hashlib
import random
from pathlib import Path

import pytest

from tests.guest.conftest import Lab
from tests.guest.rig.archive import Package, make_archive, serve_archive
from tests.guest.rig.internet import NAME, SERVER, open_internet
from tests.guest.rig.network_work import get_address, interface
from tests.support.patience import LONG_TEST

pytestmark = pytest.mark.timeout(LONG_TEST)

MAC = "00:15:5d:00:dd:01"
PORT = 8000
WORDS = random.Random(11).randbytes(1 << 20)
"""What the package has to bring that the other one needs."""
PACKAGES = (
    Package(
        "rig-tell",
        {"usr/bin/rig-tell": b"#!/bin/sh\nsha256sum </usr/share/rig/words\n"},
        depends=("rig-words",),
    ),
    Package("rig-words", {"usr/share/rig/words": WORDS}),
)


def test_a_guest_installs_a_package_with_its_own_package_manager(lab: Lab, tmp_path: Path):
    archive = tmp_path / "archive"
    make_archive(archive, *PACKAGES)
    with contextlib.ExitStack() as stack:
        internet = stack.enter_context(open_internet(tmp_path))
        with internet.there.inside():
            stack.enter_context(serve_archive(archive, SERVER, PORT))
        server = lab.serve(
            f"overlay:raw:[ro]{lab.assets.root}",
            options=[f"--net=nat:[with=passt,mac={MAC}]"],
            place=internet.place,
        )
        guest = lab.boot(server, root="tools", modules=("hv_storvsc", "sd_mod", "hv_netvsc"))
        get_address(guest, interface(guest, MAC))

        # Caches have been left out of the file system.
        guest.run(
            "mkdir -p /var/cache/apt/archives/partial &&"
            f" echo 'deb [trusted=yes] http://{NAME}:{PORT}/ ./' >/etc/apt/sources.list &&"
            " apt-get update && apt-get install -qy rig-tell"
        )

        assert guest.run("rig-tell").split()[0] == hashlib.sha256(WORDS).hexdigest()
        states = guest.run("dpkg-query -W -f '${Status}\\n' rig-tell rig-words").splitlines()
        assert states == ["install ok installed"] * 2
        guest.check_log()
        guest.power_off()
