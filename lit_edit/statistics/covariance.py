"""The key covariance of projections over a corpus."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_edit.statistics.collect import Collector, Pace, collect
from lit_edit.statistics.files import StatisticsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENOUGH = 10
"""Tokens per feature of a key from which on nothing is said about the size of the corpus."""
_BLOCK = 256  # columns that are worth a product of their own


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
        # It is symmetric: half of it is computed.
        step = max(_BLOCK, self.features // 8)
        for start in range(0, self.features, step):
            stop = start + step
            self.gram[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop])
            self.gram[start:stop, stop:] = self.gram[stop:, start:stop].T
        self.count += len(rows)

    def compute(self) -> Tensor:
        """``C (p, p)`` in float64.

        Raises:
            ValueError: if no key was counted.
        """
        if not self.count:
            raise ValueError("There is no key covariance before a key was counted.")
        return self.gram / self.count


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

    Each text is one sequence; one of more than ``sequence_length`` tokens is several, one after the other, each with
    what the tokenizer adds to a text, BOS for one, and none sees the one before. Every token counts, special ones
    included, up to ``max_tokens`` in all. Where `torch.distributed` runs, the processes share the batches, and all get
    the covariance over the whole. The model runs in evaluation mode and in its own precision, the sums are taken in
    float64, and the model is left as it was.

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
        UserWarning: if fewer tokens were counted than a key has features, or fewer than ten for each.
    """
    if not modules:
        raise ValueError("There are no modules to collect key covariances for.")
    pace = Pace(max_tokens, sequence_length, batch_size, progress)
    found, position = collect(model, tokenizer, texts, modules, KeyCollector, pace)
    warn_if_few({name: len(matrix) for name, matrix in found.items()}, position.tokens, stacklevel=3)
    return found


def warn_if_few(features: Mapping[str, int], tokens: int, stacklevel: int) -> None:
    """Says what a corpus is too small for.

    Args:
        features: ``p`` by the name of the layer.
        tokens: the number of tokens counted.
        stacklevel: whose line the warning names, as in :func:`warnings.warn`.
    """
    singular = {name: p for name, p in features.items() if tokens < p}
    scarce = {name: p for name, p in features.items() if p <= tokens < ENOUGH * p}
    if singular:
        warnings.warn(
            f"The key covariance was counted over {tokens} tokens, fewer than a key's {_sizes(singular)}: it is "
            f"singular, and solvers that invert it will refuse it. {_LONGER}",
            UserWarning,
            stacklevel=stacklevel,
        )
    if scarce:
        warnings.warn(
            f"The key covariance was counted over {tokens} tokens, fewer than {ENOUGH} for each of a key's "
            f"{_sizes(scarce)}: its small eigenvalues are too small, so that solvers that invert it move keys along "
            f"rare directions too far, and AlphaEdit takes for free what merely did not come up. {_LONGER}",
            UserWarning,
            stacklevel=stacklevel,
        )


_LONGER = "Use a longer corpus or count more tokens of it (max_tokens, --model.corpus_tokens)."


def _sizes(features: Mapping[str, int]) -> str:
    by_size: dict[int, list[str]] = {}
    for name, p in features.items():
        by_size.setdefault(p, []).append(name)
    return ", ".join(f"{p} features in {', '.join(names)}" for p, names in by_size.items())


class KeyCollector(Collector):
    """Forward pre-hooks that feed the inputs of modules to one :class:`KeyCovariance` each."""

    label = "Key covariance"
    empty = "The corpus for the key covariance has no token."

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self._seen: list[str] = []
        self._mask: Tensor | None = None
        self._handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]

    def remove(self) -> None:
        """Takes the hooks off the modules."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def add(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        """Counts the keys of one forward pass."""
        # The keys are all below the language-model head, whose logits over the vocabulary would cost most of the
        # memory.
        body = getattr(model, "base_model", model)
        with self._listening(mask):
            body(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        self.summands += int(mask.sum())

    def metric(self, shape: tuple[int, ...]) -> KeyCovariance:
        """For ``Σ k kᵀ (p, p)``."""
        metric = KeyCovariance(shape[0])
        metric.update(metric.gram[:0])  # torchmetrics warns of what was never updated
        return metric

    def total(self, metric: Metric) -> Tensor:
        """``Σ k kᵀ (p, p)``."""
        gram: Tensor = metric.gram  # type: ignore[assignment]
        return gram

    @contextmanager
    def _listening(self, mask: Tensor) -> Iterator[None]:
        """Count the keys of one forward pass.

        Args:
            mask: ``(B, L)``, true for the tokens that count.

        Raises:
            StatisticsError: naming the modules that did not run exactly once.
        """
        self._mask, self._seen = mask, []
        yield
        self._mask = None
        self.check_ran_once({name: self._seen.count(name) for name in self.names})

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
                self.metrics[name] = self.metric((keys.shape[-1],) * 2).to(keys.device)
            self.metrics[name].update(keys.reshape(*mask.shape, keys.shape[-1]), mask)

        return read
