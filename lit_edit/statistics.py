"""Statistics of a model over a corpus: key covariances, and the gradient of the language-model loss.

Each is kept in a checked file, and used again only for what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
_SAMPLE = 65_536
_METADATA_KEY = "statistics"


class StatisticsError(ValueError):
    """Statistics that are missing, damaged, made from something else, or cannot be collected."""


class KeyCovariance(Metric):
    """Second moment of keys, ``C = E[k kᵀ]`` (ROME, section 3.1: the mean is over tokens and is not centred).

    Args:
        features: ``p``, the size of a key.
        **kwargs: as for any :class:`torchmetrics.Metric`.

    Example:
        >>> metric = KeyCovariance(2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> metric.compute()
        tensor([[1., 1.],
                [1., 2.]], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    gram: Tensor
    count: Tensor

    def __init__(self, features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if features < 1:
            raise ValueError(f"A key has at least one feature, got {features}.")
        self.features = features
        # Sums of 1e5 tokens and more: float32 would lose the small eigenvalues, which the solvers divide by.
        self.add_state("gram", torch.zeros(features, features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, keys: Tensor, mask: Tensor | None = None) -> None:
        """Add keys.

        Args:
            keys: ``(..., p)``, any floating dtype.
            mask: ``(...)``, nonzero where a key counts; all count without it.

        Raises:
            ValueError: if a shape does not fit or a key that counts is not finite.
        """
        if keys.shape[-1:] != (self.features,):
            raise ValueError(f"Keys must have {self.features} features last, got shape {tuple(keys.shape)}.")
        if mask is not None and mask.shape != keys.shape[:-1]:
            raise ValueError(f"A mask of shape {tuple(mask.shape)} does not fit keys of shape {tuple(keys.shape)}.")
        keys = keys.detach()
        rows = keys.reshape(-1, self.features) if mask is None else keys[mask.to(keys.device, torch.bool)]
        rows = rows.to(self.gram)
        if not torch.isfinite(rows).all():
            raise ValueError(f"Keys of shape {tuple(keys.shape)} hold values that are not finite.")
        self.gram += rows.T @ rows
        self.count += len(rows)

    def compute(self) -> Tensor:
        """``C (p, p)`` in float64.

        Raises:
            ValueError: if no key was counted.
        """
        if not self.count:
            raise ValueError("There is no key covariance before a key was counted.")
        return self.gram / self.count


@dataclass(frozen=True)
class _Kind:
    """What tells one kind of statistics from another."""

    name: str  # as in a header
    singular: str
    plural: str
    collect_with: str  # the function of this module that collects and keeps it
    square: bool


_COVARIANCE = _Kind("key_covariance", "covariance", "covariances", "covariances", square=True)
_GRADIENT = _Kind("lm_gradient", "gradient", "gradients", "gradients", square=False)


@dataclass(frozen=True)
class StatisticsHeader:
    """What a file of statistics was made from; two that differ are not interchangeable.

    Attributes:
        kind: what the tensors are, ``key_covariance`` or ``lm_gradient``.
        model: :func:`model_fingerprint` of the model.
        tokenizer: :func:`tokenizer_fingerprint` of its tokenizer.
        layers: names of the layers, in the order given.
        corpus: a name for the corpus, for people.
        corpus_sha256: :func:`corpus_sha256` of its texts.
        max_tokens: the number of tokens asked for.
        sequence_length: texts were cut to this many tokens.
        n_tokens: the number of tokens counted: fewer than asked for if the corpus ended; ``None`` in a header of what
            is expected, where any number will do.
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
    dtype: str = "float64"
    format_version: int = FORMAT_VERSION

    @property
    def file_name(self) -> str:
        """A file name that no header of something else has."""
        identity = json.dumps(asdict(replace(self, n_tokens=None)), sort_keys=True)
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
            if found != wanted and not (field.name == "n_tokens" and wanted is None):
                lines.append(f"{field.name}: found {found!r}, expected {wanted!r}")
        return lines


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the model's parameters: names, shapes, dtypes and values.

    Of a parameter with more than 65,536 values an evenly strided sample of at most that many counts, which any dense
    edit or training step changes. The device plays no part; a tied parameter counts once, under its first name.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // _SAMPLE))].cpu().contiguous()
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what a tokenizer does to a text: its backend's definition, or else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    # These two record how the tokenizer was last called.
    definition = {key: value for key, value in definition.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def corpus_sha256(texts: Iterable[str]) -> str:
    """SHA-256 over texts and the borders between them."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
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
    _save(Path(path), covariances, header, _COVARIANCE)


def save_gradients(path: str | os.PathLike[str], gradients: Mapping[str, Tensor], header: StatisticsHeader) -> None:
    """:func:`save_covariances` for gradients: ``∇G (d, p)`` by the name of its layer."""
    _save(Path(path), gradients, header, _GRADIENT)


def _save(path: Path, found: Mapping[str, Tensor], header: StatisticsHeader, kind: _Kind) -> None:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a file can be replaced in one step only within a file system.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        save_file(tensors, draft, metadata={_METADATA_KEY: header.to_json()})
        os.replace(draft, path)


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
    return _load(Path(path), expected_header, _COVARIANCE)


def load_gradients(path: str | os.PathLike[str], expected_header: StatisticsHeader) -> dict[str, Tensor]:
    """:func:`load_covariances` for gradients: ``∇G (d, p)`` by the name of its layer."""
    return _load(Path(path), expected_header, _GRADIENT)


def _load(path: Path, expected_header: StatisticsHeader, kind: _Kind) -> dict[str, Tensor]:
    if not path.is_file():
        raise StatisticsError(
            f"There are no statistics at {path}: collect them with lit_edit.statistics.{kind.collect_with}."
        )
    remedy = "Delete the file to have it computed again."
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = StatisticsHeader.from_json((file.metadata() or {}).get(_METADATA_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise StatisticsError(f"The statistics at {path} cannot be read: {error} {remedy}") from error
    differences = header.differences(expected_header)
    if differences:
        raise StatisticsError(
            f"The statistics at {path} were made from something else. {'; '.join(differences)}. Delete the file, or "
            "give the run another folder for its statistics."
        )
    if set(tensors) != set(header.layers):
        raise StatisticsError(
            f"The statistics at {path} hold the layers {sorted(tensors)}, the header names {sorted(header.layers)}. "
            f"{remedy}"
        )
    _check_matrices(path, tensors, kind)
    return {name: tensors[name] for name in header.layers}


def _check_matrices(path: Path, tensors: Mapping[str, Tensor], kind: _Kind) -> None:
    for name, matrix in tensors.items():
        fits = matrix.ndim == 2 and (matrix.shape[0] == matrix.shape[1] or not kind.square)
        if matrix.dtype != torch.float64 or not fits:
            raise StatisticsError(
                f"{path}: the {kind.singular} of layer {name!r} must be a {'square ' if kind.square else ''}float64 "
                f"matrix, it is {matrix.dtype} of shape {tuple(matrix.shape)}."
            )
        if not torch.isfinite(matrix.sum()):
            raise StatisticsError(f"{path}: the {kind.singular} of layer {name!r} holds values that are not finite.")


def collect_covariances(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    modules: Mapping[str, nn.Module],
    *,
    max_tokens: int = 100_000,
    sequence_length: int = 256,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Run a model over a corpus and collect the covariance of the inputs of some of its modules.

    Each text is one sequence, cut to ``sequence_length`` tokens. Every token counts, special ones included, up to
    ``max_tokens`` in all. The model runs in evaluation mode and is left as it was.

    Args:
        model: a causal language model of ``transformers``, or a module called in the same way.
        tokenizer: its tokenizer.
        texts: the corpus; read only as far as needed.
        modules: the projections by name; the first positional input ``(..., p)`` of each is its key.
        max_tokens: when to stop. Without more tokens than ``p`` the covariance is singular.
        sequence_length: longest sequence, in tokens.
        batch_size: sequences in a forward pass.
        progress: show a progress bar.

    Returns:
        ``C (p, p)`` in float64 on the model's device, by the names of ``modules``.

    Raises:
        StatisticsError: if the corpus has no token, the sequences are too long for the model, or a module does not see
            every token exactly once.

    Warns:
        UserWarning: if fewer tokens were counted than a key has features.
    """
    return _collect(model, tokenizer, texts, modules, max_tokens, sequence_length, batch_size, progress)[0]


@torch.no_grad()
def _collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    modules: Mapping[str, nn.Module],
    max_tokens: int,
    sequence_length: int,
    batch_size: int,
    progress: bool,
) -> tuple[dict[str, Tensor], int]:
    """:func:`collect_covariances`, with the number of tokens counted."""
    _check_collection(model, texts, modules, "key covariances", max_tokens, sequence_length, batch_size)
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    # The keys are all below the language-model head, whose logits over the vocabulary would cost most of the memory.
    body = getattr(model, "base_model", model)
    counted = 0
    tap = _KeyTap(modules)
    try:
        model.eval()
        with tqdm(total=max_tokens, unit="token", desc="Key covariance", disable=not progress) as bar:
            for rows in _batches(_sequences(tokenizer, texts, max_tokens, sequence_length), batch_size):
                ids, mask = _pad(rows, device)
                with tap.listening(mask):
                    body(input_ids=ids, attention_mask=mask.long(), use_cache=False)
                tokens = sum(map(len, rows))
                counted += tokens
                bar.update(tokens)
    finally:
        tap.remove()
        for module, training in modes.items():
            module.training = training
    if not counted:
        raise StatisticsError("The corpus for the key covariance has no token.")
    covariances = {name: metric.compute() for name, metric in tap.metrics.items()}
    features = {name: len(matrix) for name, matrix in covariances.items() if len(matrix) > counted}
    if features:
        warnings.warn(
            f"The key covariance was counted over {counted} tokens, fewer than a key's "
            f"{', '.join(f'{p} features in {name}' for name, p in features.items())}: it is singular, and solvers that "
            "invert it will refuse it. Use a longer corpus or raise max_tokens.",
            UserWarning,
            stacklevel=4,  # past this function and its decorator to whoever called the public one
        )
    return covariances, counted


def _check_collection(
    model: nn.Module,
    texts: Iterable[str],
    modules: Mapping[str, nn.Module],
    wanted: str,
    max_tokens: int,
    sequence_length: int,
    batch_size: int,
) -> None:
    if isinstance(texts, str):
        raise TypeError("texts must be a collection of texts, got a single one.")
    if not modules:
        raise ValueError(f"There are no modules to collect {wanted} for.")
    for name, value in (("max_tokens", max_tokens), ("sequence_length", sequence_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise StatisticsError(f"sequence_length is {sequence_length}, the model takes {longest} tokens at most.")


class _KeyTap:
    """Forward pre-hooks that feed the inputs of modules to one :class:`KeyCovariance` each."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.names = tuple(modules)
        self.metrics: dict[str, KeyCovariance] = {}
        self._seen: list[str] = []
        self._mask: Tensor | None = None
        self._handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def listening(self, mask: Tensor) -> Iterator[None]:
        """Count the keys of one forward pass.

        Args:
            mask: ``(B, L)``, true for the tokens that count.

        Raises:
            StatisticsError: naming the modules that did not run exactly once.
        """
        self._mask, self._seen = mask, []
        yield
        self._mask = None
        wrong = [f"{name} ran {self._seen.count(name)} times" for name in self.names if self._seen.count(name) != 1]
        if wrong:
            raise StatisticsError(
                f"In one forward pass each module must see every token once, but {', '.join(wrong)}. Are these the "
                "projections of this very model?"
            )

    def _hook(self, name: str) -> Any:
        def read(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            mask = self._mask
            if mask is None:
                return
            self._seen.append(name)
            keys = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            # Some models flatten batch and sequence before the MLP.
            if keys is None or keys.ndim < 2 or keys.numel() != mask.numel() * keys.shape[-1]:
                found = "no tensor" if keys is None else f"shape {tuple(keys.shape)}"
                raise StatisticsError(
                    f"The input of module {name!r} should be a key for each of {tuple(mask.shape)} tokens, got {found}."
                )
            if name not in self.metrics:
                self.metrics[name] = KeyCovariance(keys.shape[-1]).to(keys.device)
            self.metrics[name].update(keys.reshape(*mask.shape, keys.shape[-1]), mask)

        return read


def _sequences(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_tokens: int, sequence_length: int
) -> Iterator[list[int]]:
    """Token ids of each text, cut to length, until ``max_tokens`` are out; texts without tokens are passed over."""
    left = max_tokens
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=sequence_length)["input_ids"][:left]
        if ids:
            yield ids
            left -= len(ids)
        if not left:
            return


def _batches(rows: Iterable[list[int]], size: int) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the right and the mask of real tokens, both ``(B, L)``.

    Under causal attention what stands to the right of a token cannot reach it, so any id will do as padding, and a
    tokenizer needs none.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device)[None] < lengths[:, None]


def covariances(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    corpus_name: str,
    modules: Mapping[str, nn.Module],
    cache_dir: str | os.PathLike[str],
    *,
    max_tokens: int = 100_000,
    sequence_length: int = 256,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, Tensor]:
    """:func:`collect_covariances` the first time, the checked file from then on.

    The file's name follows from model, tokenizer, corpus, layers and lengths, so anything else than what was collected
    before is collected anew, into a file of its own. All texts are read, to know the corpus by its content.

    Args:
        model: as in :func:`collect_covariances`; collect before the first edit.
        tokenizer: its tokenizer.
        texts: the corpus.
        corpus_name: a name for it, for people.
        modules: the projections by name.
        cache_dir: folder of the files.
        max_tokens: when to stop.
        sequence_length: longest sequence, in tokens.
        batch_size: sequences in a forward pass.
        progress: show a progress bar.

    Returns:
        ``C (p, p)`` in float64 on the model's device, by the names of ``modules``.

    Raises:
        StatisticsError: as :func:`collect_covariances`, and if the file cannot be read; it is not silently replaced.
    """
    texts = _listed(texts)
    path, header = _file(
        _COVARIANCE, model, tokenizer, texts, corpus_name, modules, cache_dir, max_tokens, sequence_length
    )
    if path.exists():
        return _load_beside(model, path, header, _COVARIANCE)
    collected, counted = _collect(model, tokenizer, texts, modules, max_tokens, sequence_length, batch_size, progress)
    _save(path, collected, replace(header, n_tokens=counted), _COVARIANCE)
    return collected


def gradients(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    corpus_name: str,
    modules: Mapping[str, nn.Module],
    cache_dir: str | os.PathLike[str],
    *,
    max_tokens: int = 100_000,
    sequence_length: int = 256,
    batch_size: int = 4,
    progress: bool = False,
) -> dict[str, Tensor]:
    """:func:`collect_gradients` the first time, the checked file from then on, as :func:`covariances`.

    Returns:
        ``∇G (d, p)`` in float64 on the model's device, by the names of ``modules``.

    Raises:
        StatisticsError: as :func:`collect_gradients`, and if the file cannot be read; it is not silently replaced.
    """
    texts = _listed(texts)
    path, header = _file(
        _GRADIENT, model, tokenizer, texts, corpus_name, modules, cache_dir, max_tokens, sequence_length
    )
    if path.exists():
        return _load_beside(model, path, header, _GRADIENT)
    collected, counted = _collect_gradients(
        model, tokenizer, texts, modules, max_tokens, sequence_length, batch_size, progress
    )
    _save(path, collected, replace(header, n_tokens=counted), _GRADIENT)
    return collected


def _listed(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts must be a collection of texts, got a single one.")
    return list(texts)


def _file(
    kind: _Kind,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    corpus_name: str,
    modules: Mapping[str, nn.Module],
    cache_dir: str | os.PathLike[str],
    max_tokens: int,
    sequence_length: int,
) -> tuple[Path, StatisticsHeader]:
    """Where statistics of just this kind, model, corpus and size are kept, and the header they must have."""
    header = StatisticsHeader(
        kind=kind.name,
        model=model_fingerprint(model),
        tokenizer=tokenizer_fingerprint(tokenizer),
        layers=tuple(modules),
        corpus=corpus_name,
        corpus_sha256=corpus_sha256(texts),
        max_tokens=max_tokens,
        sequence_length=sequence_length,
    )
    return Path(cache_dir) / header.file_name, header


def _load_beside(model: nn.Module, path: Path, header: StatisticsHeader, kind: _Kind) -> dict[str, Tensor]:
    """What a file holds, on the model's device."""
    device = next(model.parameters()).device
    return {name: matrix.to(device) for name, matrix in _load(path, header, kind).items()}


def collect_gradients(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    modules: Mapping[str, nn.Module],
    *,
    max_tokens: int = 100_000,
    sequence_length: int = 256,
    batch_size: int = 4,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The gradient of a model's language-model loss over a corpus with respect to weights of some of its modules.

    O-Edit's ``∇G`` (Cai and Cao 2024, section 3.2.2), taken once on the unedited model: the directions in which it
    would learn on from the text. The loss is the mean negative log-likelihood over all predicted tokens of the corpus,
    each text a sequence of its own, cut to ``sequence_length`` tokens; its first token is not predicted. (The paper
    sums over the corpus, which gives the same directions.) No weight is touched and none needs to require a gradient:
    with ``x`` the module's inputs and ``g`` the loss's gradient at its outputs, ``∇G = Σ g xᵀ``.

    The model runs in evaluation mode, forward and backward once, and is left as it was.

    Args:
        model: a causal language model of ``transformers``, or a module called in the same way.
        tokenizer: its tokenizer.
        texts: the corpus; read only as far as needed.
        modules: linear projections by name, whether they store ``W`` or its transpose; the first positional input of
            each is ``(..., p)``, its output ``(..., d)``.
        max_tokens: when to stop, in tokens read.
        sequence_length: longest sequence, in tokens.
        batch_size: sequences in a forward and backward pass.
        progress: show a progress bar.

    Returns:
        ``∇G (d, p)`` in float64 on the model's device, by the names of ``modules``.

    Raises:
        StatisticsError: if no text has two tokens, the sequences are too long for the model, a module does not run
            exactly once in a pass, or a gradient is not finite.
    """
    return _collect_gradients(model, tokenizer, texts, modules, max_tokens, sequence_length, batch_size, progress)[0]


def _collect_gradients(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    modules: Mapping[str, nn.Module],
    max_tokens: int,
    sequence_length: int,
    batch_size: int,
    progress: bool,
) -> tuple[dict[str, Tensor], int]:
    """:func:`collect_gradients`, with the number of tokens read."""
    _check_collection(model, texts, modules, "gradients", max_tokens, sequence_length, batch_size)
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    counted = predicted = 0
    sums: dict[str, Tensor] = {}
    tap = _GradientTap(modules)
    try:
        model.eval()
        with tqdm(total=max_tokens, unit="token", desc="Gradient", disable=not progress) as bar:
            for rows in _batches(_sequences(tokenizer, texts, max_tokens, sequence_length), batch_size):
                ids, mask = _pad(rows, device)
                tokens = sum(map(len, rows))
                counted += tokens
                bar.update(tokens)
                if ids.shape[1] < 2:
                    continue
                wanted = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
                predicted += int((wanted != -100).sum())
                with torch.enable_grad(), tap.listening():
                    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
                    loss = nn.functional.cross_entropy(
                        logits[:, :-1].float().flatten(0, 1), wanted.flatten(), reduction="sum"
                    )
                for name, gradient in tap.gradients(loss).items():
                    sums[name] = sums[name] + gradient if name in sums else gradient
    finally:
        tap.remove()
        for module, training in modes.items():
            module.training = training
    if not predicted:
        raise StatisticsError("The corpus for the gradient has no text of two tokens, of which one can be predicted.")
    for name, total in sums.items():
        if not torch.isfinite(total.sum()):
            raise StatisticsError(f"The gradient of module {name!r} holds values that are not finite.")
    return {name: sums[name] / predicted for name in modules}, counted


class _GradientTap:
    """Forward hooks that keep the inputs of modules, and add zeros to their outputs that a loss is derived by."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.names = tuple(modules)
        self._on = False
        self._runs: dict[str, list[tuple[Tensor, Tensor]]] = {}  # inputs and added zeros
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch one forward pass.

        Raises:
            StatisticsError: naming the modules that did not run exactly once.
        """
        self._on, self._runs = True, {name: [] for name in self.names}
        yield
        self._on = False
        wrong = [f"{name} ran {len(runs)} times" for name, runs in self._runs.items() if len(runs) != 1]
        if wrong:
            raise StatisticsError(
                f"In one forward pass each module must see every token once, but {', '.join(wrong)}. Are these the "
                "projections of this very model?"
            )

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """``Σ g xᵀ (d, p)`` in float64 for every module, of a loss of the pass that was watched."""
        runs = {name: runs[0] for name, runs in self._runs.items()}
        slopes = torch.autograd.grad(loss, [zeros for _, zeros in runs.values()])
        self._runs = {}
        found = {}
        for (name, (inputs, _)), slope in zip(runs.items(), slopes, strict=True):
            x, g = inputs.to(torch.float64).flatten(0, -2), slope.to(torch.float64).flatten(0, -2)
            found[name] = g.T @ x
        return found

    def _hook(self, name: str) -> Any:
        def add_zeros(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not self._on:
                return None
            if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
                raise StatisticsError(f"Module {name!r} should be a linear projection: one tensor in, one tensor out.")
            zeros = torch.zeros_like(output).requires_grad_(True)
            self._runs[name].append((inputs[0].detach(), zeros))
            return output + zeros

        return add_zeros
