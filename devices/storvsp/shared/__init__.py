"""A disk that several guests have, served where it is kept and used from anywhere.

There is one logical unit, in one process: one set of reservations, one gate for COMPARE AND WRITE,
one set of mode pages. A guest whose bus runs in another process has a :class:`SharedUnit` there,
which sends commands and gets outcomes over a line; data goes through a staging area that both sides
map, so the keeper never sees guest memory.

========== =========================================================================
`keeper`   :class:`Keeper`: the unit, and the lines of its guests
`unit`     :class:`SharedUnit`: what a controller has of it
`staging`  the memory between them
`messages` what goes over a line
========== =========================================================================
"""

from storvsp.shared.keeper import Keeper as Keeper
from storvsp.shared.unit import SharedUnit as SharedUnit

__all__ = ["Keeper", "SharedUnit"]
