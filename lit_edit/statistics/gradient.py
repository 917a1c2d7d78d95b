"""The gradient of a model's language-model loss over a corpus, with respect to weights of projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_edit.statistics.collecting import Collector, StatisticsError, check_ran_once


class WeightGradient(Metric):
    """Mean gradient of a loss with respect to the weight of a linear projection, ``∇G = Σ g xᵀ / n``.

    Args:
        outputs: ``d``, the size of what the projection gives.
        inputs: ``p``, the size of what it is given.
        **kwargs: As for any :class:`torchmetrics.Metric`.

    Example:
        >>> metric = WeightGradient(1, 2)
        >>> metric.update(torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]]), 2)
        >>> metric.compute()
        tensor([[1.5000, 1.0000]], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, outputs: int, inputs: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min(outputs, inputs) < 1:
            raise ValueError(f"A weight has at least one row and one column, got {outputs} and {inputs}.")
        self.outputs, self.inputs = outputs, inputs
        self.add_state("total", torch.zeros(outputs, inputs, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, slopes: Tensor, inputs: Tensor, summands: int) -> None:
        """Adds tokens.

        Args:
            slopes: ``g (..., d)``, the gradient of the summed loss at the projection's outputs.
            inputs: ``x (..., p)``, what the projection was given there.
            summands: Number of summands of the loss.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if slopes.shape != (*inputs.shape[:-1], self.outputs) or inputs.shape[-1] != self.inputs:
            raise ValueError(
                f"For a weight of {self.outputs} rows and {self.inputs} columns, slopes of shape {tuple(slopes.shape)} "
                f"do not fit inputs of shape {tuple(inputs.shape)}."
            )
        g, x = slopes.detach().to(self.total).flatten(0, -2), inputs.detach().to(self.total).flatten(0, -2)
        self.total += g.T @ x
        self.count += summands

    def compute(self) -> Tensor:
        """``∇G (d, p)`` in float64.

        Raises:
            ValueError: If there was no summand.
        """
        if not self.count:
            raise ValueError("There is no gradient of a mean over no summand.")
        return self.total / self.count


class GradientCollector(Collector):
    """The gradient of the mean next-token loss with respect to each module's weight, ``∇G (d, p)``.

    The model's weights need no gradient: zeros are added to the modules' outputs and the loss is derived by these. With
    ``x`` the inputs and ``g`` the loss's gradient at the outputs, ``∇G = Σ g xᵀ``, however the weight is stored.
    """

    kind, label, batch_size, square = "lm_gradient", "Gradient", 4, False

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self._runs: dict[str, list[tuple[Tensor, Tensor]]] | None = None  # inputs and added zeros

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watches the modules while the block runs."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        """Adds the gradient of one forward and backward pass."""
        if ids.shape[1] < 2:
            return
        wanted = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        runs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.modules}
        self._runs = runs
        with torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted.flatten(), reduction="sum")
        self._runs = None
        check_ran_once({name: len(found) for name, found in runs.items()})
        slopes = torch.autograd.grad(loss, [found[0][1] for found in runs.values()])
        for (name, [(inputs, _)]), slope in zip(runs.items(), slopes, strict=True):
            if name not in self.metrics:
                self.metrics[name] = self.metric((slope.shape[-1], inputs.shape[-1])).to(slope.device)
            self.metrics[name].update(slope, inputs, int((wanted != -100).sum()))

    def metric(self, shape: tuple[int, ...]) -> WeightGradient:
        """For ``Σ g xᵀ (d, p)``."""
        metric = WeightGradient(*shape)
        metric.update(torch.zeros(0, shape[0]), torch.zeros(0, shape[1]), 0)  # or torchmetrics warns that it never was
        return metric

    def _hook(self, name: str) -> Any:
        def add_zeros(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if self._runs is None:
                return None
            if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
                raise StatisticsError(f"Module {name!r} should be a linear projection: one tensor in, one tensor out.")
            zeros = torch.zeros_like(output).requires_grad_(True)
            self._runs[name].append((inputs[0].detach(), zeros))
            return output + zeros

        return add_zeros
