"""Statistics as checked files: what they were made from stands in the header, and only the same is read back."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_edit.files import load_tensors, read_metadata, save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 4
COMMAND = "python train.py statistics"
_SAMPLE = 65_536
_METADATA_KEY = "statistics"
_POSITION_KEY = "position"
_REMEDY = "Delete the file to have it computed again."
_FOUND_OUT = ("n_tokens", "texts_sha256")  # known once a collection is done, no part of what is asked for


class StatisticsError(ValueError):
    """Statistics that are missing, damaged, made from something else, or cannot be collected."""


@dataclass(frozen=True)
class Kind:
    """What tells one kind of statistics from another."""

    name: str  # as in a header
    singular: str
    plural: str
    collect_with: str  # the function of this package that collects and keeps it
    square: bool


COVARIANCE = Kind("key_covariance", "covariance", "covariances", "covariances", square=True)
GRADIENT = Kind("lm_gradient", "gradient", "gradients", "gradients", square=False)


@dataclass(frozen=True)
class StatisticsHeader:
    """What a file of statistics was made from; two that differ are not interchangeable.

    Attributes:
        kind: what the tensors are, ``key_covariance`` or ``lm_gradient``.
        model: :func:`model_fingerprint` of the model.
        tokenizer: :func:`tokenizer_fingerprint` of its tokenizer.
        layers: names of the layers, in the order given; the files of :func:`covariances` hold one each.
        corpus: a name for the corpus, for people.
        corpus_sha256: :func:`corpus_sha256` of its texts, or, of a corpus that is not read as a whole, SHA-256 of what
            its texts are drawn from and how.
        max_tokens: the number of tokens asked for.
        sequence_length: the longest sequence, in tokens; a longer text is several sequences, see
            :func:`lit_edit.statistics.collect_covariances`.
        n_tokens: the number of tokens counted: fewer than asked for if the corpus ended; ``None`` in a header of what
            is expected, where any number will do.
        texts_sha256: :func:`corpus_sha256` of the texts that were used, up to the last of which a token counted;
            ``None`` in a header of what is expected.
        dtype: of the stored tensors.
        format_version: of the file.
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
    def file_name(self) -> str:
        """A file name that no header of something else has."""
        identity = json.dumps(asdict(replace(self, n_tokens=None, texts_sha256=None)), sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.safetensors"

    def to_json(self) -> str:
        """The header as JSON text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> StatisticsHeader:
        """Read :meth:`to_json`.

        Raises:
            ValueError: if it is not the JSON text of a header.
        """
        values = json.loads(text)
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"it has not exactly the fields {', '.join(sorted(names))}.")
        return cls(**{**values, "layers": tuple(values["layers"])})

    def differences(self, expected: StatisticsHeader) -> list[str]:
        """One line ``field: found ..., expected ...`` per field that differs."""
        lines = []
        for field in fields(self):
            found, wanted = getattr(self, field.name), getattr(expected, field.name)
            if found != wanted and not (field.name in _FOUND_OUT and wanted is None):
                lines.append(f"{field.name}: found {found!r}, expected {wanted!r}")
        return lines


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the model's parameters: names, shapes, dtypes and values.

    Of the values two things count. One is their sum: all bytes of a parameter, taken as whole numbers of eight bytes,
    modulo 2⁶⁴. It is exact, so that neither the device nor the number of threads plays a part, and a change of a single
    value changes it for certain. The other is a sample of at most 65,536 values, evenly strided, the stride having no
    divisor in common with the length of a row: a sample from a few columns alone would not see a change in the others.
    A tied parameter counts once, under its first name.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().contiguous().reshape(-1)
        stride = max(1, -(-flat.numel() // _SAMPLE))
        while math.gcd(stride, parameter.shape[-1] if parameter.ndim else 1) != 1:
            stride += 1
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype), _sum(flat)]).encode())
        digest.update(flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sum(flat: Tensor) -> int:
    """The sum of a tensor's bytes as little-endian numbers of eight bytes, modulo 2⁶⁴; what is left over is added."""
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    data = flat.view(torch.uint8)
    whole = len(data) // 8 * 8
    left = int.from_bytes(bytes(data[whole:].tolist()), "little")
    return (int(data[:whole].view(torch.int64).sum()) + left) % 2**64


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what a tokenizer does to a text: its backend's definition, or else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    # These two record how the tokenizer was last called.
    definition = {key: value for key, value in definition.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


class TextsHash:
    """SHA-256 over texts and the borders between them, text after text."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, texts: Iterable[str]) -> None:
        """Goes on with more texts."""
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            self._digest.update(len(data).to_bytes(8, "little"))
            self._digest.update(data)

    def hexdigest(self) -> str:
        """The hash of the texts so far."""
        return self._digest.hexdigest()


def corpus_sha256(texts: Iterable[str]) -> str:
    """SHA-256 over texts and the borders between them."""
    digest = TextsHash()
    digest.add(texts)
    return digest.hexdigest()


def save_covariances(path: str | os.PathLike[str], covariances: Mapping[str, Tensor], header: StatisticsHeader) -> None:
    """Write key covariances to one safetensors file, whole or not at all.

    Args:
        path: the file; its folder is made if need be.
        covariances: ``C (p, p)`` by the name of its layer; stored in float64.
        header: what they were made from, with ``n_tokens``.

    Raises:
        StatisticsError: if the header does not describe the covariances.
    """
    save(Path(path), covariances, header, COVARIANCE)


def save_gradients(path: str | os.PathLike[str], gradients: Mapping[str, Tensor], header: StatisticsHeader) -> None:
    """:func:`save_covariances` for gradients: ``∇G (d, p)`` by the name of its layer."""
    save(Path(path), gradients, header, GRADIENT)


def save(path: Path, found: Mapping[str, Tensor], header: StatisticsHeader, kind: Kind) -> None:
    """:func:`save_covariances` for statistics of any kind."""
    if set(found) != set(header.layers):
        raise StatisticsError(
            f"The header of {path} names the layers {sorted(header.layers)}, the {kind.plural} are of {sorted(found)}."
        )
    if header.kind != kind.name:
        raise StatisticsError(
            f"The header of {path} is of kind {header.kind!r}, for {kind.plural} it is {kind.name!r}."
        )
    if header.n_tokens is None:
        raise StatisticsError(f"The header of {path} does not say how many tokens were counted (n_tokens).")
    tensors = {name: matrix.detach().to("cpu", torch.float64).contiguous() for name, matrix in found.items()}
    _check_matrices(path, tensors, kind)
    save_tensors(path, tensors, {_METADATA_KEY: header.to_json()})


def load_covariances(path: str | os.PathLike[str], expected_header: StatisticsHeader) -> dict[str, Tensor]:
    """Read key covariances, if they were made from what is expected.

    Args:
        path: a file by :func:`save_covariances`.
        expected_header: what they should have been made from. Every field counts, ``n_tokens`` unless it is ``None``.

    Returns:
        ``C (p, p)`` in float64 on the CPU, by the name of its layer, in the header's order.

    Raises:
        StatisticsError: if the file is absent, damaged, or made from something else; the message names what differs,
            with both values.
    """
    return load(Path(path), expected_header, COVARIANCE)


def load_gradients(path: str | os.PathLike[str], expected_header: StatisticsHeader) -> dict[str, Tensor]:
    """:func:`load_covariances` for gradients: ``∇G (d, p)`` by the name of its layer."""
    return load(Path(path), expected_header, GRADIENT)


def load(path: Path, expected_header: StatisticsHeader, kind: Kind) -> dict[str, Tensor]:
    """:func:`load_covariances` for statistics of any kind."""
    return read(path, expected_header, kind)[0]


def read(path: Path, expected_header: StatisticsHeader, kind: Kind) -> tuple[dict[str, Tensor], StatisticsHeader]:
    """:func:`load`, with the header of the file."""
    if not path.is_file():
        raise StatisticsError(
            f"There are no statistics at {path}: collect them with `{COMMAND}` or lit_edit.statistics."
            f"{kind.collect_with}."
        )
    header, tensors, _ = _open(path)
    _check(path, header, expected_header, tensors, kind)
    return {name: tensors[name] for name in header.layers}, header


def read_header(path: Path) -> StatisticsHeader | None:
    """The header of a file alone; ``None`` where there is none that can be read."""
    try:
        return StatisticsHeader.from_json(read_metadata(path).get(_METADATA_KEY, "null"))
    except (ValueError, TypeError, RecursionError):
        return None


def _open(path: Path) -> tuple[StatisticsHeader, dict[str, Tensor], dict[str, str]]:
    """Header, tensors and all the metadata of a file that is there."""
    try:
        tensors, metadata = load_tensors(path)
        header = StatisticsHeader.from_json(metadata.get(_METADATA_KEY, "null"))
    except (ValueError, TypeError, RecursionError) as error:
        raise StatisticsError(f"The statistics at {path} cannot be read: {error} {_REMEDY}") from error
    return header, tensors, metadata


def _check(
    path: Path, header: StatisticsHeader, expected: StatisticsHeader, tensors: Mapping[str, Tensor], kind: Kind
) -> None:
    differences = header.differences(expected)
    if differences:
        raise StatisticsError(
            f"The statistics at {path} were made from something else. {'; '.join(differences)}. Delete the file, or "
            "give the run another folder for its statistics."
        )
    if set(tensors) != set(header.layers):
        raise StatisticsError(
            f"The statistics at {path} hold the layers {sorted(tensors)}, the header names {sorted(header.layers)}. "
            f"{_REMEDY}"
        )
    _check_matrices(path, tensors, kind)


def _check_matrices(path: Path, tensors: Mapping[str, Tensor], kind: Kind) -> None:
    for name, matrix in tensors.items():
        fits = matrix.ndim == 2 and (matrix.shape[0] == matrix.shape[1] or not kind.square)
        if matrix.dtype != torch.float64 or not fits:
            raise StatisticsError(
                f"{path}: the {kind.singular} of layer {name!r} must be a {'square ' if kind.square else ''}float64 "
                f"matrix, it is {matrix.dtype} of shape {tuple(matrix.shape)}."
            )
        if not torch.isfinite(matrix.sum()):
            raise StatisticsError(f"{path}: the {kind.singular} of layer {name!r} holds values that are not finite.")
        if kind.square and not _could_be_gram(matrix):
            raise StatisticsError(
                f"{path}: the {kind.singular} of layer {name!r} is no sum of keys kkᵀ: it is not symmetric, or has a "
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


@dataclass(frozen=True)
class Position:
    """How far into a corpus a collection has come.

    Attributes:
        texts: texts of the windows that are done, up to the last of which a token counted.
        sequences: how many sequences of the last of them were counted, if more are to come; 0 if it is used up.
        tokens: tokens counted, in all.
        texts_sha256: :func:`corpus_sha256` of those texts.
        summands: what the sums were taken over: keys, or predicted tokens.
        batches: how many batches of the next window were counted, too.
        ahead: tokens in them.
        window_sha256: :func:`corpus_sha256` of the texts that this window begins, if any of it was counted.
        batch_size: sequences in its batches, then.
    """

    texts: int = 0
    sequences: int = 0
    tokens: int = 0
    texts_sha256: str = ""
    summands: int = 0
    batches: int = 0
    ahead: int = 0
    window_sha256: str = ""
    batch_size: int = 0


@dataclass(frozen=True)
class Partial:
    """The file of a collection that is not done: the sums so far, and how far it has come.

    Attributes:
        path: of the file.
        header: of what is being collected, with all its layers.
        kind: of the statistics.
    """

    path: Path
    header: StatisticsHeader
    kind: Kind

    @classmethod
    def beside(cls, header: StatisticsHeader, folder: Path, kind: Kind) -> Partial:
        """The one for what a header asks for, in a folder."""
        return cls(folder / f"partial-{header.file_name}", header, kind)

    def save(self, sums: Mapping[str, Tensor], position: Position) -> None:
        """Writes the file, whole or not at all.

        Args:
            sums: float64, by the name of the layer; not divided by anything yet.
            position: where they were taken.
        """
        tensors = {name: total.detach().to("cpu", torch.float64).contiguous() for name, total in sums.items()}
        _check_matrices(self.path, tensors, self.kind)
        header = replace(self.header, n_tokens=position.tokens, texts_sha256=position.texts_sha256)
        metadata = {_METADATA_KEY: header.to_json(), _POSITION_KEY: json.dumps(asdict(position), sort_keys=True)}
        save_tensors(self.path, tensors, metadata)

    def load(self) -> tuple[dict[str, Tensor], Position] | None:
        """What :meth:`save` wrote, on the CPU; ``None`` if there is no file.

        Raises:
            StatisticsError: if the file is damaged or of something else.
        """
        if not self.path.is_file():
            return None
        header, tensors, metadata = _open(self.path)
        _check(self.path, header, self.header, tensors, self.kind)
        try:
            position = Position(**json.loads(metadata.get(_POSITION_KEY, "null")))
        except (TypeError, ValueError) as error:
            raise StatisticsError(f"The statistics at {self.path} cannot be read: {error} {_REMEDY}") from error
        return tensors, position

    def remove(self) -> None:
        """Deletes the file, if there is one."""
        self.path.unlink(missing_ok=True)
