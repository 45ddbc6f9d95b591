"""Numbers as people read them."""

from typing import Final

_PREFIXES: Final = ("", "k", "M", "G", "T", "P", "E")


def quantity(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: ``12.3 MB``, ``12.3 k``, ``999``."""
    size, prefix = float(value), 0
    while abs(size) >= 999.5 and prefix < len(_PREFIXES) - 1:  # 999.5 would round to four digits
        size, prefix = size / 1000, prefix + 1
    digits = f"{size:.0f}" if prefix == 0 and size == int(size) else f"{size:.3g}"
    return f"{digits} {_PREFIXES[prefix]}{unit}".rstrip()


def percent(share: float) -> str:
    """A share as ``12.3 %``."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """A time as ``m:ss`` or ``h:mm:ss``, rounded to seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
