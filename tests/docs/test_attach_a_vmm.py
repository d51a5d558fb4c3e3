"""docs/howto/attach-a-vmm.md quotes the code as it is."""

from __future__ import annotations

import re

from tests.support.house import ROOT


def test_the_page_shows_what_a_delegate_does():
    page = (ROOT / "docs/howto/attach-a-vmm.md").read_text()
    source = (ROOT / "vmbus/attach/client/machine.py").read_text()
    (quoted,) = re.findall(r"```python\n( .*?)```", page, re.DOTALL)
    assert quoted in source
