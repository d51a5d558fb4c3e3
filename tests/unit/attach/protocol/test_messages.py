"""The codec of ``vmbus-user``: layouts, values, the message table, the specification's tables."""

from __future__ import annotations

import errno
import re
from typing import Any

import pytest

from tests.support.house import ROOT
from vmbus.attach.protocol import to_server, to_vmm
from vmbus.attach.protocol.layout import Field, Layout, encode_text, sizes
from vmbus.attach.protocol.limits import MAGIC, Feature, Role
from vmbus.attach.protocol.messages import (
    MESSAGES,
    RESERVED,
    Direction,
    Number,
    RefusedError,
    State,
    check_request,
    find_spec,
)
from vmbus.attach.protocol.to_server import (
    Hello,
    HelloReply,
    JsonObject,
    MemoryRegion,
    PostMessage,
    Query,
    RemMem,
    SetMemTable,
    SetSintFd,
    SignalEvent,
    SynicState,
    VmInfo,
    choose_version,
)
from vmbus.attach.protocol.to_vmm import (
    AddEventPort,
    AddMsgPort,
    DeliverMessage,
    DelPort,
    ErrorReply,
    Log,
    PostCredit,
    SetCallFd,
    SignalFlag,
)
from vmbus.errors import LocalProtocolError, PeerProtocolError

SPECIFICATION = ROOT / "docs" / "reference" / "vmbus-user.md"
REGION = MemoryRegion(0x1000, 0x2000, 0, 0, 0)

