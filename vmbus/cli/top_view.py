"""What a look of ``vmbus top`` says: lines for a terminal of any width, and words for a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vmbus.cli.columns import Column, fit, layout
from vmbus.cli.output import bold, safe, size_text
from vmbus.cli.rates import WAYS, ChannelView, DiskView, GuestView, NicView, ServerView

DISK_COLUMNS = (
    Column("disk", right=False),
    Column("read", group="MB/s", least=5),
    Column("written", group="MB/s"),
    Column("commands/s", rank=2),
    Column("errors", rank=1),
    Column("size", rank=3),
    Column("what", rank=4, right=False, text=True),
)
NIC_COLUMNS = (
    Column("nic", right=False),
    Column("sent", group="MB/s", least=5),
    Column("received", group="MB/s"),
    Column("sent", rank=2, group="packets/s", least=5),
    Column("received", rank=3, group="packets/s"),
    Column("drops/s", rank=1, least=5),
    Column("queues", rank=4),
    Column("sent", rank=6, group="segments/s", least=5),
    Column("received", rank=7, group="segments/s"),
    Column("sent", rank=8, group="checksums/s", least=5),
    Column("received", rank=9, group="checksums/s"),
    Column("what", rank=5, right=False, text=True),
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
            (NIC_COLUMNS, [_nic_cells(nic) for nic in guest.nics]),
            (CHANNEL_COLUMNS, [_channel_cells(channel) for channel in guest.channels]),
        ):
            if rows:
                head, body = layout(columns, rows, width)
                lines += [*map(bold, head), *body]
            if columns is NIC_COLUMNS:
                for nic in guest.nics:
                    lines += _nic_lines(nic, width)
    return lines


def _headlines(guest: GuestView, width: int) -> Iterator[str]:
    """Yield words about a guest, as many per line as there is room for."""
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
    if guest.nics:
        words.append(
            f"{megabytes(guest.nic_rate('bytes_sent'))} MB/s sent, "
            f"{megabytes(guest.nic_rate('bytes_received'))} MB/s received"
        )
    if guest.paused:
        words.append("paused")
    if not guest.channels:
        words.append("no open channels")
    yield from _enumerated(f"{safe(guest.name)}:", words, width)


def _enumerated(start: str, words: Sequence[str], width: int) -> Iterator[str]:
    """Yield lines of words with commas, as many per line as there is room for."""
    from rich.cells import cell_len

    line = fit(start, width)
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


def _nic_cells(nic: NicView) -> tuple[str, ...]:
    rates = nic.rates
    return (
        str(nic.adapter),
        megabytes(rates["bytes_sent"]),
        megabytes(rates["bytes_received"]),
        short(rates["frames_sent"], 1000),
        short(rates["frames_received"], 1000),
        short(rates["dropped_sent"] + rates["dropped_received"], 1000),
        str(nic.queues),
        short(rates["segments_sent"], 1000),
        short(rates["segments_received"], 1000),
        short(rates["checksums_sent"], 1000),
        short(rates["checksums_received"], 1000),
        safe(nic.source or nic.address),
    )


def _nic_lines(nic: NicView, width: int) -> Iterator[str]:
    """Yield words about a link that is down, and what was dropped, by reason; or nothing."""
    if nic.link != "up":
        why = [f"the link is {nic.link}", *([safe(nic.failure)] if nic.failure else [])]
        yield from _enumerated(f"nic {nic.adapter}:", why, width)
    words = [
        f"{count} {safe(reason)} ({way})"
        for way in WAYS
        for reason, count in sorted(nic.drops[way].items(), key=lambda item: -item[1])
        if count
    ]
    if words:
        yield from _enumerated(f"nic {nic.adapter} dropped:", words, width)


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
            f"channels={len(guest.channels)} disks={len(guest.disks)} nics={len(guest.nics)}"
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
        for nic in guest.nics:
            yield f"guest={name} {_nic_line(nic)}"


def _nic_line(nic: NicView) -> str:
    words = [
        f"nic={nic.adapter} address={nic.address} link={nic.link} queues={nic.queues}",
        _rates(nic.rates),
        *(f"{way}_drops={_counts(nic.drops[way])}" for way in WAYS),
    ]
    return " ".join(words)


def _counts(counts: Mapping[str, int]) -> str:
    """Return counts by reason as one word."""
    return ",".join(f"{_word(reason)}:{count}" for reason, count in counts.items()) or "-"


def _rates(rates: dict[str, float]) -> str:
    return " ".join(f"{name}={rate:.1f}" for name, rate in rates.items())


def _word(text: str) -> str:
    """Return one word, whatever a guest calls itself."""
    return "_".join(safe(text).replace("=", "?").split()) or "-"
