"""Bytes and seconds for people."""

from __future__ import annotations

import re


def size_text(size: float) -> str:
    """Bytes for people: ``850 kB``, ``1.2 GB``."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def parse_size(text: str | int) -> int:
    """Bytes of a size for people: ``2GB``, ``850 kB``, ``1000``.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(text, int) and text >= 0:
        return text
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kMGT]?)B?", str(text).strip())
    if found is None:
        raise ValueError(f"{text!r} is not a size: 2GB, 850MB and 0 are.")
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))


def share_text(share: float) -> str:
    """A probability for people: ``0.31``, ``0.0042``; ``< 0.0001`` where nobody cares how much less."""
    return f"{share:.2g}" if share >= 1e-4 else "< 0.0001"


def counted(number: int, noun: str) -> str:
    """``1 edit``, ``2 edits``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def time_text(seconds: float) -> str:
    """Seconds for people: ``0.4 s``, ``12 min``, ``3.4 h``."""
    if seconds < 0.01:
        return "< 0.01 s"
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    minutes = seconds / 60
    return f"{minutes:.2g} min" if minutes < 99.5 else f"{minutes / 60:.3g} h"
