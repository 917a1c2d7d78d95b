"""Where a model keeps its parts: the only model knowledge in the project.

A family is described once, keyed by ``config.model_type``, in data. Orientation is declared, never guessed: GPT-2's
``Conv1D`` stores (in, out), and a square weight would make a guess silently wrong. For a family that is not described,
`find_family` runs the model once and says what it found; it is used only after the user has confirmed it, and what a
user says is checked by what the model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Paths of one model family, relative to the model and, from ``block`` on, to a block.

    ``transposed`` says that the down-projection's weight is stored (in, out) instead of (out, in). ``attention`` is the
    module whose output the block adds for its attention; causal tracing alone asks for it, and does without it if None.
    """

    blocks: str
    down_projection: str
    transposed: bool = False
    attention: str | None = field(default=None, compare=False)

    @property
    def option(self) -> str:
        """The option of the command line that names it."""
        parts = f"blocks: {self.blocks}, down_projection: {self.down_projection}"
        return f"--model.family='{{{parts}, transposed: {str(self.transposed).lower()}}}'"


FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.h", "mlp.c_proj", transposed=True, attention="attn"),
    "llama": Family("model.layers", "mlp.down_proj", attention="self_attn"),
    "mistral": Family("model.layers", "mlp.down_proj", attention="self_attn"),
    "qwen2": Family("model.layers", "mlp.down_proj", attention="self_attn"),
    "qwen3": Family("model.layers", "mlp.down_proj", attention="self_attn"),
    "gemma2": Family("model.layers", "mlp.down_proj", attention="self_attn"),
    "gemma3_text": Family("model.layers", "mlp.down_proj", attention="self_attn"),
    "gemma3": Family("model.language_model.layers", "mlp.down_proj", attention="self_attn"),
    "olmo2": Family("model.layers", "mlp.down_proj", attention="self_attn"),
    "phi3": Family("model.layers", "mlp.down_proj", attention="self_attn"),
    "phi": Family("model.layers", "mlp.fc2", attention="self_attn"),
    "gptj": Family("transformer.h", "mlp.fc_out", attention="attn"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h", attention="attention"),
    "falcon": Family("transformer.h", "mlp.dense_4h_to_h", attention="self_attention"),
    "opt": Family("model.decoder.layers", "fc2", attention="self_attn"),
}


# Eight-bit floating-point weights come with scales of their own: writing to them does not edit what the layer computes.
EDITABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# What configurations of `transformers` call the number of experts of a block.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


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
    attention: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        """The weight in canonical orientation (d_out, d_in): a view, writing to it edits the model."""
        stored: Tensor = self.projection.weight.detach()  # type: ignore[operator]
        return stored.T if self.transposed else stored


class Architecture:
    """The editable layers of one model.

    Args:
        model: A causal language model of `transformers`.
        family: Where its parts are, checked by running the model once on three tokens; None looks it up by
            ``config.model_type``.

    Raises:
        UnsupportedModelError: if the family is unknown, the model lacks the parts its family should have, a weight is
            stored in a form that cannot be edited, or the family given is not the model's.
    """

    def __init__(self, model: nn.Module, family: Family | None = None) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        given = family is not None
        if family is None:
            if kind not in FAMILIES:
                raise UnsupportedModelError(_unknown(model, kind))
            family = FAMILIES[kind]
        names = {id(p): n for n, p in model.named_parameters()}
        self.layers: list[Layer] = []
        try:
            blocks = list(model.get_submodule(family.blocks))  # type: ignore[call-overload]
            projections = [block.get_submodule(family.down_projection) for block in blocks]
            path = family.attention
            attentions = [None if path is None else block.get_submodule(path) for block in blocks]
        except (AttributeError, TypeError) as error:
            raise UnsupportedModelError(
                f"A {type(model).__name__} of type {kind!r} lacks {family.blocks}.*.{family.down_projection}: {error}. "
                "Load it as a causal language model (AutoModelForCausalLM)."
            ) from error
        for index, (block, projection, attention) in enumerate(zip(blocks, projections, attentions, strict=True)):
            weight = getattr(projection, "weight", None)
            why = _why_not_editable(projection, weight)
            if why:
                raise UnsupportedModelError(
                    f"The down-projection of layer {index} holds no plain floating-point matrix ({why}) and cannot "
                    "be edited: load the model in float32, bfloat16 or float16."
                )
            self.layers.append(Layer(index, names[id(weight)], block, projection, family.transposed, attention))
        if not self.layers:
            raise UnsupportedModelError(f"{family.blocks} of this {type(model).__name__} holds no blocks to edit.")
        if given:
            with _evaluating(model):
                _check_family(model, family, self.layers)

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


