"""Mode pages: MODE SENSE and MODE SELECT (SPC-4 6.11-6.14 and 7.5, SBC-3 6.4).

Pages live in memory only: nothing is saved, and a logical unit reset restores the defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Final

from storvsp.scsi.cdb import MODE_SENSE_6
from storvsp.scsi.sense import (
    ILLEGAL_REQUEST,
    SAVING_PARAMETERS_NOT_SUPPORTED,
    CheckCondition,
    Sense,
    invalid_cdb_field,
    invalid_parameter,
    parameter_list_length_error,
)
from vmbus.errors import ConfigError

ERROR_RECOVERY: Final = 0x01
CACHING: Final = 0x08
CONTROL: Final = 0x0A
INFORMATIONAL_EXCEPTIONS: Final = 0x1C
CAPABILITIES: Final = 0x2A
ALL_PAGES: Final = 0x3F
ALL_SUBPAGES: Final = 0xFF

WRITE_CACHE_ENABLED: Final = 0x04
SOFTWARE_WRITE_PROTECT: Final = 0x08
TRAY_CAPABILITIES: Final = 0x29
"""Byte 6 of page 2A, and the same byte in GET CONFIGURATION's removable medium feature."""
TRAY_LOCKED: Final = 0x02


@dataclasses.dataclass(frozen=True, slots=True)
class ModePage:
    """One page.

    Attributes:
        default: The whole page, with its two header bytes.
        changeable: A mask over the bytes after the header: bits a guest may change.
    """

    default: bytes
    changeable: bytes

    @property
    def code(self) -> int:
        """Page code."""
        return self.default[0]


def page(code: int, body: bytes, changeable: dict[int, int] | None = None) -> ModePage:
    """Make a page.

    Args:
        code: Page code.
        body: The bytes after the header.
        changeable: Byte index in the page -> changeable bits of it.
    """
    mask = bytearray(len(body))
    for index, bits in (changeable or {}).items():
        mask[index - 2] = bits
    return ModePage(bytes((code, len(body))) + body, bytes(mask))


def disk_pages(*, write_cache: bool) -> list[ModePage]:
    """Return the pages of a disk.

    Args:
        write_cache: The back-end's writes may be volatile. WCE then is 1 and may be turned off
            and on; otherwise it is 0 for good.
    """
    wce = WRITE_CACHE_ENABLED if write_cache else 0
    return [
        # AWRE and ARRE: the host's storage reassigns blocks by itself.
        page(ERROR_RECOVERY, bytes((0xC0,)).ljust(10, b"\0")),
        page(CACHING, bytes((wce,)).ljust(18, b"\0"), {2: wce}),
        # GLTSD; unrestricted reordering; software write protect may be changed; TAS, because
        # every request on VMBus has to be answered, also when another initiator aborted it.
        page(
            CONTROL,
            bytes((0x02, 0x10, 0x00, 0x40, 0, 0, 0xFF, 0xFF, 0, 0)),
            {4: SOFTWARE_WRITE_PROTECT},
        ),
        page(INFORMATIONAL_EXCEPTIONS, bytes((0x08,)).ljust(10, b"\0")),  # DEXCPT
    ]


def cdrom_pages() -> list[ModePage]:
    """Return the pages of a CD-ROM drive (MMC-3 5.5.10 for page 2A)."""
    speed = (7056).to_bytes(2, "big")  # kB/s, forty times the speed of an audio disc
    return [
        page(ERROR_RECOVERY, bytes(10)),
        page(
            CAPABILITIES,
            # Reads CD-R, CD-RW, DVD-ROM, DVD-R and DVD-RAM; writes nothing; mode 2 forms 1 and 2,
            # multi-session; tray, eject and lock.
            bytes((0x3B, 0x00, 0x70, 0x00, TRAY_CAPABILITIES, 0x00))
            + speed
            + bytes((0, 0, 0x02, 0x00))
            + speed
            + bytes(6),
        ),
        page(INFORMATIONAL_EXCEPTIONS, bytes((0x08,)).ljust(10, b"\0")),  # DEXCPT
    ]


