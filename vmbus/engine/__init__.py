"""The control plane of the bus, without I/O.

Bytes that the guest posted go in, events come out; nothing here waits, sleeps or logs. See
``docs/explanation/engine.md`` for how to drive it and :mod:`vmbus.engine.states` for its rules.
"""

from __future__ import annotations

from vmbus.engine.config import SUPPORTED_FEATURES, Budgets, EngineConfig
from vmbus.engine.engine import Engine
from vmbus.engine.events import (
    ChannelClose,
    ChannelGone,
    ChannelModify,
    ChannelOpen,
    Connected,
    DiscardMessages,
    Disconnected,
    Event,
    Fault,
    GpadlTeardown,
    InterruptPage,
    MonitorPages,
    ResetDone,
    SendMessage,
    TlConnect,
)
from vmbus.engine.inspection import check, describe, describe_channels
from vmbus.engine.offers import Offer

__all__ = [
    "Engine",
    "EngineConfig",
    "Budgets",
    "SUPPORTED_FEATURES",
    "Offer",
    "describe",
    "describe_channels",
    "check",
    "Event",
    "SendMessage",
    "DiscardMessages",
    "Connected",
    "Disconnected",
    "ResetDone",
    "MonitorPages",
    "InterruptPage",
    "ChannelOpen",
    "ChannelClose",
    "ChannelModify",
    "ChannelGone",
    "GpadlTeardown",
    "TlConnect",
    "Fault",
]
