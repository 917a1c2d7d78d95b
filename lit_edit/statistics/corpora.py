"""Corpora over which statistics are taken: the embedded text, files of texts, and Hugging Face data sets as streams.

A corpus can be read from the start as often as need be, always the same texts in the same order, and only as far as
needed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from lit_edit.model.loading import EMBEDDED, LoadingError, embedded_path

HUB_PREFIX = "hf:"
SEED, BUFFER = 0, 10_000
"""How streams are shuffled: the seed, and how many records one is drawn from."""
_ENDS = 65_536
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Corpus(ABC):
    """Texts, none of them blank.

    Attributes:
        name: Name in files of statistics.
    """

    name: str

    @abstractmethod
    def __iter__(self) -> Iterator[str]:
        """The texts from the start.

        Raises:
            LoadingError: if they cannot be read.
        """

    @property
    def identity(self) -> str | None:
        """What the texts are drawn from and how, in words that no other corpus has.

        ``None`` if the corpus is known by its content, which is read for that as a whole.
        """
        return None

    @property
    @abstractmethod
    def order(self) -> str:
        """For people: the order in which the texts are read."""


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """A file of texts: one on each line, or in ``.jsonl`` the field ``text`` of the object on each line.

    Args:
        name: Name in files of statistics.
        path: UTF-8, with ``.gz`` appended to its name if it is compressed.
    """

    name: str
    path: Path

    @property
    def order(self) -> str:
        """For people: the order in which the texts are read."""
        return "in the order of the file"

    def __iter__(self) -> Iterator[str]:
        """The texts in the order of the file; blank ones are passed over."""
        packed = self.path.name.endswith(".gz")
        records = self.path.name.removesuffix(".gz").endswith(".jsonl")
        try:
            with (gzip.open if packed else open)(self.path, "rt", encoding="utf-8-sig") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        text = self._text(line, number) if records else line.rstrip("\n")
                        if text.strip():
                            yield text
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise LoadingError(f"The corpus {self.name!r} cannot be read: {error}") from error

    def _text(self, line: str, number: int) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise LoadingError(f"The corpus {self.name!r}, line {number}: is not valid JSON ({error.msg}).") from error
        return text_of(record, "text", f"The corpus {self.name!r}, line {number}")


@dataclass(frozen=True)
class StreamedCorpus(Corpus):
    """A Hugging Face data set that is read as a stream: from the hub, or from a folder.

    The records are shuffled, with one seed for all: each is drawn from a buffer of the next 10,000, and the order of
    the files is shuffled, too. No code that comes with a data set is ever run.

    It is known by where it comes from, not by its content: by its commit on the hub, or in a folder by the name and
    size of each file with what stands in its first and last 64 KiB.

    Args:
        source: A folder, or a name on the hub.
        revision: Commit, branch or tag on the hub; the newest if ``None``. With a whole commit hash nothing is
            asked of the hub to know the corpus.
        config: Data set's configuration, if it has several.
        split: Split of the data set.
        field: Field of a record that is its text.
    """

    source: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    field: str = "text"

    @classmethod
    def parse(cls, address: str) -> StreamedCorpus:
        """From ``hf:owner/name``, ``hf:owner/name@revision`` or ``hf:folder``.

        Behind it may stand ``:split``, ``:config:split`` or ``:config:split:field``; what is left empty is as by
        default.

        Raises:
            LoadingError: if it is not of this form.
        """
        name = address[len(HUB_PREFIX) :]
        # A name may have a colon only where it is a folder's.
        whole = Path(name).expanduser().is_dir()
        source, *rest = [name] if whole else name.split(":")
        if not source or len(rest) > 3:
            raise LoadingError(
                f"{address}: is not of the form hf:owner/name, hf:owner/name:split, hf:owner/name:config:split or "
                "hf:owner/name:config:split:field, with a folder for the name or a revision behind it (@...)."
            )
        config, split, field = {
            0: ("", "", ""),
            1: ("", *rest, ""),
            2: (*rest, ""),
            3: tuple(rest),
        }[len(rest)]
        revision = None
        if not Path(source).expanduser().is_dir() and "@" in source:
            source, revision = source.split("@", 1)
        return cls(source, revision or None, config or None, split or "train", field or "text")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The address without the revision, which is part of `identity`."""
        return f"{HUB_PREFIX}{self.source}:{self.config or ''}:{self.split}:{self.field}"

    @property
    def order(self) -> str:
        """For people: the order in which the texts are read."""
        return f"shuffled with seed {SEED} over a buffer of {BUFFER:,} records"

    @property
    def _folder(self) -> Path | None:
        folder = Path(self.source).expanduser()
        return folder if folder.is_dir() else None

    @cached_property
    def _commit(self) -> str:
        """The commit on the hub that is read.

        Raises:
            LoadingError: if the hub has to be asked and does not answer, or has no such data set.
        """
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self.revision
        from huggingface_hub import HfApi

        try:
            commit = HfApi().dataset_info(self.source, revision=self.revision).sha
        except Exception as error:
            # Whatever went wrong in one of several libraries, without a common base class for their errors.
            raise LoadingError(
                f"{self.name}: the hub does not say which commit this is ({type(error).__name__}: "
                f"{' '.join(str(error).split())}). Name one, hf:{self.source}@<commit>, to use what is there without "
                "asking."
            ) from error
        return str(commit)

    @property
    def identity(self) -> str:
        """Commit or files, configuration, split, field, and how the records are shuffled."""
        folder = self._folder
        origin = ["commit", self._commit] if folder is None else ["files", _ends_of_files(folder)]
        return json.dumps([*origin, self.config, self.split, self.field, "shuffled", SEED, BUFFER])

    def __iter__(self) -> Iterator[str]:
        """The texts as they are drawn; blank ones are passed over."""
        records = self._records()
        number = 0
        while True:
            number += 1
            try:
                record = next(records, None)
            except Exception as error:
                raise LoadingError(self._failure(error)) from error
            if record is None:
                return
            text = text_of(record, self.field, f"{self.name}, record {number} as shuffled")
            if text.strip():
                yield text

    def _failure(self, error: Exception) -> str:
        return f"{self.name}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})."

    def _records(self) -> Iterator[dict[str, Any]]:
        import datasets  # takes a second to import, which a run on a plain file need not spend

        folder = self._folder
        commit = self._commit if folder is None else None
        try:
            if folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                kept = datasets.load_from_disk(str(folder))
                one = kept[self.split] if isinstance(kept, datasets.DatasetDict) else kept
                data = one.to_iterable_dataset()
            else:
                # datasets 3 can still run a data set's own script, if it is let; datasets 4 cannot, and logs the
                # argument as an error.
                refuse_code = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
                where = {} if commit is None else {"revision": commit}
                name = self.source if folder is None else str(folder)
                data = datasets.load_dataset(
                    name, self.config, split=self.split, streaming=True, **where, **refuse_code
                )
            if data.column_names and self.field in data.column_names:
                data = data.select_columns([self.field])
            return iter(data.shuffle(seed=SEED, buffer_size=BUFFER))
        except Exception as error:
            raise LoadingError(self._failure(error)) from error