SAMPLES: list[Any] = [
    Hello(1, 2, 0xFFFF_FFFF_FFFF_FFFF, 64, Role.VMM, "qemu"),
    HelloReply(1, 64, 7, 32768, 64, "vmbus é"),
    SetMemTable((REGION, MemoryRegion(0x8000, 0x1000, 0x3000, 1, 5))),
    REGION,
    RemMem(0x1000, 0x2000),
    VmInfo(2, 4096, bytes(range(16)), 0x30_0000_0064, 0),
    SynicState(1, 1, 0x3001, 0x4001, 0xF3),
    SetSintFd(1, 2),
    PostMessage(4, 1, 0, b"x" * 240),
    SignalEvent(0x11, 2047),
    to_server.Reset(2),
    to_server.Goodbye(1),
    to_server.Empty(),
    Query("status"),
    JsonObject({"a": [1, None, "ü"]}),
    AddMsgPort(4),
    AddEventPort(0xFFFFFF, 0),
    DelPort(4, 0, 1),
    DeliverMessage(0, 2, 1, b""),
    SignalFlag(0, 15, 5),
    SetCallFd(0xFFFFFFFF, 1, 2, 3),
    Log(1, "text"),
    PostCredit(5),
    ErrorReply(22, "field: rule"),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_what_is_encoded_is_decoded(sample: Any) -> None:
    assert type(sample).decode_untrusted(sample.encode()) == sample


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_every_truncation_and_every_extra_byte_is_a_protocol_error_or_other_text(
    sample: Any,
) -> None:
    """G01: truncated at every length, and too long."""
    data = sample.encode()
    for other in [data[:length] for length in range(len(data))] + [data + b"\0"]:
        try:
            decoded = type(sample).decode_untrusted(other)
        except PeerProtocolError:
            continue
        assert isinstance(sample, Query | Log | ErrorReply)
        assert decoded != sample


BAD: list[tuple[type[Any], bytes, int, str]] = [
    (Hello, Hello(1, 1, 0, 1, 0, "").encode().replace(b"VMBU", b"VMBX"), errno.EINVAL, "magic"),
    (Hello, Hello(2, 1, 0, 1, 0, "").encode(), errno.EINVAL, "version_min"),
    (Hello, Hello(1, 1, 0, 1, 2, "").encode(), errno.EINVAL, "role"),
    (Hello, Hello(1, 1, 0, 1, 0, "x").encode() + b"y", errno.EMSGSIZE, "name_length"),
    (Hello, Hello(1, 1, 0, 1, 0, "a\nb").encode(), errno.EINVAL, "control"),
    (Hello, Hello(1, 1, 0, 1, 0, "x" * 256).encode(), errno.EMSGSIZE, "name"),
    (Hello, Hello(1, 1, 0, 1, 0, "ab").encode()[:-2] + b"\xc3\x28", errno.EINVAL, "UTF-8"),
    (HelloReply, HelloReply(1, 0, 0, 4096, 1, "").encode(), errno.EINVAL, "max_fds"),
    (HelloReply, HelloReply(1, 1, 0, 4095, 1, "").encode(), errno.EINVAL, "max_payload"),
    (HelloReply, HelloReply(1, 1, 0, 4096, 0, "").encode(), errno.EINVAL, "post_credits"),
    (HelloReply, b"\0" * 24, errno.EINVAL, "magic"),
    (MemoryRegion, MemoryRegion(1, 4096, 0, 0, 0).encode(), errno.EINVAL, "gpa"),
    (MemoryRegion, MemoryRegion(0, 4097, 0, 0, 0).encode(), errno.EINVAL, "size"),
    (MemoryRegion, MemoryRegion(0, 0, 0, 0, 0).encode(), errno.EINVAL, "size"),
    (MemoryRegion, MemoryRegion(0, 4096, 8, 0, 0).encode(), errno.EINVAL, "fd_offset"),
    (MemoryRegion, MemoryRegion(0, 4096, 1 << 62, 0, 0).encode(), errno.EINVAL, "fd_offset"),
    (MemoryRegion, MemoryRegion(1 << 52, 4096, 0, 0, 0).encode(), errno.EINVAL, r"2\*\*52"),
    (MemoryRegion, MemoryRegion(0, 4096, 0, 2, 0).encode(), errno.EINVAL, "flags"),
    (SetMemTable, SetMemTable(()).encode(), errno.EINVAL, "count"),
    (SetMemTable, SetMemTable((REGION,) * 65).encode(), errno.EINVAL, "count"),
    (SetMemTable, SetMemTable((REGION,)).encode()[:-1], errno.EMSGSIZE, "length"),
    (SetMemTable, SetMemTable((REGION, REGION)).encode(), errno.EEXIST, "overlap"),
    (SetMemTable, b"\1\0\0\0\1\0\0\0" + REGION.encode(), errno.EINVAL, "reserved"),
    (VmInfo, VmInfo(0, 4096, bytes(16), 0, 0).encode(), errno.EINVAL, "vp_count"),
    (VmInfo, VmInfo(1, 16384, bytes(16), 0, 0).encode(), errno.EINVAL, "page_size"),
    (VmInfo, VmInfo(1, 4096, bytes(16), 0, 1).encode(), errno.EOPNOTSUPP, "flags"),
    (SetSintFd, SetSintFd(0, 3).encode(), errno.EINVAL, "sint"),
    (PostMessage, b"\0" * 15, errno.EMSGSIZE, "at least 16"),
    (PostMessage, PostMessage(0, 1, 0, b"").encode(), errno.EINVAL, "connection_id"),
    (PostMessage, PostMessage(1 << 24, 1, 0, b"").encode(), errno.EINVAL, "connection_id"),
    (PostMessage, PostMessage(1, 0, 0, b"").encode(), errno.EINVAL, "message_type"),
    (PostMessage, PostMessage(1, 1 << 31, 0, b"").encode(), errno.EINVAL, "message_type"),
    (PostMessage, PostMessage(1, 1, 0, b"x" * 241).encode(), errno.EINVAL, "size"),
    (PostMessage, PostMessage(1, 1, 0, b"").encode() + b"x", errno.EMSGSIZE, "size"),
    (SignalEvent, SignalEvent(1, 2048).encode(), errno.EINVAL, "flag"),
    (SignalEvent, SignalEvent(0, 0).encode(), errno.EINVAL, "connection_id"),
    (Query, b"", errno.EMSGSIZE, "kind"),
    (Query, b"x" * 65, errno.EMSGSIZE, "kind"),
    (JsonObject, b"[]", errno.EINVAL, "object"),
    (JsonObject, b"{", errno.EINVAL, "JSON"),
    (JsonObject, b'{"a":"\xff"}', errno.EINVAL, "UTF-8"),
    (JsonObject, b"[" * 30000, errno.EINVAL, "JSON"),
    (AddMsgPort, AddMsgPort(0).encode(), errno.EINVAL, "connection_id"),
    (AddEventPort, AddEventPort(1, 2048).encode(), errno.EINVAL, "flag"),
    (DelPort, DelPort(1, 0, 2).encode(), errno.EINVAL, "kind"),
    (DeliverMessage, DeliverMessage(0, 16, 1, b"").encode(), errno.EINVAL, "sint"),
    (SignalFlag, SignalFlag(0, 16, 0).encode(), errno.EINVAL, "sint"),
    (SignalFlag, SignalFlag(0, 2, 2048).encode(), errno.EINVAL, "flag"),
    (SetCallFd, SetCallFd(0, 0, 2, 2048).encode(), errno.EINVAL, "flag"),
    (SetCallFd, SetCallFd(0, 0, 16, 0).encode(), errno.EINVAL, "sint"),
    (Log, b"\0\0\0\0" + b"x" * 1025, errno.EMSGSIZE, "text"),
    (PostCredit, PostCredit(0).encode(), errno.EINVAL, "count"),
    (ErrorReply, b"\0\0\0\0", errno.EINVAL, "errno"),
    (ErrorReply, b"\xff\xff\xff\xff", errno.EINVAL, "errno"),
    (ErrorReply, b"\1\0\0", errno.EMSGSIZE, "at least 4"),
]


@pytest.mark.parametrize(("kind", "data", "code", "text"), BAD)
def test_a_broken_rule_is_named_with_its_errno(
    kind: type[Any], data: bytes, code: int, text: str
) -> None:
    with pytest.raises(PeerProtocolError, match=text) as caught:
        kind.decode_untrusted(data)
    assert caught.value.errno == code
    assert not caught.value.fatal


def test_a_value_that_does_not_fit_its_field_is_our_own_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="SetSintFd"):
        SetSintFd(1 << 32, 2).encode()


