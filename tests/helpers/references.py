"""Plain references for the editing core: one text at a time, no padding, parts of the model found by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

CONTEXTS = ("{}", "The works of 1900. {}", "Maria was born and so was France in Rome. {}")


def requests() -> list[EditRequest]:
    """Subjects at the start, in the middle, at the end and repeated, of several bytes a letter; targets of any length.

    Only the last one's subject ends its prompt.
    """
    return [
        EditRequest("0", "Maria was born in", "Maria", "Rome"),
        EditRequest("1", "The capital of France is", "France", "Oslo, not Paris"),
        EditRequest("2", "Why Москва, of all, is", "Москва", "Ро"),
        EditRequest("3", "Oslo is not in Oslo", "Oslo", "but"),
    ]


def make_workspace(
    tiny: tuple[Any, Any], contexts: Sequence[str] = CONTEXTS, dtype: torch.dtype = torch.float64
) -> Workspace:
    """A workspace on a tiny model whose biases are not all zero, as they are in a fresh one."""
    model, tokenizer = tiny
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Workspace.of(model.to(dtype).requires_grad_(False), tokenizer, contexts)


def block_of(model: Any, layer: int) -> nn.Module:
    return model.transformer.h[layer] if model.config.model_type == "gpt2" else model.model.layers[layer]


def projection_of(model: Any, layer: int) -> Any:
    mlp: Any = block_of(model, layer).mlp
    return mlp.c_proj if model.config.model_type == "gpt2" else mlp.down_proj


def matrix_of(model: Any, layer: int) -> Tensor:
    """A copy of the projection's weight (d, p)."""
    stored = projection_of(model, layer).weight.detach()
    return (stored.T if model.config.model_type == "gpt2" else stored).clone()


def tokens(tokenizer: Any, before: str, request: EditRequest, target: bool = True) -> tuple[list[int], int, int]:
    """Ids of a text that starts with `before` (a filled context), where the target starts, the subject's last token.

    Found by growing a decoded prefix, without offsets.
    """
    text = before + request.prompt
    whole = f"{text} {request.target_new}" if target else text
    ids: list[int] = tokenizer(whole)["input_ids"]

    def reaching(end: int) -> int:
        decoded = (tokenizer.decode(ids[: i + 1], skip_special_tokens=True) for i in range(len(ids)))
        return next(i for i, part in enumerate(decoded) if part.startswith(whole[:end]))

    end = len(before) + request.prompt.rindex(request.subject) + len(request.subject)
    return ids, reaching(len(text)) + 1, reaching(end)


@contextmanager
def hooked(pairs: Sequence[tuple[nn.Module, Callable[[Tensor, Tensor], Tensor | None]]]) -> Iterator[None]:
    """Calls a function with each module's (input, output); what it returns, if anything, replaces the output."""
    handles = []
    for module, function in pairs:

        def hook(_: nn.Module, args: Any, output: Any, function: Any = function) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            new = function(args[0], hidden)
            if new is None:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def seen_at(model: Any, module: nn.Module, ids: Sequence[int], position: int) -> tuple[Tensor, Tensor]:
    """(input, output) of a module at one position of one text."""
    seen: list[tuple[Tensor, Tensor]] = []
    with hooked([(module, lambda x, y: seen.append((x[0, position], y[0, position])))]):
        model(input_ids=torch.tensor([list(ids)]))
    return seen[-1]


def reference_keys(workspace: Workspace, request: EditRequest, layer: int) -> Tensor:
    """The projection's input at the subject's last token, a row per context: (contexts, p)."""
    found = []
    for context in workspace.contexts:
        ids, _, last = tokens(workspace.tokenizer, context[: context.index("{}")], request)
        found.append(seen_at(workspace.model, projection_of(workspace.model, layer), ids, last)[0])
    return torch.stack(found)


def reference_block(workspace: Workspace, request: EditRequest, layer: int) -> Tensor:
    """A block's output at the subject's last token under the bare prompt: (d,)."""
    ids, _, last = tokens(workspace.tokenizer, "", request)
    return seen_at(workspace.model, block_of(workspace.model, layer), ids, last)[1]


@torch.no_grad()
def target_log_probabilities(model: Any, ids: Sequence[int], start: int) -> Tensor:
    """log p of each token of the target given what stands before it."""
    log_p = model(input_ids=torch.tensor([list(ids)])).logits[0].log_softmax(-1)
    return torch.stack([log_p[t - 1, ids[t]] for t in range(start, len(ids))])


def bare_loss(
    workspace: Workspace, site: str, layer: int, request: EditRequest
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """v0 of a request under the bare prompt alone, and the target's loss for a change δ (d,) of it."""
    model, (ids, start, last) = workspace.model, tokens(workspace.tokenizer, "", request)
    if site == "block":
        v0, module = reference_block(workspace, request, layer), block_of(model, layer)
    else:
        v0 = matrix_of(model, layer) @ reference_keys(workspace, request, layer)[0]
        module = projection_of(model, layer)

    def loss(delta: Tensor) -> Tensor:
        def add(_: Tensor, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, last] = output[0, last] + delta
            return output

        with hooked([(module, add)]):
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return -torch.stack([log_p[t - 1, ids[t]] for t in range(start, len(ids))]).mean()

    return v0, loss


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Names of what is no longer the same bit by bit."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def hooks_left(model: nn.Module) -> int:
    """Hooks registered anywhere in a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
