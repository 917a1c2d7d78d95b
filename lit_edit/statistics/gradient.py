"""The gradient of a model's language-model loss over a corpus, with respect to weights of projections."""

from __future__ import annotations

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


class WeightGradient(Metric):
    """Mean gradient of a loss with respect to the weight of a linear projection, ``∇G = Σ g xᵀ / n``.

    Args:
        outputs: ``d``, the size of what the projection gives.
        inputs: ``p``, the size of what it is given.
        **kwargs: as for any :class:`torchmetrics.Metric`.

    Example:
        >>> metric = WeightGradient(1, 2)
        >>> metric.update(torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]]), 2)
        >>> metric.compute()
        tensor([[1.5000, 1.0000]], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    gradient: Tensor
    count: Tensor

    def __init__(self, outputs: int, inputs: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min(outputs, inputs) < 1:
            raise ValueError(f"A weight has at least one row and one column, got {outputs} and {inputs}.")
        self.outputs, self.inputs = outputs, inputs
        self.add_state("gradient", torch.zeros(outputs, inputs, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, slopes: Tensor, inputs: Tensor, summands: int) -> None:
        """Add tokens.

        Args:
            slopes: ``g (..., d)``, the gradient of the summed loss at the projection's outputs.
            inputs: ``x (..., p)``, what the projection was given there.
            summands: the number of summands of the loss.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if slopes.shape != (*inputs.shape[:-1], self.outputs) or inputs.shape[-1] != self.inputs:
            raise ValueError(
                f"For a weight of {self.outputs} rows and {self.inputs} columns, slopes of shape {tuple(slopes.shape)} "
                f"do not fit inputs of shape {tuple(inputs.shape)}."
            )
        g, x = slopes.detach().to(self.gradient).flatten(0, -2), inputs.detach().to(self.gradient).flatten(0, -2)
        self.gradient += g.T @ x
        self.count += summands

    def compute(self) -> Tensor:
        """``∇G (d, p)`` in float64.

        Raises:
            ValueError: if there was no summand.
        """
        if not self.count:
            raise ValueError("There is no gradient of a mean over no summand.")
        return self.gradient / self.count


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
    each text a sequence of its own, or several if it has more than ``sequence_length`` tokens, as for
    :func:`lit_edit.statistics.collect_covariances`; the first token of a sequence is not predicted. (The
    paper sums over the corpus, which gives the same directions.) No weight is touched and none needs to require a
    gradient: with ``x`` the module's inputs and ``g`` the loss's gradient at its outputs, ``∇G = Σ g xᵀ``.

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
    if not modules:
        raise ValueError("There are no modules to collect gradients for.")
    pace = Pace(max_tokens, sequence_length, batch_size, progress)
    return collect(model, tokenizer, texts, modules, GradientCollector, pace)[0]


class GradientCollector(Collector):
    """Forward hooks that keep the inputs of modules, and add zeros to their outputs that a loss is derived by."""

    label = "Gradient"
    empty = "The corpus for the gradient has no text of two tokens, of which one can be predicted."

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self._on = False
        self._runs: dict[str, list[tuple[Tensor, Tensor]]] = {}  # inputs and added zeros
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]

    def remove(self) -> None:
        """Takes the hooks off the modules."""
        for handle in self._handles:
            handle.remove()

    def add(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        """Adds the gradient of one forward and backward pass."""
        if ids.shape[1] < 2:
            return
        wanted = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        with torch.enable_grad(), self._listening():
            logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted.flatten(), reduction="sum")
        summands = int((wanted != -100).sum())
        runs = {name: runs[0] for name, runs in self._runs.items()}
        slopes = torch.autograd.grad(loss, [zeros for _, zeros in runs.values()])
        self._runs = {}
        for (name, (inputs, _)), slope in zip(runs.items(), slopes, strict=True):
            if name not in self.metrics:
                self.metrics[name] = self.metric((slope.shape[-1], inputs.shape[-1])).to(slope.device)
            self.metrics[name].update(slope, inputs, summands)
        self.summands += summands

    def metric(self, shape: tuple[int, ...]) -> WeightGradient:
        """For ``Σ g xᵀ (d, p)``."""
        metric = WeightGradient(*shape)
        metric.update(torch.zeros(0, shape[0]), torch.zeros(0, shape[1]), 0)  # or torchmetrics warns that it never was
        return metric

    def total(self, metric: Metric) -> Tensor:
        """``Σ g xᵀ (d, p)``."""
        gradient: Tensor = metric.gradient  # type: ignore[assignment]
        return gradient

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Watch one forward pass.

        Raises:
            StatisticsError: naming the modules that did not run exactly once.
        """
        self._on, self._runs = True, {name: [] for name in self.names}
        yield
        self._on = False
        self.check_ran_once({name: len(runs) for name, runs in self._runs.items()})

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
