"""The schemes of endpoints."""

import importlib.metadata

import pytest
import trio

from netvsp.endpoints import specs
from netvsp.endpoints.null import NullEndpoint
from netvsp.endpoints.specs import open_endpoint
from netvsp.spec import EndpointSpec
from vmbus.errors import ConfigError


async def open_wrong(spec):
    await trio.lowlevel.checkpoint()
    return "not an endpoint"


async def open_refused(spec):
    await trio.lowlevel.checkpoint()
    raise PermissionError(1, "Operation not permitted")


async def open_turtles(spec):
    return await open_endpoint("mine:")


def open_synchronously(spec):
    return NullEndpoint()


@pytest.fixture
def plug_in(monkeypatch, request):
    """Register a function of this module as the scheme ``mine``."""

    def register(name):
        # pytest imports this module under a name of its own choosing: make it findable again.
        monkeypatch.setitem(__import__("sys").modules, "mine", request.module)
        point = importlib.metadata.EntryPoint("mine", f"mine:{name}", specs.ENDPOINTS.group)
        found = importlib.metadata.EntryPoints([point])
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)

    return register


async def test_the_schemes_of_this_project_are_installed_and_open():
    known = {"tap", "nat", "pcap", "script", "loopback", "null"}
    assert known <= set(specs.ENDPOINTS.names())
    endpoint = await open_endpoint(EndpointSpec.parse("null:"))
    assert isinstance(endpoint, NullEndpoint)
    await endpoint.aclose()


async def test_an_unknown_scheme_says_which_are_known():
    with pytest.raises(ConfigError, match=r"unknown endpoint scheme 'nul'; did you mean 'null'\?"):
        await open_endpoint("nul:")


async def test_what_is_no_specification_gets_an_example():
    with pytest.raises(ConfigError, match=r"empty endpoint specification; .* tap:vnet0"):
        await open_endpoint("")


@pytest.mark.parametrize("scheme", ["null", "loopback"])
async def test_a_scheme_without_a_target_refuses_one(scheme):
    with pytest.raises(ConfigError, match=f"{scheme}: has nothing behind it"):
        await open_endpoint(f"{scheme}:eth0")


@pytest.mark.parametrize("scheme", ["null", "loopback"])
async def test_a_misspelt_option_is_refused(scheme):
    with pytest.raises(ConfigError, match="unknown option 'asis'"):
        await open_endpoint(f"{scheme}:[asis]")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("open_synchronously", "has to be an async function of one EndpointSpec"),
        ("open_wrong", "returned str, no Endpoint"),
        ("open_refused", "mine:.*: Operation not permitted"),
        ("open_turtles", "more than 32 endpoints within each other"),
    ],
)
async def test_a_broken_plug_in_is_named_in_one_error(plug_in, name, text):
    plug_in(name)
    with pytest.raises(ConfigError, match=text):
        await open_endpoint("mine:")