def text_of(record: Any, field: str, source: str) -> str:
    """The text in a record.

    Args:
        record: Record; must be a mapping with a text in the field.
        field: Name of the field.
        source: Where the record stands, for the error message.

    Raises:
        LoadingError: if there is no text.
    """
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        if not isinstance(record, dict):
            there = f"is no object, but {type(record).__name__}"
        elif field in record:
            there = f"the field {field!r} is no text, but {type(record[field]).__name__}"
        else:
            there = f"has no field {field!r} (it has {', '.join(map(str, record)) or 'none'})"
        raise LoadingError(f"{source}: {there}.")
    return str(record[field])


def _ends_of_files(folder: Path) -> str:
    """SHA-256 over the names, sizes and both ends of the files in a folder; hidden ones play no part."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        size = path.stat().st_size
        digest.update(json.dumps([inside.as_posix(), size]).encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()


def load_corpus(name: str = EMBEDDED) -> Corpus:
    """A corpus by name.

    Args:
        name: ``embedded``; the path of a UTF-8 text file, whose lines are texts, or of a ``.jsonl`` file, whose
            objects have a ``text``, also with ``.gz`` appended; or a Hugging Face data set, ``hf:owner/name`` or
            ``hf:folder``, see `StreamedCorpus.parse`. A data set is opened when it is first read.

    Raises:
        LoadingError: if there is no such file or it holds no text.
    """
    if name.startswith(HUB_PREFIX):
        return StreamedCorpus.parse(name)
    path = embedded_path("data", "text.txt") if name == EMBEDDED else Path(name).expanduser()
    corpus = FileCorpus(name, path)
    if not list(islice(corpus, 1)):
        raise LoadingError(f"The corpus {name!r} holds no text.")
    return corpus
