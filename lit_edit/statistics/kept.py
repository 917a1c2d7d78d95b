"""What statistics the cache folder holds, and making room in it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lit_edit.files import read_metadata
from lit_edit.statistics.store import Header, cache_folder

_KINDS = ("key_covariance", "lm_gradient")
_PATTERNS = tuple(f"{start}{kind}-*.safetensors" for start in ("", "partial-") for kind in _KINDS)
_DAY = 86_400


@dataclass(frozen=True)
class Kept:
    """A file of statistics.

    Attributes:
        path: Of the file.
        size: Its bytes.
        days: Since it was written.
        header: What it was made from; None if that cannot be read.
    """

    path: Path
    size: int
    days: float
    header: Header | None


def kept(folder: str | Path | None = None) -> list[Kept]:
    """The files of statistics in a folder, newest first; whatever else lies there is left out.

    Args:
        folder: The cache folder if None.
    """
    found = []
    place = cache_folder() if folder is None else Path(folder)
    for path in (path for pattern in _PATTERNS for path in place.glob(pattern)):
        about = path.stat()
        try:
            header = Header.of(read_metadata(path))
        except (ValueError, OSError):
            header = None
        found.append(Kept(path, about.st_size, max(0.0, time.time() - about.st_mtime) / _DAY, header))
    return sorted(found, key=lambda one: one.days)


def clear(folder: str | Path | None = None, older_than: float = 0.0) -> list[Kept]:
    """Removes files of statistics; they are collected again when they are needed.

    Args:
        folder: The cache folder if None.
        older_than: Days; what was written since stays.

    Returns:
        What was removed.
    """
    gone = [one for one in kept(folder) if one.days >= older_than]
    for one in gone:
        one.path.unlink(missing_ok=True)
    return gone
