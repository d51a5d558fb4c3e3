"""docs/reference/wire.md says what the tables in vmbus/wire and storvsp/wire.py say."""

from __future__ import annotations

import importlib.util
import struct

import pytest

from storvsp import wire as vstor
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


# -- vstor -----------------------------------------------------------------------------------------


def test_the_fields_of_every_vstor_layout_are_gapless_and_add_up_to_its_size(maker):
    for union in maker.UNIONS:
        end = union.base
        for field in maker.struct_fields(union.layout, union.names, union.base):
            assert field.offset == end, union.title
            end += field.size
        assert end == union.base + union.layout.size <= vstor.PACKET_SIZE, union.title


def test_every_layout_of_vstor_has_a_table(maker):
    layouts = {union.layout.format for union in maker.UNIONS}
    for name, value in vars(vstor).items():
        if isinstance(value, struct.Struct) and not name.startswith("_"):
            assert value.format in layouts, name


@pytest.mark.parametrize(
    "row",
    [
        "| 14 | 1 | u8 | srb_status |",
        "| 17 | 1 | u8 | path |",
        "| 28 | 16 | bytes | cdb |",
        "| 28 | 20 | bytes | sense |",
        "| 52 | 4 | u32 | srb_flags |",
        "| 16 | 2 | u16 | max_channel_count |",
        "| 24 | 4 | u32 | max_transfer_bytes |",
        "| `EXECUTE_SRB` | 3 |",
        "| `SRB_INVALID_LUN` | 0x20 |",
        "| `VERSION_6_1` | 0x601 | no |",
        "| `STATUS_REVISION_MISMATCH` | 0xc0000059 |",
        "| `PACKET_SIZE` | 64 |",
    ],
)
def test_the_page_has_the_rows_of_vstor(maker, row):
    assert row in maker.render_vstor()


def test_every_number_of_vstor_is_in_a_table(maker):
    text = maker.render_vstor()
    for name, value in vars(vstor).items():
        if isinstance(value, int) and name.isupper() and not name.startswith("_"):
            assert f"| `{name}` |" in text
