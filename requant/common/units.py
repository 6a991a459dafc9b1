"""Sizes and durations as text: KiB, MiB, GiB and, as powers of ten, KB, MB, GB; bytes and seconds inside."""

import re
from fractions import Fraction

from requant.errors import UsageError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power
_SIZE = re.compile(r"\s*(\d{1,999}(?:\.\d{1,99})?)\s*([A-Za-z]*)\s*")

_LIKE_A_SIZE = re.compile(r"\s*(\d{1,99}(?:[.,]\d{1,99})?)\s*([KMGTkmgt])|\s*(\d{1,99},\d{1,99})\s*$")


def parse_size(text: str, least: int = 1) -> int:
    """Parse `text` as bytes, at least `least`: `12GiB`, `800MB`, `1.5 GiB`, `4096`.

    Raises UsageError for anything else, also for `12G`, which may be 10^9 or 2^30.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(
            f"'{text}' is not a size; {_suggest_sizes(text)}write a number with KiB, MiB, GiB or KB, MB, GB (12GiB)"
        )
    n_bytes = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if not least <= n_bytes < 2**62:
        raise UsageError(f"size '{text}' is out of range; it must be {'above 0 and ' * least}below 4 EiB")
    return n_bytes


def _suggest_sizes(text: str) -> str:
    """Suggest sizes for `text`: `did you mean 12GiB or 12GB? `."""
    match = _LIKE_A_SIZE.match(text)
    if match is None:
        return ""
    number, letter = (match[1] or match[3]).replace(",", "."), (match[2] or "G").upper()
    return f"did you mean {number}{letter}iB or {number}{letter}B? "


def suggest_number(text: str, *, whole: bool) -> str:
    """Suggest a number for `text` that is none: `did you mean 4.5?` for 4,5 or 16384 for 16,384; empty without one."""
    found = re.fullmatch(r"\s*([+-]?[0-9]+),([0-9]+)\s*", text)
    if whole and re.fullmatch(r"\s*[0-9]{1,3}([.,' ][0-9]{3})+\s*", text):
        return f"did you mean {re.sub('[^0-9]', '', text)}?"
    if whole and (thousands := re.fullmatch(r"\s*([0-9]{1,7})[kK]\s*", text)):
        return f"did you mean {1024 * int(thousands[1])}?"
    return f"did you mean {found[1]}.{found[2]}?" if found is not None and not whole else ""


def size_label(n_bytes: int) -> str:
    """Format `n_bytes` exactly, as an option takes it: `12GiB`, `1536MiB`, `1000B`."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes % unit == 0:
            return f"{n_bytes // unit}{name}"
    return f"{n_bytes}B"


def format_size(n_bytes: float) -> str:
    """Format `n_bytes` in the largest binary unit that leaves at least 1, two decimals: `1.50 GiB`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _UNITS[unit.upper()]
        if abs(n_bytes) >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes:.0f} B"


def format_budget(n_bytes: int) -> str:
    """Format `n_bytes` as `format_size` does; beside it a size in powers of ten as it was given: `5.72 MiB (6 MB)`."""
    size = format_size(n_bytes)
    for power, name in enumerate(("KB", "MB", "GB", "TB"), start=1):
        if n_bytes < 1000 ** (power + 1) or name == "TB":
            exact = n_bytes >= 1000 and not 100 * n_bytes % 1000**power and 100 * n_bytes % 1024**power
            return f"{size} ({n_bytes / 1000**power:g} {name})" if exact else size
    return size


def format_duration(seconds: float) -> str:
    """Format `seconds`: `8 s`, `2 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
