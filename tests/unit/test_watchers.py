"""Callbacks, until they are not wanted any more."""

from vmbus.watchers import Watchers


def test_watchers_are_called_until_they_end_their_watch():
    watchers = Watchers()
    calls = []

    def note():
        calls.append("same")

    end_first = watchers.add(note)
    watchers.add(note)

    def leave():
        calls.append("leaving")
        end()

    end = watchers.add(leave)
    watchers.notify()
    end_first()
    end_first()
    watchers.notify()
    assert calls == ["same", "same", "leaving", "same"]
