"""The grammar of disk specifications, its error messages, and the registry of back-ends."""

import importlib.metadata

import pytest
import trio
from hypothesis import given, strategies as st

from storvsp.disks import specs
from storvsp.disks.ram import RamDisk
from storvsp.disks.specs import DiskSpec, open_disk
from vmbus.errors import ConfigError
from vmbus.plugins.specs import parse_duration, parse_size

NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
SPECS = st.builds(
    DiskSpec, NAMES, st.dictionaries(NAMES, st.text(max_size=12), max_size=4), st.text(max_size=20)
)


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
        ("x:[a=maybe]t", lambda r: r.flag("a"), "write it alone, or with =on or =off"),
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


async def test_a_stack_needs_something_to_stand_on():
    with pytest.raises(ConfigError, match="delay:ram:64M"):
        await open_disk("delay:[read=1ms]")


async def test_the_schemes_of_this_project_are_installed_and_open():
    assert {"ram", "raw", "overlay", "delay", "fault", "cd"} <= set(specs.DISKS.names())
    disk = await open_disk(DiskSpec.parse("ram:1M"))
    assert disk.info.size == 1 << 20
    await disk.aclose()


async def test_an_unknown_scheme_says_which_are_known():
    with pytest.raises(ConfigError, match=r"unknown disk scheme 'rams'; did you mean 'ram'\?"):
        await open_disk("rams:1M")


async def open_good(spec):
    await trio.lowlevel.checkpoint()
    return RamDisk(1 << 20)


async def open_wrong(spec):
    await trio.lowlevel.checkpoint()
    return "not a disk"


async def open_missing(spec):
    await trio.lowlevel.checkpoint()
    raise FileNotFoundError(2, "No such file or directory")


def open_synchronously(spec):
    return RamDisk(1 << 20)


NO_OPENER = 3


@pytest.fixture
def plugins(monkeypatch):
    def install(*points):
        found = importlib.metadata.EntryPoints(
            importlib.metadata.EntryPoint(name, value, specs.DISKS.group) for name, value in points
        )
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)

    return install


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("no_such_module_at_all:open_spec", "cannot be imported: ModuleNotFoundError"),
        ("storvsp.disks.specs:no_such_name", "cannot be imported: AttributeError"),
        (f"{__name__}:NO_OPENER", "has to be an async function of one DiskSpec"),
        (f"{__name__}:open_synchronously", "has to be an async function of one DiskSpec"),
        (f"{__name__}:open_wrong", "returned str, not a Disk"),
        (f"{__name__}:open_missing", "mine:x: No such file or directory"),
    ],
)
async def test_a_broken_plug_in_is_named_in_one_error(plugins, value, hint, request):
    # pytest imports this module under a name of its own choosing: make it findable again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, __name__, request.module)
        plugins(("mine", value))
        with pytest.raises(ConfigError) as caught:
            await open_disk("mine:x")
    assert hint in str(caught.value)
    assert "'mine'" in str(caught.value) or "mine:x" in str(caught.value)


async def test_a_broken_plug_in_harms_no_other(plugins):
    plugins(("bad", "no_such_module_at_all:f"), ("ram", "storvsp.disks.ram:open_spec"))
    disk = await open_disk("ram:1M")
    await disk.aclose()


async def test_two_plug_ins_for_one_scheme_are_refused_unless_they_are_the_same(plugins):
    plugins(("ram", "storvsp.disks.ram:open_spec"), ("ram", "other:open_spec"))
    with pytest.raises(ConfigError, match="two plug-ins claim the disk scheme 'ram': other"):
        await open_disk("ram:1M")
    plugins(*[("ram", "storvsp.disks.ram:open_spec")] * 2)
    disk = await open_disk("ram:1M")
    await disk.aclose()


async def test_no_plug_ins_at_all_is_said(plugins):
    plugins()
    with pytest.raises(ConfigError, match="there are none"):
        await open_disk("ram:1M")
