"""Several outer machines share the tests out among themselves."""

from __future__ import annotations

from tests.guest.rig.claims import ENVIRONMENT, Claims, load_claims


def test_each_test_is_one_machines(tmp_path):
    first, second = Claims(tmp_path, 1), Claims(tmp_path, 2)
    assert first.take("tests/a.py::test_a[x/y]")
    assert not second.take("tests/a.py::test_a[x/y]")
    assert second.take("tests/a.py::test_b")
    assert not first.take("tests/a.py::test_b")
    first.finish("tests/a.py::test_a[x/y]")
    assert first.unfinished() == []
    assert second.unfinished() == ["tests/a.py::test_b"]
    assert first.finished == second.finished == 1


def test_what_a_machine_was_doing_when_it_ended_is_run_by_another(tmp_path):
    first, second = Claims(tmp_path, 1), Claims(tmp_path, 2)
    assert first.take("done")
    assert first.take("under way")
    assert second.take("elsewhere")
    first.finish("done")
    assert first.give_back() == ["under way"]
    assert not second.take("done")
    assert second.take("under way")
    assert first.give_back() == []
    assert sorted(second.unfinished()) == ["elsewhere", "under way"]


def test_a_machine_by_itself_runs_everything(tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert load_claims() is None
    monkeypatch.setenv(ENVIRONMENT, Claims(tmp_path, 3).environment)
    claims = load_claims()
    assert claims is not None
    assert claims.take("some")
    assert Claims(tmp_path, 3).unfinished() == ["some"]
