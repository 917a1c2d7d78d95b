"""The gradient of a model's language-model loss over a corpus, with respect to weights of projections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_edit.statistics.collecting import Collector, Pace, collect
from lit_edit.statistics.files import StatisticsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    if not modules:
        raise ValueError("There are no modules to collect gradients for.")
    pace = Pace(max_tokens, sequence_length, batch_size, progress)
    return collect(model, tokenizer, texts, modules, GradientCollector, pace)[0]


class GradientCollector(Collector):
    """Forward hooks that keep the inputs of modules, and add zeros to their outputs that a loss is derived by."""

    label = "Gradient"

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self._sums: dict[str, Tensor] = {}
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
        for name, gradient in self._gradients(loss).items():
            self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient
        self.summands += int((wanted != -100).sum())

    def sums(self) -> dict[str, Tensor]:
        """``Σ g xᵀ (d, p)`` by the name of the module; empty before a text of two tokens."""
        return dict(self._sums)

    def restore(self, sums: Mapping[str, Tensor], summands: int, device: torch.device) -> None:
        """Goes on from ``Σ g xᵀ`` over so many predicted tokens."""
        self.summands = summands
        self._sums = {name: sums[name].to(device) for name in self.names}

    def results(self) -> dict[str, Tensor]:
        """``∇G (d, p)`` by the name of the module."""
        if not self.summands:
            raise StatisticsError(
                "The corpus for the gradient has no text of two tokens, of which one can be predicted."
            )
        for name, total in self._sums.items():
            if not torch.isfinite(total.sum()):
                raise StatisticsError(f"The gradient of module {name!r} holds values that are not finite.")
        return {name: self._sums.pop(name) / self.summands for name in self.names}

    @contextmanager
    def _listening(self) -> Iterator[None]:
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

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
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