class ModePages:
    """The mode pages of one logical unit and their current values.

    Args:
        pages: In ascending order of page code.
    """

    __slots__ = ("_current", "_pages")

    def __init__(self, pages: Iterable[ModePage]) -> None:
        self._pages = {page.code: page for page in pages}
        self._current: dict[int, bytes] = {}
        self.reset()

    def reset(self) -> None:
        """Go back to the defaults."""
        self._current = {code: page.default for code, page in self._pages.items()}

    def current(self, code: int) -> bytes:
        """Return the current values of a page, header included."""
        return self._current[code]

    def store(self, code: int, index: int, value: int) -> None:
        """Set one byte of a page's current values, for a state that the page shows."""
        page = self._current[code]
        self._current[code] = page[:index] + bytes((value,)) + page[index + 1 :]

    def save(self) -> dict[str, str]:
        """Return the pages that differ from their defaults: hexadecimal, by page code."""
        return {
            f"{code:02x}": value.hex()
            for code, value in self._current.items()
            if value != self._pages[code].default
        }

    def restore(self, saved: Mapping[str, str]) -> None:
        """Take over what :meth:`save` has returned. Raises ConfigError."""
        values = dict(self._current)
        for text, value in saved.items():
            try:
                code, page = int(text, 16), bytes.fromhex(value)
            except ValueError:
                raise ConfigError(f"saved mode page {text!r}: not hexadecimal") from None
            known = self._pages.get(code)
            if known is None or len(page) != len(known.default) or page[:2] != known.default[:2]:
                raise ConfigError(f"saved mode page {text!r}: this unit has none like it")
            values[code] = page
        self._current = values

    def sense_untrusted(
        self, cdb: bytes, *, specific: int, descriptor: bytes, medium_type: int = 0
    ) -> bytes:
        """Build the answer to MODE SENSE(6) or (10).

        Args:
            cdb: The CDB, of full length.
            specific: DEVICE-SPECIFIC PARAMETER of the header.
            descriptor: The block descriptor; left out if the guest disables it.
            medium_type: MEDIUM TYPE of the header.

        Raises:
            CheckCondition: Saved values are asked for, or a page that does not exist.
        """
        control, code, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if code == ALL_PAGES:
            if subpage not in {0, ALL_SUBPAGES}:
                raise invalid_cdb_field(3)
            codes = list(self._pages)
        elif code not in self._pages:
            raise invalid_cdb_field(2, 5)
        elif subpage not in {0, ALL_SUBPAGES}:
            raise invalid_cdb_field(3)
        else:
            codes = [code]
        if control == 3:
            raise CheckCondition(Sense(ILLEGAL_REQUEST, SAVING_PARAMETERS_NOT_SUPPORTED))
        body = b"".join(self._values(code, control) for code in codes)
        if cdb[1] & 0x08:  # DBD
            descriptor = b""
        if cdb[0] == MODE_SENSE_6:
            total = 3 + len(descriptor) + len(body)
            return bytes((total, medium_type, specific, len(descriptor))) + descriptor + body
        total = 6 + len(descriptor) + len(body)
        return (
            total.to_bytes(2, "big")
            + bytes((medium_type, specific, 1 if len(descriptor) == 16 else 0, 0))
            + len(descriptor).to_bytes(2, "big")
            + descriptor
            + body
        )

    def _values(self, code: int, control: int) -> bytes:
        page = self._pages[code]
        if control == 1:
            return page.default[:2] + page.changeable
        return page.default if control == 2 else self._current[code]

    def select_untrusted(self, parameters: bytes, *, long: bool, sector_size: int) -> bool:
        """Apply the parameter list of MODE SELECT: all of it or, if anything is wrong, nothing.

        Args:
            parameters: A private copy of the parameter list.
            long: True for MODE SELECT(10), False for (6).
            sector_size: The only block length a block descriptor may ask for, bytes.

        Returns:
            True if a value has changed.

        Raises:
            CheckCondition: The list is cut off, or a field would change that cannot be changed;
                the sense data points at it.
        """
        header = 8 if long else 4
        if len(parameters) < header:
            raise parameter_list_length_error()
        size = int.from_bytes(parameters[6:8], "big") if long else parameters[3]
        wide = bool(long and parameters[4] & 0x01)
        offset = header + size
        if offset > len(parameters):
            raise parameter_list_length_error()
        unit = 16 if wide else 8
        if size not in {0, unit}:
            raise invalid_parameter(6 if long else 3)
        if size:
            at = header + (12 if wide else 5)
            if int.from_bytes(parameters[at:offset], "big") not in {0, sector_size}:
                raise invalid_parameter(at)
        wanted = dict(self._current)
        while offset < len(parameters):
            offset = self._select_page(parameters, offset, wanted)
        changed = wanted != self._current
        self._current = wanted
        return changed

    def _select_page(self, parameters: bytes, offset: int, wanted: dict[int, bytes]) -> int:
        """Check one page of the list, put it into ``wanted``, return where the next one begins."""
        if offset + 2 > len(parameters):
            raise parameter_list_length_error()
        if parameters[offset] & 0x40:  # SPF: there are no subpages
            raise invalid_parameter(offset, 6)
        page = self._pages.get(parameters[offset] & 0x3F)
        if page is None:
            raise invalid_parameter(offset, 5)
        if parameters[offset + 1] != len(page.changeable):
            raise invalid_parameter(offset + 1)
        end = offset + len(page.default)
        if end > len(parameters):
            raise parameter_list_length_error()
        values = parameters[offset + 2 : end]
        fixed = zip(values, self._current[page.code][2:], page.changeable, strict=True)
        for index, (value, now, mask) in enumerate(fixed):
            refused = (value ^ now) & ~mask
            if refused:
                raise invalid_parameter(offset + 2 + index, refused.bit_length() - 1)
        wanted[page.code] = page.default[:2] + values
        return end
