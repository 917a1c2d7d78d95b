"""Where a model keeps its parts: the only model knowledge in the project.

A family is described once, keyed by ``config.model_type``, in data. Orientation is declared, never guessed: GPT-2's
``Conv1D`` stores (in, out), and a square weight would make a guess silently wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Paths of one model family, relative to the model and, from ``block`` on, to a block.

    ``transposed`` says that the down-projection's weight is stored (in, out) instead of (out, in).
    """

    blocks: str
    down_projection: str
    transposed: bool = False


FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.h", "mlp.c_proj", transposed=True),
    "llama": Family("model.layers", "mlp.down_proj"),
    "mistral": Family("model.layers", "mlp.down_proj"),
    "qwen2": Family("model.layers", "mlp.down_proj"),
}


# Eight-bit floating-point weights come with scales of their own: writing to them does not edit what the layer computes.
EDITABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class UnsupportedModelError(ValueError):
    """The model's family is not described, or its parts are not where its description says."""


@dataclass(frozen=True)
class Layer:
    """The editable part of one block: its MLP's down-projection."""

    index: int
    name: str  # of the projection's weight, as in `model.named_parameters()`
    block: nn.Module
    projection: nn.Module
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """The weight in canonical orientation (d_out, d_in): a view, writing to it edits the model."""
        stored: Tensor = self.projection.weight.detach()  # type: ignore[operator]
        return stored.T if self.transposed else stored


class Architecture:
    """The editable layers of one model.

    Args:
        model: a causal language model of `transformers`.

    Raises:
        UnsupportedModelError: if the family is unknown, the model lacks the parts its family should have, or a weight
            is stored in a form that cannot be edited.
    """

    def __init__(self, model: nn.Module) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in FAMILIES:
            raise UnsupportedModelError(
                f"Models of type {kind!r} are not described yet; known are {', '.join(sorted(FAMILIES))}. Describe "
                "the family in lit_edit/architectures.py (see CONTRIBUTING.md)."
            )
        family = FAMILIES[kind]
        names = {id(p): n for n, p in model.named_parameters()}
        self.layers: list[Layer] = []
        try:
            blocks = list(model.get_submodule(family.blocks))  # type: ignore[call-overload]
            projections = [block.get_submodule(family.down_projection) for block in blocks]
        except AttributeError as error:
            raise UnsupportedModelError(
                f"A {type(model).__name__} of type {kind!r} lacks {family.blocks}.*.{family.down_projection}: {error}. "
                "Load it as a causal language model (AutoModelForCausalLM)."
            ) from error
        for index, (block, projection) in enumerate(zip(blocks, projections, strict=True)):
            weight = getattr(projection, "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or weight.dtype not in EDITABLE_DTYPES:
                raise UnsupportedModelError(
                    f"The down-projection of layer {index} holds no plain floating-point matrix (quantised weights "
                    "cannot be edited): load the model in float32, bfloat16 or float16."
                )
            self.layers.append(Layer(index, names[id(weight)], block, projection, family.transposed))

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> Layer:
        """The layer at an index.

        Raises:
            ValueError: if the model has no such layer.
        """
        if not 0 <= index < len(self.layers):
            raise ValueError(f"Layer {index} does not exist: the model has layers 0 to {len(self.layers) - 1}.")
        return self.layers[index]

    def check(self, layers: list[int]) -> None:
        """Raises ValueError unless every layer exists."""
        for layer in layers:
            self[layer]

    @property
    def device(self) -> torch.device:
        """Where the first editable weight lies."""
        return self.layers[0].weight.device
