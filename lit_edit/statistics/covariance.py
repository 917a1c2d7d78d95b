"""The key covariance of projections over a corpus."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_edit.statistics.collecting import Collector, StatisticsError, check_ran_once

ENOUGH = 10
"""Tokens per feature of a key from which on nothing is said about the size of the corpus."""
_BLOCK = 256  # columns that are worth a product of their own


class KeyCovariance(Metric):
    """Second moment of keys, ``C = E[k kᵀ]`` (ROME, section 3.1: the mean is over tokens and is not centred).

    Args:
        features: ``p``, the size of a key.
        **kwargs: As for any :class:`torchmetrics.Metric`.

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
    total: Tensor
    count: Tensor

    def __init__(self, features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if features < 1:
            raise ValueError(f"A key has at least one feature, got {features}.")
        self.features = features
        # Sums of 1e5 tokens and more: float32 would lose the small eigenvalues, which the solvers divide by.
        self.add_state("total", torch.zeros(features, features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, keys: Tensor, mask: Tensor | None = None) -> None:
        """Adds keys.

        Args:
            keys: ``(..., p)``, any floating dtype.
            mask: ``(...)``, nonzero where a key counts; all count without it.

        Raises:
            ValueError: If a shape does not fit or a key that counts is not finite.
        """
        if keys.shape[-1:] != (self.features,):
            raise ValueError(f"Keys must have {self.features} features last, got shape {tuple(keys.shape)}.")
        if mask is not None and mask.shape != keys.shape[:-1]:
            raise ValueError(f"A mask of shape {tuple(mask.shape)} does not fit keys of shape {tuple(keys.shape)}.")
        keys = keys.detach()
        rows = keys.reshape(-1, self.features) if mask is None else keys[mask.to(keys.device, torch.bool)]
        rows = rows.to(self.total)
        if not torch.isfinite(rows).all():
            raise ValueError(f"Keys of shape {tuple(keys.shape)} hold values that are not finite.")
        # It is symmetric: half of it is computed.
        step = max(_BLOCK, self.features // 8)
        for start in range(0, self.features, step):
            stop = start + step
            self.total[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop])
            self.total[start:stop, stop:] = self.total[stop:, start:stop].T
        self.count += len(rows)

    def compute(self) -> Tensor:
        """``C (p, p)`` in float64.

        Raises:
            ValueError: If no key was counted.
        """
        if not self.count:
            raise ValueError("There is no key covariance before a key was counted.")
        return self.total / self.count


class KeyCollector(Collector):
    """Feeds the first positional input ``(..., p)`` of each module to a `KeyCovariance`."""

    kind, label, batch_size, square = "key_covariance", "Key covariance", 16, True

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self._runs: dict[str, int] = {}
        self._mask: Tensor | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Reads the modules' inputs while the block runs."""
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        """Counts the keys of one forward pass."""
        self._mask, self._runs = mask, dict.fromkeys(self.modules, 0)
        # Keys are all below the head, whose logits over the vocabulary would cost most of the memory.
        body = getattr(model, "base_model", model)
        body(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        self._mask = None
        check_ran_once(self._runs)

    def metric(self, shape: tuple[int, ...]) -> KeyCovariance:
        """For ``Σ k kᵀ (p, p)``."""
        metric = KeyCovariance(shape[0])
        metric.update(metric.total[:0])  # torchmetrics warns of what was never updated
        return metric

    def _hook(self, name: str) -> Any:
        def read(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            mask = self._mask
            if mask is None:
                return
            self._runs[name] += 1
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


def warn_if_few(features: Mapping[str, int], tokens: int, stacklevel: int) -> None:
    """Warns of a corpus that is too small.

    Args:
        features: ``p`` by the name of the layer.
        tokens: Number of tokens counted.
        stacklevel: Whose line the warning names, as in :func:`warnings.warn`.
    """
    longer = "Use a longer corpus or count more tokens of it (--model.corpus_tokens)."
    singular = {name: p for name, p in features.items() if tokens < p}
    scarce = {name: p for name, p in features.items() if p <= tokens < ENOUGH * p}
    if singular:
        warnings.warn(
            f"The key covariance was counted over {tokens} tokens, fewer than a key's {_sizes(singular)}: it is "
            f"singular, and solvers that invert it will refuse it. {longer}",
            UserWarning,
            stacklevel=stacklevel,
        )
    if scarce:
        warnings.warn(
            f"The key covariance was counted over {tokens} tokens, fewer than {ENOUGH} for each of a key's "
            f"{_sizes(scarce)}: solvers that invert it move keys along rare directions too far, and AlphaEdit takes "
            f"for free what merely did not come up. {longer}",
            UserWarning,
            stacklevel=stacklevel,
        )


def _sizes(features: Mapping[str, int]) -> str:
    by_size: dict[int, list[str]] = {}
    for name, p in features.items():
        by_size.setdefault(p, []).append(name)
    return ", ".join(f"{p} features in {', '.join(names)}" for p, names in by_size.items())
