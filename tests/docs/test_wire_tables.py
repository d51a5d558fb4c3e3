"""docs/reference/wire.md says what the tables in vmbus/wire say."""

from __future__ import annotations

import importlib.util

import pytest

from tests.support.house import ROOT
from vmbus.wire.messages import MESSAGES

SCRIPT = ROOT / "docs/make_wire_tables.py"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_wire_tables", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(maker):
    assert maker.PAGE.read_text() == maker.render(), "run: python docs/make_wire_tables.py"


def test_the_fields_of_every_layout_are_gapless_and_add_up_to_its_size(maker):
    for spec in MESSAGES:
        end = 0
        for field in maker.fields(spec):
            assert field.offset == end, spec.message.NAME
            if field.name not in {"data", "client_id"}:
                end += field.size
        assert end == spec.size, spec.message.NAME


@pytest.mark.parametrize(
    "row",
    [
        "| 24 | 16 | GUID | instance_id |",
        "| 180 | 2 | u16 | subchannel_index |",
        "| 192 | 4 | u32 | connection_id |",
        "| 154 | 2 | u16 | open_flags |",
        "| 18 | 2 | u16 | range_count |",
        "| 20 | … | bytes | data |",
        "| 40 | 16 | GUID | client_id |",
        "| 32 | 8 | u64 | host_monitor_page_2 |",
    ],
)
def test_the_page_has_the_rows_of_the_specification(maker, row):
    assert row in maker.render()


def test_every_message_has_a_section_that_the_overview_links_to(maker):
    lines = maker.render().splitlines()
    for spec in MESSAGES:
        title = f"{spec.message.TYPE} {spec.message.NAME}"
        assert lines.count(f"## {title}") == 1
        link = "#" + title.lower().replace(" ", "-")
        assert any(f"({link})" in line for line in lines)
