"""The grammar of specifications, and its error messages."""

import string

import pytest
from hypothesis import given, strategies as st

from storvsp.disks.specs import DiskSpec, open_disk
from vmbus.errors import ConfigError
from vmbus.plugins.specs import OptionReader, Spec, parse_duration, parse_size

FIRST = string.ascii_lowercase
REST = f"{FIRST}{string.digits}_-"
NAMES = st.tuples(st.sampled_from(FIRST), st.text(REST, max_size=8)).map("".join)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
SPECS = st.builds(DiskSpec, NAMES, st.dictionaries(NAMES, TEXTS, max_size=4), TEXTS)


@pytest.mark.parametrize(
    ("text", "scheme", "options", "target"),
    [
        ("ram:64M", "ram", {}, "64M"),
        ("ram:", "ram", {}, ""),
        ("ram:[]64M", "ram", {}, "64M"),
        ("raw:[ro,sector=4096]a b.img", "raw", {"ro": "", "sector": "4096"}, "a b.img"),
        ("raw:/dev/disk/by-id/x:y[0]", "raw", {}, "/dev/disk/by-id/x:y[0]"),
        ("raw:[][odd].img", "raw", {}, "[odd].img"),
        ("overlay:[scratch=a\\,b\\]c\\\\d=e]raw:[ro]x", "overlay", {"scratch": "a,b]c\\d=e"},
         "raw:[ro]x"),
    ],
)  # fmt: skip
def test_specifications_are_taken_apart(text, scheme, options, target):
    assert DiskSpec.parse(text) == DiskSpec(scheme, options, target)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "write for example ram:64M"),
        ("disk.img", "write raw:disk.img"),
        ("/a:b", "write raw:/a:b"),
        ("RAM:1M", "does not begin with a scheme"),
        ("raw:[ro", "not closed"),
        ("raw:[ro\\]x", "not closed"),
        ("raw:[ro\\", "not closed"),
        ("raw:[", "not closed"),
        ("raw:[,]x", "'' is not an option"),
        ("raw:[ro,]x", "'' is not an option"),
        ("raw:[Ro]x", "'Ro' is not an option"),
        ("raw:[=3]x", "'=3' is not an option"),
        ("raw:[sector=]x", "nothing after its ="),
        ("raw:[ro,ro=off]x", "given twice"),
    ],
)
def test_mistakes_are_named(text, hint):
    with pytest.raises(ConfigError) as caught:
        DiskSpec.parse(text)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "text", ["raw:a\0b", "raw:\udcff", "raw:[x=\ud800]y", "raw:" + "x" * 20000]
)
def test_what_nobody_has_typed_is_refused(text):
    with pytest.raises(ConfigError, match="disk specification") as caught:
        DiskSpec.parse(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@given(SPECS)
def test_a_specification_as_text_parses_to_itself(spec):
    assert DiskSpec.parse(str(spec)) == spec


@given(st.text(max_size=40) | st.text("ram:[]\\,=x", max_size=20).map("ram:[".__add__))
def test_any_text_parses_or_raises_config_error(text):
    try:
        spec = DiskSpec.parse(text)
    except ConfigError:
        return
    assert DiskSpec.parse(str(spec)) == spec


def test_a_specification_cannot_be_changed_and_can_be_a_key():
    source = {"ro": ""}
    spec = DiskSpec("raw", source, "x")
    source["ro"] = "off"
    assert spec.options == {"ro": ""}
    with pytest.raises(TypeError):
        spec.options["ro"] = "on"  # type: ignore[index]
    assert {spec: 1}[DiskSpec.parse("raw:[ro]x")] == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("3k", 3072), ("64M", 64 << 20), ("10G", 10 << 30), ("2T", 2 << 40)],
)
def test_sizes_have_suffixes_that_are_powers_of_1024(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1P", "64MB", "٣"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(("text", "time"), [("250us", 250e-6), ("1.5ms", 1.5e-3), ("2s", 2.0)])
def test_durations_have_units(text, time):
    assert parse_duration(text) == pytest.approx(time)


@pytest.mark.parametrize("text", ["", "1", "ms", "-1s", "1 s", "1m"])
def test_other_durations_are_refused(text):
    with pytest.raises(ConfigError, match="not a duration"):
        parse_duration(text)


def test_options_are_read_by_type():
    spec = DiskSpec.parse("x:[a,b=off,c=ON,size=4K,time=3ms,n=7,p=0.25,word=red,path=/a]t")
    reader = spec.reader()
    assert [reader.flag(name) for name in "abcd"] == [True, False, True, False]
    assert (reader.size("size"), reader.size("none")) == (4096, None)
    assert (reader.duration("time"), reader.duration("none")) == (0.003, 0.0)
    assert (reader.integer("n"), reader.integer("none")) == (7, None)
    assert reader.integer("n", choices=(6, 7)) == 7
    assert (reader.probability("p"), reader.probability("none")) == (0.25, 1.0)
    assert (reader.choice("word", ["red", "green"]), reader.choice("none", ["red"])) == (
        "red",
        None,
    )
    assert (reader.text("path"), reader.text("none")) == ("/a", None)
    reader.finish()


@pytest.mark.parametrize(
    ("text", "read", "hint"),
    [
        ("x:[a]t", lambda r: r.text("a"), "x:[a]t: option 'a' needs a value"),
        ("x:[a=maybe]t", lambda r: r.flag("a"), "it can be on or off"),
        ("x:[a=big]t", lambda r: r.size("a"), "'big' is not a size"),
        ("x:[a=big]t", lambda r: r.duration("a"), "'big' is not a duration"),
        ("x:[a=-1]t", lambda r: r.integer("a"), "'-1' is not a whole number"),
        ("x:[a=²]t", lambda r: r.integer("a"), "'²' is not a whole number"),
        ("x:[a=3]t", lambda r: r.integer("a", choices=(1, 2)), "it can be 1 or 2"),
        ("x:[a=3]t", lambda r: r.integer("a", choices=(1,)), "it can be 1"),
        ("x:[a=2]t", lambda r: r.probability("a"), "from 0 to 1"),
        ("x:[a=nan]t", lambda r: r.probability("a"), "from 0 to 1"),
        ("x:[a=x]t", lambda r: r.probability("a"), "from 0 to 1"),
        ("x:[a=gren]t", lambda r: r.choice("a", ["red", "green"]), "did you mean 'green'?"),
        ("x:[a=zzz]t", lambda r: r.choice("a", ["red", "green"]), "known: green and red"),
    ],
)
def test_values_that_cannot_be_used_say_what_could(text, read, hint):
    with pytest.raises(ConfigError) as caught:
        read(DiskSpec.parse(text).reader())
    assert hint in str(caught.value)


def test_a_target_may_be_a_size():
    assert Spec.parse("x:[ro]64M").size() == 64 << 20
    for text, told in (
        ("x:", r"^'x:': needs a size, as in x:64M"),
        ("x:much", r"^x:much: 'much' is not a size; write bytes"),
    ):
        with pytest.raises(ConfigError, match=told):
            Spec.parse(text).size()


def test_unknown_options_say_which_are_known():
    reader = DiskSpec.parse("x:[sectr=512]t").reader()
    reader.integer("sector")
    reader.flag("ro")
    with pytest.raises(ConfigError, match=r"'sectr'; did you mean 'sector'\? known: ro and sector"):
        reader.finish()
    with pytest.raises(ConfigError, match="unknown option 'y'; there are none"):
        DiskSpec.parse("x:[y]t").reader().finish()


async def test_options_of_the_controller_are_split_off_and_belong_outside():
    spec, place = DiskSpec.parse("ram:[lun=3,sector=512,target=0]1M").split()
    assert spec == DiskSpec.parse("ram:[sector=512]1M")
    assert place == {"lun": "3", "target": "0"}
    assert spec.split() == (spec, {})
    with pytest.raises(ConfigError, match="belongs to the outermost brackets"):
        await open_disk("overlay:ram:[lun=3]1M")


def test_a_device_reads_its_options_as_a_back_end_does():
    reader = OptionReader("nic", {"mtu": "9K", "poll": True, "quiet": False, "queues": 4})
    assert (reader.size("mtu"), reader.flag("poll"), reader.flag("quiet")) == (9 << 10, True, False)
    assert reader.integer("queues") == 4
    reader.finish()
    for name, value, hint in (("poll", "perhaps", "on or off"), ("poll", 2, "'2'; it can be on")):
        with pytest.raises(ConfigError, match=f"nic: option 'poll' is .*{hint}"):
            OptionReader("nic", {name: value}).flag(name)
    with pytest.raises(ConfigError, match="nic: option 'queues' cannot be used: '-1' is not"):
        OptionReader("nic", {"queues": -1}).integer("queues")
    with pytest.raises(ConfigError, match="nic: unknown option 'mtu'; there are none"):
        OptionReader("nic", {"mtu": 1}).finish()


@pytest.mark.parametrize(
    ("text", "told"), [("x:t", "x:t: broken"), ("x:", "'x:': broken"), ("x:a:", "'x:a:': broken")]
)
def test_an_error_about_a_specification_has_no_two_colons_in_a_row(text, told):
    assert str(Spec.parse(text).error("broken")) == told
