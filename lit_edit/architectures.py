"""Where a model keeps its parts: the only model knowledge in the project.

A family is described once, keyed by ``config.model_type``, in data. Orientation is declared, never guessed: GPT-2's
``Conv1D`` stores (in, out), and a square weight would make a guess silently wrong. For a family that is not described,
`find_family` runs the model once and says what it found; it is used only after the user has confirmed it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    "qwen3": Family("model.layers", "mlp.down_proj"),
    "gemma2": Family("model.layers", "mlp.down_proj"),
    "gemma3_text": Family("model.layers", "mlp.down_proj"),
    "olmo2": Family("model.layers", "mlp.down_proj"),
    "phi3": Family("model.layers", "mlp.down_proj"),
    "phi": Family("model.layers", "mlp.fc2"),
    "gptj": Family("transformer.h", "mlp.fc_out"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "falcon": Family("transformer.h", "mlp.dense_4h_to_h"),
    "opt": Family("model.decoder.layers", "fc2"),
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
        family: where its parts are; None looks it up by ``config.model_type``.

    Raises:
        UnsupportedModelError: if the family is unknown, the model lacks the parts its family should have, or a weight
            is stored in a form that cannot be edited.
    """

    def __init__(self, model: nn.Module, family: Family | None = None) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if family is None:
            if kind not in FAMILIES:
                raise UnsupportedModelError(_unknown(model, kind))
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
            why = _why_not_editable(projection, weight)
            if why:
                raise UnsupportedModelError(
                    f"The down-projection of layer {index} holds no plain floating-point matrix ({why}) and cannot "
                    "be edited: load the model in float32, bfloat16 or float16."
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


# What libraries hang on a packed weight, or on the layer that scales one, to read it by: bitsandbytes (4 and 8 bits),
# GPTQ and AWQ, block-wise eight-bit floats, compressed-tensors.
_PACKING = ("quant_state", "SCB", "CB", "qweight", "qzeros", "weight_scale", "weight_scale_inv")


def _why_not_editable(projection: nn.Module, weight: Any) -> str:
    """Why writing to a weight would not edit what its layer computes; empty if it would.

    The dtype alone does not tell: four-bit weights can be packed into tensors that call themselves bfloat16.
    """
    packing = [name for name in _PACKING if any(getattr(part, name, None) is not None for part in (projection, weight))]
    if packing:
        return f"quantised: {type(projection).__name__} keeps {packing[0]!r}"
    if not isinstance(weight, nn.Parameter):
        return f"{type(projection).__name__} has no parameter `weight`"
    if weight.dtype not in EDITABLE_DTYPES:
        return f"quantised: its dtype is {weight.dtype}"
    # Tensors of other classes look like floats and hold something else, torchao's for instance.
    if type(weight.data) is not Tensor:
        return f"it is a {type(weight.data).__name__}, not an ordinary tensor"
    if weight.ndim != 2:
        return f"its shape is {tuple(weight.shape)}"
    return ""


def find_family(model: nn.Module) -> Family:
    """Finds blocks and down-projections of a model that is not described, by running it once.

    The blocks are the longest list of modules of one class that all run. In a block the down-projection is the one
    module that maps a wider, or narrower, vector to the block's width; how its weight is stored is read off from what
    it computes.

    Raises:
        UnsupportedModelError: if that leaves none or several; the message names them.
    """
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [(name, m) for name, m in lists if len({type(block) for block in m}) == 1]
    if not lists or width is None:
        raise UnsupportedModelError(f"A {type(model).__name__} has no list of equal blocks to look for an MLP in.")
    blocks, found = max(lists, key=lambda item: len(item[1]))
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def reader(name: str) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen[name] = args[0].detach().clone(), output.detach().clone()  # some blocks add to it in place

        return read

    handles = [
        module.register_forward_hook(reader(name))
        for name, module in found[0].named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2
    ]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2, 3]], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    wide = [n for n, (x, y) in seen.items() if y.shape[-1] == width and x.shape[-1] != width]
    if len(wide) != 1:
        mapped = ", ".join(f"{n} ({x.shape[-1]} to {y.shape[-1]})" for n, (x, y) in sorted(seen.items())) or "none"
        raise UnsupportedModelError(
            f"Which module of {blocks}.* is the MLP's down-projection cannot be told: {len(wide)} candidates among "
            f"{mapped}."
        )
    module = found[0].get_submodule(wide[0])
    x, y = (t.double() for t in seen[wide[0]])
    stored: Any = module.weight
    weight = stored.detach().double()
    bias = getattr(module, "bias", None)
    y = y if bias is None else y - bias.detach().double()
    fits = [
        transposed
        for transposed in (False, True)
        if weight.shape[0 if transposed else 1] == x.shape[-1]
        and torch.allclose(x @ (weight if transposed else weight.T), y, rtol=1e-2, atol=1e-2 * float(y.abs().max()))
    ]
    if len(fits) != 1:
        raise UnsupportedModelError(
            f"{blocks}.*.{wide[0]}, a {type(module).__name__}, does not multiply its input by its weight: it cannot be "
            "edited."
        )
    return Family(blocks, wide[0], fits[0])


def _unknown(model: nn.Module, kind: Any) -> str:
    """What to say of a model whose family is not described."""
    said = f"Models of type {kind!r} are not described yet; known are {', '.join(sorted(FAMILIES))}. "
    if not isinstance(model, nn.Module) or kind is None:
        return said + "Describe the family in lit_edit/architectures.py (see CONTRIBUTING.md)."
    try:
        family = find_family(model)
    except UnsupportedModelError as error:
        return f"{said}{error} Describe the family in lit_edit/architectures.py (see CONTRIBUTING.md)."
    settings = (
        f"blocks: {family.blocks}, down_projection: {family.down_projection}, "
        f"transposed: {str(family.transposed).lower()}"
    )
    return (
        f"{said}This one seems to have its blocks at {family.blocks}.* and their down-projections at "
        f"{family.down_projection}, stored {'(in, out)' if family.transposed else '(out, in)'}. If that is right, "
        f"confirm it: --model.family='{{{settings}}}'."
    )