# Features of a module's output that are computed again: all of them would take gigabytes in a large model.
_FEATURES = 64
_TOKENS = ((1, 2, 3),)


def _check_family(model: nn.Module, family: Family, layers: Sequence[Layer]) -> None:
    """Makes sure that a description is right, by running the model once on three tokens.

    Required of the projection of every block: it runs once, its output is as wide as the block's, and it is
    ``x Wᵀ + b`` with the weight as it is said to be stored. Required in the first block, found by changing what the
    projection gives and what the block is given: the block's output depends on it; no other matrix of the block reads
    it, as one does what an up-projection, a gate, or an attention before an MLP gives; and, in a block that computes
    attention and MLP side by side, it is not the attention's output, whose input at a token depends on other tokens.
    A norm between the projection and the block's output is allowed.

    Nothing is checked of weights that take no memory, as in a rehearsal: they compute nothing.

    Raises:
        UnsupportedModelError: saying what was found instead.
    """
    if any(_hollow(layer.projection.weight) for layer in layers):  # type: ignore[arg-type]
        return
    wrong = f"{family.blocks}.*.{family.down_projection} is not the MLP's down-projection"
    advice = "Name the weight whose output the block adds to its hidden states, see CONTRIBUTING.md."
    projections = {str(layer.index): layer.projection for layer in layers}
    calls: dict[str, list[_Call]] = {}
    seen = _watched(projections, lambda: calls.update(_calls(model, {str(p.index): p.block for p in layers})))
    for layer in layers:
        runs, entered = seen[str(layer.index)], calls[str(layer.index)]
        if len(runs) != 1 or len(entered) != 1:
            raise UnsupportedModelError(
                f"{wrong}: in block {layer.index} it ran {len(runs)} times in one pass, the block {len(entered)} times."
            )
        x, y = runs[0]
        width = entered[0].width
        if y is None or y.shape[-1] != width:
            found = "no tensor" if y is None else f"{y.shape[-1]} features"
            raise UnsupportedModelError(f"{wrong}: it gives {found}, the block's hidden states have {width}. {advice}")
        if not _multiplies(layer.projection, x, y, family.transposed):
            turned = _multiplies(layer.projection, x, y, not family.transposed)
            raise UnsupportedModelError(
                f"{family.blocks}.*.{family.down_projection} does not multiply its input ({x.shape[-1]} features) by "
                f"its weight as it would be stored with transposed: {str(family.transposed).lower()}, in block "
                f"{layer.index}. "
                + (f"It does with transposed: {str(not family.transposed).lower()}." if turned else advice)
            )
    why = _misplaced(calls["0"][0], family.down_projection)
    if why:
        raise UnsupportedModelError(f"{wrong}: {why}. {advice}")


def find_family(model: nn.Module) -> Family:
    """Finds blocks and down-projections of a model that is not described, by running it once.

    The blocks are the longest list of modules of one class that all run. In a block the down-projection is the one
    module of which all holds that is required of a family that is given (see `_check_family`); how its weight is
    stored is read off from what it computes.

    Raises:
        UnsupportedModelError: if that leaves none or several; the message names them.
    """
    with _evaluating(model):
        return _find_family(model)


