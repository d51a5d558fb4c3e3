"""Addresses that were learnt: good for a while, bounded, and shared out fairly."""

from __future__ import annotations

from netvsp.switch.table import AGE, CAPACITY, AddressTable, Learnt
from tests.support.switch import station


def fill(table: AddressTable[str], port: str, numbers: range, *, now: float = 0.0) -> int:
    """Have a port learn addresses; return how many it has learnt."""
    return sum(
        table.learn(0, station(each), port, now, CAPACITY)[0] is Learnt.NEW for each in numbers
    )


def test_a_station_is_found_where_it_was_last_seen():
    table: AddressTable[str] = AddressTable()
    assert table.learn(0, station(1), "a", 0, 9) == (Learnt.NEW, None)
    assert table.learn(0, station(1), "a", 1, 9) == (Learnt.KNOWN, None)
    assert table.find(0, station(1), 2) == "a"
    assert table.learn(0, station(1), "b", 3, 9) == (Learnt.MOVED, "a")
    assert table.find(0, station(1), 4) == "b"
    assert (table.count("a"), table.count("b"), table.moves) == (0, 1, 1)


def test_each_vlan_has_stations_of_its_own():
    table: AddressTable[str] = AddressTable()
    table.learn(5, station(1), "a", 0, 9)
    assert table.find(5, station(1), 0) == "a"
    assert table.find(0, station(1), 0) is None
    assert table.learn(6, station(1), "b", 0, 9)[0] is Learnt.NEW


def test_an_old_entry_is_none_swept_away_or_not():
    table: AddressTable[str] = AddressTable()
    table.learn(0, station(1), "a", 0, 9)
    assert table.find(0, station(1), AGE - 1) == "a"
    assert table.find(0, station(1), AGE) is None
    # It has not moved: it was forgotten.
    assert table.learn(0, station(1), "b", AGE, 9) == (Learnt.NEW, None)
    assert table.moves == 0
    assert len(table) == table.count("b") == 1


def test_what_is_seen_again_stays():
    table: AddressTable[str] = AddressTable()
    for now in range(0, 1000, 100):
        table.learn(0, station(1), "a", now, 9)
    assert table.find(0, station(1), 900 + AGE - 1) == "a"


def test_sweeping_looks_at_some_and_gets_round_to_all():
    table: AddressTable[str] = AddressTable()
    fill(table, "a", range(1, 11))
    fill(table, "b", range(11, 21), now=AGE / 2)
    for _ in range(4):
        table.sweep(AGE, 5)
    assert (table.count("a"), table.count("b"), len(table)) == (0, 10, 10)


def test_a_port_has_its_limit_and_old_ones_do_not_count():
    table: AddressTable[str] = AddressTable()
    assert [table.learn(0, station(each), "a", 0, 2)[0] for each in (1, 2, 3)] == [
        Learnt.NEW,
        Learnt.NEW,
        Learnt.REFUSED,
    ]
    table.learn(0, station(4), "b", 0, 2)
    assert table.learn(0, station(4), "a", 0, 2)[0] is Learnt.REFUSED
    assert table.find(0, station(4), 0) == "b"
    assert table.learn(0, station(3), "a", AGE, 2)[0] is Learnt.NEW


def test_ten_thousand_stations_have_room():
    table: AddressTable[str] = AddressTable()
    assert fill(table, "a", range(1, 10_001)) == 10_000
    assert table.find(0, station(1), 0) == "a"


def test_one_port_cannot_fill_the_table_for_others():
    table: AddressTable[str] = AddressTable(100)
    assert fill(table, "greedy", range(1, 1000)) == 100
    assert fill(table, "late", range(1000, 1080)) == 50
    assert (table.count("greedy"), table.count("late"), table.evicted) == (50, 50, 50)
    # And now neither takes the other's.
    assert fill(table, "greedy", range(1, 100)) == 0
    # The oldest have gone.
    assert table.find(0, station(50), 0) is None
    assert table.find(0, station(51), 0) == "greedy"


def test_many_ports_together_cannot_take_anothers_share():
    table: AddressTable[str] = AddressTable(100)
    fill(table, "quiet", range(1, 6))
    for port in range(19):
        first = 1000 * (port + 1)
        fill(table, f"greedy{port}", range(first, first + 500))
    assert [table.find(0, station(each), 0) for each in range(1, 6)] == ["quiet"] * 5


def test_a_full_table_forgets_old_ones_first():
    table: AddressTable[str] = AddressTable(10)
    fill(table, "a", range(1, 11))
    assert table.learn(0, station(11), "a", AGE, 100)[0] is Learnt.NEW
    assert (len(table), table.evicted) == (1, 0)


def test_a_port_that_goes_is_forgotten_with_all_its_stations():
    table: AddressTable[str] = AddressTable()
    fill(table, "a", range(1, 5))
    fill(table, "b", range(5, 7))
    table.forget("a")
    table.forget("never there")
    assert len(table) == 2
    assert table.find(0, station(1), 0) is None
