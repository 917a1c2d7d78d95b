"""Statistics that are collected once and read from verified files from then on, a file for each layer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_edit.files import load_tensors, read_metadata, save_tensors
from lit_edit.model.fingerprint import model_fingerprint, tokenizer_fingerprint
from lit_edit.program import program
from lit_edit.statistics.collecting import Collector, StatisticsError, collect, gathered, processes
from lit_edit.statistics.covariance import KeyCollector, warn_if_few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 4
_KEY = "statistics"  # of the header in a file's metadata
_REMEDY = "Delete the file to have it computed again."
_FOUND_OUT = ("n_tokens", "texts_sha256")  # known once a collection is done, no part of what is asked for


def cache_folder() -> Path:
    """Where statistics are kept: ``$LIT_EDIT_CACHE``, or ``lit_edit`` in the user's cache folder."""
    if "LIT_EDIT_CACHE" in os.environ:
        return Path(os.environ["LIT_EDIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lit_edit"


@dataclass(frozen=True)
class Header:
    """What a layer's statistics were made from; two that differ are not interchangeable.

    Attributes:
        kind: ``key_covariance`` or ``lm_gradient``.
        model: `model_fingerprint` of the model.
        tokenizer: `tokenizer_fingerprint` of its tokenizer.
        layers: Name of the layer, in a list of one.
        corpus: Name of the corpus, for people.
        corpus_sha256: SHA-256 of its texts, or of what they are drawn from and how (`Corpus.identity`).
        max_tokens: Number of tokens asked for.
        sequence_length: Longest sequence, in tokens.
        n_tokens: Number of tokens counted; None in a header of what is expected.
        texts_sha256: SHA-256 of the texts that were used; None likewise.
        dtype: Of the stored tensor.
        format_version: Of the file.
    """

    kind: str
    model: str
    tokenizer: str
    layers: tuple[str, ...]
    corpus: str
    corpus_sha256: str
    max_tokens: int
    sequence_length: int
    n_tokens: int | None = None
    texts_sha256: str | None = None
    dtype: str = "float64"
    format_version: int = FORMAT_VERSION

    @property
    def identity(self) -> str:
        """What tells it from every header of something else."""
        return json.dumps(asdict(replace(self, n_tokens=None, texts_sha256=None)), sort_keys=True)

    @property
    def file_name(self) -> str:
        """A file name that no header of something else has."""
        return f"{self.kind}-{hashlib.sha256(self.identity.encode()).hexdigest()[:20]}.safetensors"

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Header:
        """The header in a file's metadata.

        Raises:
            ValueError: If there is none.
        """
        values = json.loads(metadata.get(_KEY, "null"))
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"its header has not exactly the fields {', '.join(sorted(names))}.")
        return cls(**{**values, "layers": tuple(values["layers"])})

    def differences(self, expected: Header) -> list[str]:
        """One line ``field: found ..., expected ...`` per field that differs."""
        lines = []
        for field in fields(self):
            found, wanted = getattr(self, field.name), getattr(expected, field.name)
            if found != wanted and not (field.name in _FOUND_OUT and wanted is None):
                lines.append(f"{field.name}: found {found!r}, expected {wanted!r}")
        return lines


def save(path: Path, matrix: Tensor, header: Header) -> None:
    """Writes a layer's statistic, whole or not at all."""
    tensors = {header.layers[0]: matrix.detach().to("cpu", torch.float64).contiguous()}
    _check(path, tensors, header)
    save_tensors(path, tensors, {_KEY: json.dumps(asdict(header), sort_keys=True)})


def load(path: Path, expected: Header) -> tuple[Tensor, Header]:
    """Reads a layer's statistic, if it was made from what is expected.

    Returns:
        The matrix in float64 on the CPU, and the file's header.

    Raises:
        StatisticsError: If the file is damaged or made from something else; the message names what differs.
    """
    try:
        tensors, metadata = load_tensors(path)
        header = Header.of(metadata)
    except (ValueError, TypeError, RecursionError) as error:
        raise StatisticsError(f"The statistics at {path} cannot be read: {error} {_REMEDY}") from error
    differences = header.differences(expected)
    if differences:
        raise StatisticsError(
            f"The statistics at {path} were made from something else. {'; '.join(differences)}. Delete the file, or "
            "give the run another folder for its statistics."
        )
    _check(path, tensors, header)
    return tensors[header.layers[0]], header


def _check(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    if tuple(tensors) != header.layers:
        raise StatisticsError(
            f"The statistics at {path} hold the layers {sorted(tensors)}, the header names {list(header.layers)}. "
            f"{_REMEDY}"
        )
    square = header.kind == KeyCollector.kind
    (name,), (matrix,) = tensors.keys(), tensors.values()
    if matrix.dtype != torch.float64 or matrix.ndim != 2 or (square and matrix.shape[0] != matrix.shape[1]):
        raise StatisticsError(
            f"{path}: the {header.kind} of layer {name!r} must be a {'square ' if square else ''}float64 matrix, it is "
            f"{matrix.dtype} of shape {tuple(matrix.shape)}."
        )
    if not torch.isfinite(matrix.sum()):
        raise StatisticsError(f"{path}: the {header.kind} of layer {name!r} holds values that are not finite.")
    if square and not _could_be_gram(matrix):
        raise StatisticsError(
            f"{path}: the {header.kind} of layer {name!r} is no sum of keys kkᵀ: it is not symmetric, or has a "
            f"negative direction. {_REMEDY}"
        )


def _could_be_gram(matrix: Tensor) -> bool:
    """Whether a matrix is symmetric and no two of its coordinates show a negative direction (``c_ij² ≤ c_ii c_jj``).

    A factorisation would find every negative direction, in minutes for the largest models; solvers make one anyway.
    """
    diagonal = matrix.diagonal()
    if not torch.equal(matrix, matrix.T) or bool((diagonal < 0).any()):
        return False
    root = diagonal.sqrt()
    return all(bool((row.abs() <= 1.000001 * r * root).all()) for row, r in zip(matrix, root, strict=True))


class Statistics:
    """Statistics of one kind over some layers of a model: what is there, and how the rest is collected.

    The name of a layer's file follows from model, tokenizer, layer, corpus and lengths: another choice of layers uses
    what there is, anything else is collected anew.

    Args:
        collector: What is summed up, `KeyCollector` or `GradientCollector`.
        model: A causal language model of ``transformers``, before its first edit.
        tokenizer: Its tokenizer.
        texts: Corpus. One with an ``identity`` (see `lit_edit.statistics.corpora.Corpus`) is known by that; of any
            other all texts are read, to know it by its content.
        corpus_name: Name of the corpus, for people.
        modules: Projections by name.
        folder: Of the files; `cache_folder` if None.
        max_tokens: When to stop.
        sequence_length: Longest sequence, in tokens.

    Attributes:
        headers: What the file of each layer must have been made from; with what was counted, once `get` was called.
        paths: File of each layer.
        partial: File of the sums while the missing layers are being collected.
    """

    def __init__(
        self,
        collector: type[Collector],
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterable[str],
        corpus_name: str,
        modules: Mapping[str, nn.Module],
        folder: str | os.PathLike[str] | None = None,
        *,
        max_tokens: int = 100_000,
        sequence_length: int = 256,
    ) -> None:
        if isinstance(texts, str):
            raise TypeError("texts must be a collection of texts, got a single one.")
        if not modules:
            raise ValueError(f"There are no modules to collect the {collector.label.lower()} for.")
        self.collector, self.model, self.tokenizer, self.modules = collector, model, tokenizer, dict(modules)
        self.texts = list(texts) if iter(texts) is texts else texts
        self.folder = cache_folder() if folder is None else Path(folder)
        identity = getattr(texts, "identity", None)
        if identity is None:
            known = texts_sha256(self.texts)
        else:
            corpus_name, known = getattr(texts, "name", corpus_name), hashlib.sha256(identity.encode()).hexdigest()
        wanted = Header(
            kind=collector.kind,
            model=model_fingerprint(model),
            tokenizer=tokenizer_fingerprint(tokenizer),
            layers=(),
            corpus=corpus_name,
            corpus_sha256=known,
            max_tokens=max_tokens,
            sequence_length=sequence_length,
        )
        self.headers = {name: replace(wanted, layers=(name,)) for name in modules}
        self.paths = {name: self.folder / header.file_name for name, header in self.headers.items()}
        self.wanted = replace(wanted, layers=tuple(self.missing()))
        self.partial = self.folder / f"partial-{self.wanted.file_name}"

    def missing(self) -> list[str]:
        """The layers that have no file."""
        return [name for name, path in self.paths.items() if not path.exists()]

    def get(
        self,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        may_collect: bool = True,
        notify: Callable[[str], None] | None = None,
    ) -> dict[str, Tensor]:
        """The statistics, from their files; the missing ones are collected together and written.

        Where `torch.distributed` runs, all processes have to call this: they share the work, the first one writes.

        Args:
            batch_size: Sequences in a forward pass; the collector's own number if None.
            progress: Show a progress bar.
            may_collect: Whether missing statistics are collected; an error if not.
            notify: Told how long a collection of more than a minute will take.

        Returns:
            Matrices in float64 on the model's device, by the names of the modules.

        Raises:
            StatisticsError: If statistics are missing and may not be collected, cannot be collected, or a file cannot
                be read: it is not silently replaced.

        Warns:
            UserWarning: If key covariances were counted over fewer than ten tokens for each feature of a key.
        """
        found = {}
        device = next(self.model.parameters()).device
        absent = {name for names in gathered(self.missing()) for name in names}
        missing = [name for name in self.modules if name in absent]
        for name, path in self.paths.items():
            if name not in missing:
                matrix, self.headers[name] = load(path, self.headers[name])
                found[name] = matrix.to(device)
        if missing and not may_collect:
            raise StatisticsError(self._absence(missing))
        if missing:
            collected, counted = collect(
                self.collector({name: self.modules[name] for name in missing}),
                self.model,
                self.tokenizer,
                self.texts,
                max_tokens=self.wanted.max_tokens,
                sequence_length=self.wanted.sequence_length,
                batch_size=batch_size,
                progress=progress,
                notify=notify,
                partial=self.partial,
                identity=self.wanted.identity,
            )
            for name, matrix in collected.items():
                self.headers[name] = replace(
                    self.headers[name], n_tokens=counted.tokens, texts_sha256=counted.texts_sha256
                )
                if processes()[0] == 0:
                    save(self.paths[name], matrix, self.headers[name])
            if processes()[0] == 0:
                self.partial.unlink(missing_ok=True)
            gathered(None)  # none goes on before the files are there
            found |= collected
        if self.collector.kind == KeyCollector.kind:
            by_tokens: dict[int, dict[str, int]] = {}
            for name, header in self.headers.items():
                by_tokens.setdefault(header.n_tokens or 0, {})[name] = len(found[name])
            for tokens, features in by_tokens.items():
                warn_if_few(features, tokens, stacklevel=3)
        return {name: found[name] for name in self.modules}

    def _absence(self, missing: list[str]) -> str:
        """What is not there, how to make it, and how the nearest thing that is there differs."""
        said = (
            f"There is no {self.collector.label.lower()} of {', '.join(missing)} over {self.wanted.max_tokens} tokens "
            f"of the corpus {self.wanted.corpus!r} in {self.folder}: collect it with "
            f"`{program()} statistics` and the options of this run"
        )
        wanted = self.headers[missing[0]]
        differences: list[list[str]] = []
        for path in sorted(self.folder.glob(f"{self.collector.kind}-*.safetensors")):
            try:
                other = Header.of(read_metadata(path))
            except (ValueError, TypeError, RecursionError):  # it is listed only, and no statistics are no news here
                continue
            if other.layers == wanted.layers:
                differences.append(other.differences(wanted))
        if not differences:
            return f"{said}."
        nearest = sorted(differences, key=len)[0]
        return f"{said}. The nearest there are were made from something else. {'; '.join(nearest)}."


def texts_sha256(texts: Iterable[str]) -> str:
    """SHA-256 over texts and the borders between them."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