def _find_family(model: nn.Module) -> Family:
    lists = {name: list(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    lists = {name: blocks for name, blocks in lists.items() if len({type(block) for block in blocks}) == 1}
    parts = {f"{name}.{i}": block for name, blocks in lists.items() for i, block in enumerate(blocks)}
    calls = _calls(model, parts) if parts else {}
    running = [n for n, blocks in lists.items() if all(len(calls[f"{n}.{i}"]) == 1 for i in range(len(blocks)))]
    if not running:
        raise UnsupportedModelError(f"A {type(model).__name__} has no list of equal blocks to look for an MLP in.")
    blocks = max(running, key=lambda name: len(lists[name]))
    call = calls[f"{blocks}.0"][0]
    seen = {name: runs[0] for name, runs in call.again()[1].items() if len(runs) == 1}
    fitting = []
    for name, (x, y) in seen.items():
        module = call.block.get_submodule(name)
        if y is None or y.shape[-1] != call.width or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        ways = [transposed for transposed in (False, True) if _multiplies(module, x, y, transposed)]
        if len(ways) == 1 and not _misplaced(call, name):
            fitting.append(Family(blocks, name, ways[0]))
    if len(fitting) == 1:
        return fitting[0]
    cannot = f"Which module of {blocks}.* is the MLP's down-projection cannot be told"
    if fitting:
        raise _Ambiguous(
            f"{cannot}: {len(fitting)} would do. If one takes all of the MLP's output, confirm it: "
            f"{' or '.join(family.option for family in fitting)}."
        )
    mapped = ", ".join(f"{n} ({x.shape[-1]} to {y.shape[-1]})" for n, (x, y) in sorted(seen.items()) if y is not None)
    raise UnsupportedModelError(f"{cannot}: 0 candidates among {mapped or 'none'}.")


class _Ambiguous(UnsupportedModelError):
    """Several modules would do; the message has what to say to take one."""


_Seen = dict[str, list[tuple[Tensor, Tensor | None]]]


@dataclass(frozen=True)
class _Call:
    """A block, and what it was called with when the model ran."""

    block: nn.Module
    hidden: Tensor  # (B, L, d)
    args: tuple[Any, ...]  # after it
    kwargs: dict[str, Any]
    width: int  # of its output

    @torch.no_grad()
    def again(self, changed: str = "", by: Tensor | None = None, first: Tensor | None = None) -> tuple[Tensor, _Seen]:
        """The block's output (B, L, d), and what went through the modules in it that have matrices.

        Args:
            changed: A module to whose output ``by`` is added.
            by: Change, of the shape of that output.
            first: Added to the first token that the block is given, (d,).
        """
        hidden = self.hidden.clone()
        if first is not None:
            hidden[:, 0] += first
        modules = {
            name: module
            for name, module in self.block.named_modules()
            if name and any(weight.ndim > 1 for weight in module.parameters(recurse=False))
        }
        handles = []
        if by is not None:
            module = self.block.get_submodule(changed)
            handles.append(module.register_forward_hook(lambda _, __, output: output + by))
        outputs: list[Tensor] = []
        try:
            seen = _watched(modules, lambda: outputs.append(_tensor(self.block(hidden, *self.args, **self.kwargs))))
        finally:
            for handle in handles:
                handle.remove()
        return outputs[0], {name: runs for name, runs in seen.items() if runs}

    def like(self, output: Tensor) -> Tensor:
        """A change of a module's output that the block, whose hidden states may be larger, cannot fail to notice."""
        return self._noise(output.shape, output)

    def token(self) -> Tensor:
        """A change of one token's hidden state."""
        return self._noise(self.hidden.shape[-1:], self.hidden)

    def _noise(self, shape: Sequence[int], like: Tensor) -> Tensor:
        size = max(float(like.float().std()), float(self.hidden.float().std())) or 1.0
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        return (size * noise).to(like.device, like.dtype)


def _calls(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, list[_Call]]:
    """What each of the blocks is called with when the model reads three tokens."""
    found: dict[str, list[_Call]] = {name: [] for name in blocks}
    entered: dict[str, tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = {}

    def enter(name: str) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, others = (args[0] if args else kwargs.get("hidden_states")), dict(kwargs)
            if not args:
                others.pop("hidden_states", None)
            if isinstance(hidden, Tensor) and hidden.ndim == 3:
                entered[name] = hidden.detach().clone(), args[1:], others  # some blocks add to it in place

        return read

    def leave(name: str) -> Callable[..., None]:
        def read(block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
            given = _tensor(output)
            if name in entered and isinstance(given, Tensor):
                found[name].append(_Call(block, *entered.pop(name), given.shape[-1]))

        return read

    handles = [block.register_forward_pre_hook(enter(name), with_kwargs=True) for name, block in blocks.items()]
    handles += [block.register_forward_hook(leave(name)) for name, block in blocks.items()]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor(_TOKENS, device=device), use_cache=False)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedModelError(
            f"A {type(model).__name__} cannot be run on three tokens to see what its parts do: {first}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _watched(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> _Seen:
    """What goes into modules, and what comes out, of those that run: (input, output or None if it is no tensor)."""
    seen: _Seen = {name: [] for name in modules}

    def reader(name: str) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if given:  # copies, for some blocks add to it in place
                out = output.detach().clone() if isinstance(output, Tensor) else None
                seen[name].append((given[0].detach().clone(), out))

        return read

    handles = [module.register_forward_hook(reader(name), with_kwargs=True) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tensor(output: Any) -> Any:
    """What a block gives, which is a tuple in some models."""
    return output[0] if isinstance(output, tuple) else output


def _multiplies(module: nn.Module, x: Tensor, y: Tensor, transposed: bool) -> bool:
    """Whether a module computes ``x Wᵀ + b``, its weight stored (in, out) if transposed, else (out, in)."""
    weight: Any = module.weight
    if weight.ndim != 2:
        return False
    weight = weight.detach().T if transposed else weight.detach()
    if tuple(weight.shape) != (y.shape[-1], x.shape[-1]):
        return False
    product = x.float() @ weight[:_FEATURES].float().T
    y = y[..., :_FEATURES].float()
    bias: Any = getattr(module, "bias", None)
    without = y if bias is None else y - bias.detach()[:_FEATURES].float()
    rounding = 4 * torch.finfo(weight.dtype).eps * float(y.norm())
    return float((product - without).norm()) <= 0.02 * float(product.norm()) + rounding


def _misplaced(call: _Call, name: str) -> str:
    """Why a module of a block cannot be what the MLP adds to the hidden states; empty if it can."""
    out, seen = call.again()
    reading, used = _effects(call, name, out, seen)
    if reading:
        return f"{reading[0]} reads what it gives"
    if not used:
        return "the block's output does not depend on it"
    _, turned = call.again(first=call.token())

    def mixes(one: str) -> bool:
        """Whether what enters a module at the last token depends on the first."""
        before, after = ([x.reshape(-1, x.shape[-1])[-1] for x, _ in runs[one]] for runs in (seen, turned))
        return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    if mixes(name):
        for other, runs in seen.items():
            output = runs[0][1]
            beside = other != name and len(runs) == 1 and output is not None and output.shape[-1] == call.width
            if beside and not mixes(other) and _effects(call, other, out, seen) == ([], True):
                return f"it is computed beside {other}, from several tokens as an attention's output is"
    return ""


def _effects(call: _Call, name: str, out: Tensor, seen: _Seen) -> tuple[list[str], bool]:
    """Which modules of a block get another input when one gives another output, and whether the block's changes."""
    given = seen[name][0][1] if name in seen else None
    if given is None:
        return [], False
    changed, after = call.again(name, call.like(given))
    reading = [
        other
        for other, runs in seen.items()
        if other != name and any(_differ(a, b) for (a, _), (b, _) in zip(runs, after[other], strict=False))
    ]
    return reading, _differ(out, changed)


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return True
    return float((one.float() - other.float()).norm()) > 1e-3 * float(one.float().norm())


def _hollow(weight: Tensor) -> bool:
    """Whether a weight takes no memory, so that it holds nothing."""
    return weight.device.type == "meta" or weight.untyped_storage().nbytes() < weight.numel() * weight.element_size()


def _unknown(model: nn.Module, kind: Any) -> str:
    """What to say of a model whose family is not described."""
    said = f"Models of type {kind!r} are not described yet; known are {', '.join(sorted(FAMILIES))}. "
    if not isinstance(model, nn.Module) or kind is None:
        return said + "Describe the family in lit_edit/model/families.py (see CONTRIBUTING.md)."
    config: Any = model.config
    experts = next((n for name in _EXPERTS if isinstance(n := getattr(config, name, None), int) and n > 1), None)
    if experts is not None:
        return (
            f"A {type(model).__name__} is a mixture of {experts} experts: every token passes through a few of them, so "
            "a block has no one weight that an edit could be written to. Take a dense model, such as one of "
            f"{', '.join(sorted(FAMILIES))}."
        )
    try:
        family = find_family(model)
    except _Ambiguous as error:
        return f"{said}{error}"
    except UnsupportedModelError as error:
        return f"{said}{error} Describe the family in lit_edit/model/families.py (see CONTRIBUTING.md)."
    return (
        f"{said}This one seems to have its blocks at {family.blocks}.* and their down-projections at "
        f"{family.down_projection}, stored {'(in, out)' if family.transposed else '(out, in)'}. If that is right, "
        f"confirm it: {family.option}."
    )
