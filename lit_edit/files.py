"""Files that are whole or absent, and known to be what was written: every artefact is read and written here.

A file is written beside its target, flushed to the disk, read back and renamed, so that a crash, a full disk or a kill
leaves the previous file. Artefacts carry the SHA-256 of their content, which is compared whenever they are read: a file
that changed on the disk is refused, not believed. (The digest finds damage. It is no signature: who can write the file
can write the digest.) Nothing here runs code from a file: safetensors, JSON, and ``torch.load`` of plain types.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import secrets
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DIGEST = "sha256"
_BLANK = "0" * 64
_METADATA = "lit_edit"  # one entry for all metadata: safetensors writes several in no set order
_MARK = rf"\"{DIGEST}\":\"".encode()  # JSON within JSON: what stands before the digest
_CHUNK = 1 << 22
_STALE = 3600.0  # seconds after which another writer's draft is taken for abandoned


class DamagedFileError(ValueError):
    """A file that cannot be read, or whose content is not what was written."""


def write_whole(path: Path, write: Callable[[Path], object], check: Callable[[Path], None] | None = None) -> None:
    """Replaces a file in one step: readers and crashes see the old content or the new one.

    The draft lies in the target's folder, since a rename is atomic within a file system only.

    Args:
        path: Target; its folder is made if missing.
        write: Writes the content to the path it is given, an empty file.
        check: Reads back what is on the disk, and raises if that is not what was written.

    Raises:
        OSError: If the disk is full or the folder cannot be written to. The target is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pattern = f".{path.name}.*.partial"
    for left in path.parent.glob(pattern):
        if time.time() - left.stat().st_mtime > _STALE:
            left.unlink(missing_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # as the umask has it; safetensors makes files that only their owner can read
        write(draft)
        draft.chmod(mode)
        _flush(draft)
        if check is not None:
            check(draft)
        os.replace(draft, path)
        _flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes strict JSON, whole or not at all.

    Args:
        path: Target; its folder is made if missing.
        content: Plain values, without NaN or infinities.

    Raises:
        ValueError: If the content holds a number that JSON has no word for.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    content = text.encode("utf-8", "backslashreplace")
    write_whole(Path(path), lambda draft: draft.write_bytes(content))


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with the SHA-256 of all its bytes in its metadata, whole or not at all.

    Args:
        path: Target; its folder is made if missing.
        tensors: On the CPU and contiguous.
        metadata: Strings by name; ``sha256`` is taken.

    Raises:
        DamagedFileError: If what is on the disk differs from what was written. The target is then unchanged.
    """

    def write(draft: Path) -> None:
        text = json.dumps({**metadata, DIGEST: _BLANK}, sort_keys=True, separators=(",", ":"))
        save_file(dict(tensors), draft, metadata={_METADATA: text})
        with draft.open("r+b") as file:
            place, digest = _digest(file)
            file.seek(place)
            file.write(digest.encode())

    write_whole(Path(path), write, check_tensors)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a file by `save_tensors`.

    Raises:
        DamagedFileError: If it cannot be read or its content is not what was written.
    """
    check_tensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = _metadata(file)
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a file by `save_tensors`, not compared with the digest: for lists of files.

    Raises:
        DamagedFileError: If it cannot be read.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return _metadata(file)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error


def _metadata(file: Any) -> dict[str, str]:
    found = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its metadata are not strings by name.")
    return {name: value for name, value in found.items() if name != DIGEST}


def check_tensors(path: str | os.PathLike[str]) -> None:
    """Compares a file's bytes with the digest in its metadata.

    Raises:
        DamagedFileError: If they differ, there is no digest, or the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            place, digest = _digest(file)
            file.seek(place)
            found = file.read(len(_BLANK)).decode("ascii", "replace")
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error
    if found != digest:
        raise DamagedFileError(
            f"{path} is damaged: its content has the SHA-256 {digest[:12]}..., it was written with {found[:12]}...."
        )


def _digest(file: BinaryIO) -> tuple[int, str]:
    """Where a safetensors file holds its digest, and the SHA-256 of its bytes with that place blank.

    Raises:
        ValueError: If there is no such place.
    """
    file.seek(0, os.SEEK_END)
    whole = file.tell()
    file.seek(0)
    start = file.read(8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= size <= whole - 8:
        raise ValueError("it is no safetensors file, or was cut off.")
    header = file.read(size)
    place = header.find(_MARK) + len(_MARK)
    if header.count(_MARK) != 1 or place + len(_BLANK) > size:
        raise ValueError("it has no SHA-256 of its content.")
    blank = header[:place] + _BLANK.encode() + header[place + len(_BLANK) :]
    digest = hashlib.sha256(start + blank)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return 8 + place, digest.hexdigest()


def save_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes a checkpoint as ``torch.save`` does, with its SHA-256 as the comment of the ZIP file, whole or not at all.

    Args:
        path: Target. The previous file stays until the new one has been read back.
        content: Plain types and tensors.

    Raises:
        DamagedFileError: If what is on the disk differs from what was written. The target is then unchanged.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    # The last two bytes of a ZIP file without a comment are the comment's length.
    body = buffer.getbuffer()[:-2]
    comment = f"{DIGEST}:{hashlib.sha256(body).hexdigest()}".encode()

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            file.write(body)
            file.write(len(comment).to_bytes(2, "little") + comment)

    write_whole(Path(path), write, check_checkpoint)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint by `save_checkpoint`. No code in it is run: it may hold plain types and tensors only.

    Raises:
        DamagedFileError: If it is none, or its content is not what was written.
    """
    check_checkpoint(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError) as error:
        raise DamagedFileError(f"{path} is not a checkpoint that can be read.") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is not a checkpoint that can be read: it holds no dictionary.")
    return content


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Compares a checkpoint's bytes with its digest.

    Raises:
        DamagedFileError: If they differ, there is no digest, or the file cannot be read.
    """
    length = len(DIGEST) + 1 + len(_BLANK)
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            left = file.tell() - length - 2
            if left < 0:
                raise ValueError("it is too short")
            file.seek(0)
            digest = hashlib.sha256()
            while left and (chunk := file.read(min(_CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
            end = file.read()
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is not a checkpoint that can be read: {error}.") from error
    if end[:2] != length.to_bytes(2, "little") or not end[2:].startswith(DIGEST.encode()):
        raise DamagedFileError(
            f"{path} is not a checkpoint that can be read: it was cut off, or not written by an editing run (it has no "
            "SHA-256 of its content)."
        )
    if end[2:] != f"{DIGEST}:{digest.hexdigest()}".encode():
        raise DamagedFileError(f"{path} is damaged: its content is not what was written. Take an earlier checkpoint.")
