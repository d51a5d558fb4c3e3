"""Guests come up, find their disk, and go."""

from __future__ import annotations


def test_a_guest_finds_its_disk(lab):
    server = lab.serve("ram:[lun=0]64M", lab.tools)
    guest = lab.boot(server)

    name = guest.disk(0)

    assert guest.run(f"cat /sys/block/{name}/size").strip() == str((64 << 20) // 512)
    guest.check_log()
    guest.power_off()
