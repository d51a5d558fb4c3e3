"""What the guest of a demo tells."""

from __future__ import annotations

import json

from vmbus.demo import Story
from vmbus.errors import VMBusError


def test_lines_are_json_and_problems_are_remembered(capsys):
    story = Story()
    story.emit("start", guest="ä", ram=1)
    assert not story.failed
    story.problem("part", VMBusError("broken"))
    assert story.failed
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {"event": "start", "guest": "ä", "ram": 1}
    assert json.loads(second) == {"event": "problem", "where": "part", "text": "broken"}
