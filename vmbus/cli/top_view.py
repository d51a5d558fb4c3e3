"""What a look of ``vmbus top`` says: lines for a terminal of any width, and words for a pipe."""

from __future__ import annotations

from collections.abc import Iterator

from vmbus.cli.columns import Column, fit, layout
from vmbus.cli.output import bold, safe, size_text
from vmbus.cli.rates import ChannelView, DiskView, GuestView, ServerView

DISK_COLUMNS = (
    Column("disk", right=False),
    Column("read", group="MB/s", least=5),
    Column("written", group="MB/s"),
    Column("commands/s", rank=2),
    Column("errors", rank=1),
    Column("size", rank=3),
    Column("what", rank=4, right=False, text=True),
)
CHANNEL_COLUMNS = (
    Column("channel", right=False),
    Column("in", group="ring"),
    Column("out", group="ring"),
    Column("open", rank=1),
    Column("in", rank=2, group="packets/s", least=5),
    Column("out", rank=3, group="packets/s", least=5),
    Column("in", rank=6, group="bytes/s", least=5),
    Column("out", rank=7, group="bytes/s", least=5),
    Column("in", rank=4, group="signals/s", least=5),
    Column("out", rank=5, group="signals/s", least=5),
)


def table_lines(view: ServerView, width: int) -> list[str]:
    """Return the lines of one look, none wider than ``width``; styled if styles are wanted."""
    lines = [
        fit(
            f"{safe(view.server)}, pid {view.pid}, {size_text(view.rss)} in use, "
            f"{view.guests_served} guest(s) served, {len(view.guests)} attached",
            width,
        )
    ]
    for guest in view.guests:
        lines += ["", *(bold(line, warn=guest.faults > 0) for line in _headlines(guest, width))]
        for columns, rows in (
            (DISK_COLUMNS, [_disk_cells(disk, guest) for disk in guest.disks]),
            (CHANNEL_COLUMNS, [_channel_cells(channel) for channel in guest.channels]),
        ):
            if rows:
                head, body = layout(columns, rows, width)
                lines += [*map(bold, head), *body]
    return lines


def _headlines(guest: GuestView, width: int) -> Iterator[str]:
    """Yield words about a guest, as many per line as there is room for."""
    from rich.cells import cell_len

    words = [
        f"VMBus {guest.version}" if guest.version else "no contact yet",
        f"{size_text(guest.memory)} of memory",
        f"{guest.faults} fault(s)",
    ]
    if guest.disks:
        words.append(
            f"{megabytes(guest.disk_rate('bytes_read'))} MB/s read, "
            f"{megabytes(guest.disk_rate('bytes_written'))} MB/s written"
        )
    if guest.paused:
        words.append("paused")
    if not guest.channels:
        words.append("no open channels")
    line = fit(f"{safe(guest.name)}:", width)
    for index, word in enumerate(words):
        comma = "," if index + 1 < len(words) else ""
        if cell_len(line) + 1 + len(word) + len(comma) > width:
            yield line
            line = fit(f"  {word}{comma}", width)
        else:
            line += f" {word}{comma}"
    yield line


def _disk_cells(disk: DiskView, guest: GuestView) -> tuple[str, ...]:
    several = any(other.controller for other in guest.disks)
    rates = disk.rates
    return (
        f"{disk.controller}/{disk.address}" if several else disk.address,
        megabytes(rates["bytes_read"]),
        megabytes(rates["bytes_written"]),
        short(rates["commands"], 1000),
        str(disk.errors),
        size_text(disk.size),
        safe(f"stopped: {disk.stopped}" if disk.stopped else disk.source or disk.kind),
    )


def _channel_cells(channel: ChannelView) -> tuple[str, ...]:
    name = f"{channel.relid} {safe(channel.device)}"
    if channel.subchannel_index:
        name += f".{channel.subchannel_index}"
    rates = channel.rates
    return (
        name,
        f"{channel.incoming_fill:.0%}",
        f"{channel.outgoing_fill:.0%}",
        str(channel.outstanding),
        short(rates["packets_in"], 1000),
        short(rates["packets_out"], 1000),
        short(rates["bytes_in"], 1024),
        short(rates["bytes_out"], 1024),
        short(rates["signals_in"], 1000),
        short(rates["signals_out"], 1000),
    )


def megabytes(rate: float) -> str:
    """Write bytes per second as millions; ``0`` is nothing at all, ``0.0`` very little."""
    if not rate:
        return "0"
    return f"{rate / 1e6:.1f}" if rate < 99.95e6 else f"{rate / 1e6:.0f}"


def short(number: float, base: int) -> str:
    """Write a number in few characters: ``999``, ``4.39k``, ``1.5M``."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= base
    return f"{number:.3g}T"


def plain_lines(view: ServerView) -> Iterator[str]:
    """Yield the lines of one look for a pipe; each stands for itself."""
    yield (
        f"server={_word(view.server)} pid={view.pid} rss={view.rss} "
        f"guests_served={view.guests_served} guests={len(view.guests)}"
    )
    for guest in view.guests:
        name = _word(guest.name)
        yield (
            f"guest={name} version={guest.version or '-'} memory={guest.memory} "
            f"paused={'yes' if guest.paused else 'no'} faults={guest.faults} "
            f"channels={len(guest.channels)} disks={len(guest.disks)}"
        )
        for channel in guest.channels:
            yield (
                f"guest={name} channel={channel.relid} device={_word(channel.device)} "
                f"subchannel={channel.subchannel_index} ring_in={channel.incoming_fill:.3f} "
                f"ring_out={channel.outgoing_fill:.3f} outstanding={channel.outstanding} "
                f"{_rates(channel.rates)}"
            )
        for disk in guest.disks:
            yield (
                f"guest={name} disk={disk.address} controller={disk.controller} "
                f"size={'-' if disk.size is None else disk.size} errors={disk.errors} "
                f"{_rates(disk.rates)}"
            )


def _rates(rates: dict[str, float]) -> str:
    return " ".join(f"{name}={rate:.1f}" for name, rate in rates.items())


def _word(text: str) -> str:
    """Return one word, whatever a guest calls itself."""
    return "_".join(safe(text).replace("=", "?").split()) or "-"
