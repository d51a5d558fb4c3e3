"""Scenery for tests of endpoints."""

from tests.support.network import namespace as namespace