@pytest.mark.parametrize(("low", "high"), [(2, 9), (0, 0)])
def test_versions_that_are_not_spoken_are_refused(low: int, high: int) -> None:
    with pytest.raises(PeerProtocolError) as caught:
        choose_version(Hello(low, high, 0, 1, 0, ""))
    assert caught.value.errno == errno.EPROTONOSUPPORT


def test_the_highest_common_version_is_chosen() -> None:
    assert choose_version(Hello(0, 9, 0, 1, 0, "")) == 1


@pytest.mark.parametrize(
    "reply", [HelloReply(2, 64, 0, 4096, 1, ""), HelloReply(1, 64, 2, 4096, 1, "")]
)
def test_a_hello_reply_must_stay_within_what_was_offered(reply: HelloReply) -> None:
    with pytest.raises(PeerProtocolError, match="offered") as caught:
        reply.check_answers(Hello(1, 1, 1, 1, 0, ""))
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize(
    ("state", "page"),
    [
        (SynicState(0, 1, 0, 0x5001, 0xF3), 0x5000),
        (SynicState(0, 0, 0, 0x5001, 0xF3), None),
        (SynicState(0, 1, 0, 0x5000, 0xF3), None),
        (SynicState(0, 1, 0, 0x5001, 0x100F3), None),
    ],
)
def test_flags_can_be_raised_only_with_everything_enabled(
    state: SynicState, page: int | None
) -> None:
    assert state.flags_page == page


def test_text_for_people_is_cut_and_made_printable() -> None:
    assert encode_text("é" * 10, 5) == "éé".encode()
    assert ErrorReply.decode_untrusted(ErrorReply(5, "a\n\x7f" + "x" * 600).encode()).text == (
        "a  " + "x" * 509
    )
    assert Log.decode_untrusted(Log(0, "\x1b[31m" + "é" * 900).encode()).text.startswith(" [31mé")


