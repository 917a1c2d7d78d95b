"""Causal tracing (Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2).

The subject's embeddings are disturbed until the model no longer knows the answer; then one state of the undisturbed
run is put back at one token and layer. What that gives back of the answer's probability is the state's indirect effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from lit_edit.requests import EditRequest

STATES = ("hidden state", "MLP output", "attention output")
TOKENS = ("last subject token", "last token")
NOISE = 3.0  # standard deviations of the subjects' embeddings
SAMPLES = 8  # of noise for every fact


def _modules(model: Any, state: str) -> list[Any]:
    part: dict[str, Callable[[Any], Any]] = {
        "hidden state": lambda layer: layer,
        "MLP output": lambda layer: layer.mlp,
        "attention output": lambda layer: layer.self_attn,
    }
    return [part[state](layer) for layer in model.model.layers]


def _tensor(output: Any) -> Tensor:
    """The states in what a module gives."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _keeping(kept: dict[tuple[str, int], Tensor], key: tuple[str, int]) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        kept[key] = _tensor(output)[0].clone()

    return hook


def _restoring(place: int, clean: Tensor) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        _tensor(output)[:, place] = clean[place]

    return hook


@torch.no_grad()
def indirect_effects(model: Any, tokenizer: Any, requests: Sequence[EditRequest], seed: int = 0) -> dict[str, Any]:
    """Average indirect effects on the first token of the true object.

    Args:
        model: A Llama-architecture model of `transformers`.
        tokenizer: Its fast tokenizer.
        requests: Facts that the model knows; each needs a true object.
        seed: Seed of the noise.

    Returns:
        ``clean`` and ``corrupted``: mean probability of the answer; then for ``<state>, <token>`` the mean gain of
        probability by layer.
    """
    rng = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings()
    rows, subjects = [], []
    for request in requests:
        encoded = tokenizer(request.prompt, return_offsets_mapping=True)
        start = request.prompt.index(request.subject)
        end = start + len(request.subject)
        rows.append(torch.tensor([encoded["input_ids"]]))
        subjects.append([i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and start < b])
    spread = float(torch.cat([embedding(ids)[0, s] for ids, s in zip(rows, subjects, strict=True)]).std())
    n = len(requests)
    total: dict[str, Any] = {"clean": 0.0, "corrupted": 0.0}
    for request, ids, subject in zip(requests, rows, subjects, strict=True):
        answer = tokenizer(f" {request.target_true}", add_special_tokens=False)["input_ids"][0]
        noise = NOISE * spread * torch.randn(SAMPLES, len(subject), embedding.embedding_dim, generator=rng)
        disturbed = embedding(ids).repeat(SAMPLES, 1, 1)
        disturbed[:, subject] += noise

        def probability(inputs: Tensor, answer: int = answer) -> float:
            return float(model(inputs_embeds=inputs).logits[:, -1].softmax(-1)[:, answer].mean())

        clean: dict[tuple[str, int], Tensor] = {}
        with ExitStack() as stack:
            for state in STATES:
                for layer, module in enumerate(_modules(model, state)):
                    stack.callback(module.register_forward_hook(_keeping(clean, (state, layer))).remove)
            total["clean"] += probability(embedding(ids)) / n
        corrupted = probability(disturbed)
        total["corrupted"] += corrupted / n
        for state in STATES:
            for token, place in zip(TOKENS, (subject[-1], ids.shape[1] - 1), strict=True):
                modules = _modules(model, state)
                effects = total.setdefault(f"{state}, {token}", [0.0] * len(modules))
                for layer, module in enumerate(modules):
                    handle = module.register_forward_hook(_restoring(place, clean[state, layer]))
                    try:
                        effects[layer] += (probability(disturbed) - corrupted) / n
                    finally:
                        handle.remove()
    return total


def draw(effects: dict[str, Any], path: Path) -> None:
    """Draws average indirect effects by layer, one panel for each token."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    for axis, token in zip(axes, TOKENS, strict=True):
        for state in STATES:
            values = effects[f"{state}, {token}"]
            axis.plot(range(len(values)), values, marker="o", label=state)
        axis.set_title(token)
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("average indirect effect")
    axes[0].legend()
    # No software version or date: the same figures give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