def test_a_request_is_found_only_in_its_direction() -> None:
    assert find_spec(Number.RESET, Direction.TO_SERVER).request is to_server.Reset
    assert find_spec(Number.GOODBYE, Direction.TO_VMM) is MESSAGES[Number.GOODBYE]
    for number in (*RESERVED, Number.DELIVER_MESSAGE, 0, 0xFFFF):
        with pytest.raises(PeerProtocolError) as caught:
            find_spec(number, Direction.TO_SERVER)
        assert caught.value.errno == errno.ENOSYS
    with pytest.raises(PeerProtocolError, match="POST_MESSAGE is not a request to VMM"):
        find_spec(Number.POST_MESSAGE, Direction.TO_VMM)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("spec", MESSAGES.values(), ids=lambda spec: spec.name)
def test_every_message_in_every_state_is_legal_or_refused(spec: Any, state: State) -> None:
    if state in spec.states:
        check_request(spec, state, spec.min_fds)
        for fds in (spec.min_fds - 1, spec.max_fds + 1):
            with pytest.raises(PeerProtocolError, match="descriptors") as caught:
                check_request(spec, state, fds)
            assert caught.value.errno == errno.EINVAL
    else:
        with pytest.raises(PeerProtocolError, match="not allowed") as caught:
            check_request(spec, state, spec.min_fds)
        assert caught.value.errno in {errno.EPROTO, errno.EPERM}


def test_a_refusal_tells_its_errno_by_name() -> None:
    assert str(RefusedError("RESET", errno.EBUSY, "why")) == "RESET: EBUSY: why"
    assert str(RefusedError("RESET", 4000, "why")) == "RESET: 4000: why"
    # A server's text may name the request itself, for those who see nothing else of it.
    refused = RefusedError("HELLO", errno.EBUSY, "HELLO: a guest of this name is attached")
    assert str(refused) == "HELLO: EBUSY: a guest of this name is attached"
    assert refused.text == "a guest of this name is attached"


# -- the specification -------------------------------------------------------------------------


def section(title: str) -> str:
    text = SPECIFICATION.read_text()
    found = re.search(
        rf"^### \d+\.\d+ [^\n]*{title} \(0x.*?(?=^##)", text, re.MULTILINE | re.DOTALL
    )
    assert found is not None, title
    return found[0]


@pytest.mark.parametrize("spec", MESSAGES.values(), ids=lambda spec: spec.name)
def test_the_specification_lists_every_field_at_its_place(spec: Any) -> None:
    if spec.name in {"PAUSE", "RESUME"}:
        return
    text = section(spec.name)
    if spec.name == "ADD_MEM":
        text = section("SET_MEM_TABLE")
    for shape in (spec.request, spec.reply):
        layout: Layout = getattr(shape, "LAYOUT", Layout())
        for offset, size, name in sizes(layout.fields):
            assert f"| {offset} | {size} | {name} |" in text, (spec.name, name)


@pytest.mark.parametrize("spec", MESSAGES.values(), ids=lambda spec: spec.name)
def test_the_specification_summarises_every_message(spec: Any) -> None:
    row = re.search(
        rf"^\| 0x{spec.number:02x} \| (.*) \|$", SPECIFICATION.read_text(), re.MULTILINE
    )
    assert row is not None
    name, direction, reply, fds, states = row[1].split(" | ")
    assert (name, direction) == (spec.name, spec.direction.value)
    assert reply == ("no" if spec.is_async else "yes")
    assert fds == (
        str(spec.min_fds) if spec.min_fds == spec.max_fds else f"{spec.min_fds} to {spec.max_fds}"
    )
    expected = {state.value for state in spec.states}
    if states == "all but new":
        assert expected == {s.value for s in State} - {"new", "closed"}
    else:
        assert set(states.split(", ")) == expected


def test_the_specification_names_features_magic_and_limits() -> None:
    text = SPECIFICATION.read_text()
    for bit, feature in enumerate(Feature):
        assert f"| {bit} | {feature.name} |" in text
    assert f"{MAGIC:#x}" in text
    assert "| 0 | 4 | errno |" in text


def test_layouts_count_offsets_without_padding() -> None:
    assert sizes([Field("a", 2), Field("b", 8), Field("c", 4)]) == [
        (0, 2, "a"), (2, 8, "b"), (10, 4, "c"),
    ]  # fmt: skip
    assert to_vmm.SetCallFd.LAYOUT.size == 16
