"""Scores of MOSE's layer selection predicted from one backward pass, without optimising a value in any layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lit_edit.algebra.linalg import spectral_norm
from lit_edit.editors.keys import KeyAverage, compute_keys
from lit_edit.editors.values import ValueOptimizer
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.model.hooks import change_outputs, logits_only_at
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

_LEAST = 1e-6  # of the loss to lose: a fact that the model has already is ranked by its gradients, too


def predicted_scores(
    workspace: Workspace,
    requests: Sequence[EditRequest],
    values: ValueOptimizer,
    average: KeyAverage,
    layers: Sequence[int],
    contexts: Sequence[str] | None = None,
) -> list[dict[int, float]]:
    """Eq. 22 of MOSE to first order, for every request and layer.

    The loss falls along a move of a layer's output by at most the norm of its gradient there, so that ``‖v − W k‖`` is
    about ``(loss − stop_loss) / ‖gradient‖``, which is divided by ``‖W‖₂ ‖k‖₂`` as the rule has it. Of the gradient
    only that part counts along which the values' constraint lets the output move, on a sphere the tangent's. The loss
    is the one that values start from; its KL term is flat there. A layer from which nothing reaches
    the answer has no gradient and the score infinity.

    Args:
        workspace: The model as edited so far.
        requests: The batch.
        values: How the editor will optimise v*: its constraint and the loss that ends it.
        average: Average of the keys at which v* is optimised.
        layers: Layers to score.
        contexts: Contexts of the loss; all of the workspace's if None.

    Returns:
        Scores by layer, an entry per request.
    """
    keys = compute_keys(workspace, requests, layers, average)
    losses, slopes = output_slopes(workspace, requests, layers, values.rows_at_once(workspace.device), contexts)
    found: list[dict[int, float]] = [{} for _ in requests]
    for layer in layers:
        starts = (workspace.architecture[layer].weight.float() @ keys[layer]).T
        change = torch.zeros_like(starts, requires_grad=True)
        with torch.enable_grad():
            value = values.constraint.value(starts, change)
        (slope,) = torch.autograd.grad(value, change, slopes[layer])
        norm = known_spectral_norm(workspace.site(layer)) * keys[layer].norm(dim=0)
        scores = (losses - values.stop_loss).clamp_min(_LEAST) / (slope.norm(dim=1) * norm)
        for i, score in enumerate(scores.tolist()):
            found[i][layer] = score
    return found


def output_slopes(
    workspace: Workspace,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    rows_at_once: int,
    contexts: Sequence[str] | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss of every request and its gradient with respect to the MLPs' outputs at the subject's last token.

    Args:
        workspace: The model.
        requests: The batch.
        layers: Layers whose outputs are meant.
        rows_at_once: Texts in a pass, unless a single request has more.
        contexts: Contexts of the loss; all of the workspace's if None.

    Returns:
        The negative log-likelihood of the target, averaged over its tokens and then over contexts, ``(n,)``, and for
        each layer its gradient ``(n, d)``, by a move that all contexts share. In float32.
    """
    every = [workspace.rewriting_rows(request, contexts) for request in requests]
    losses: list[Tensor] = []
    slopes: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    together = max(1, rows_at_once // max(map(len, every)))
    for first in range(0, len(every), together):
        groups = every[first : first + together]
        owner = torch.tensor([i for i, rows in enumerate(groups) for _ in rows], device=workspace.device)
        batch = workspace.prompter.collate([row for rows in groups for row in rows], workspace.device)
        row = torch.arange(len(owner), device=workspace.device)
        moves: dict[nn.Module, Tensor] = {}

        def moved(
            output: Tensor,
            module: nn.Module,
            at: tuple[Tensor, Tensor] = (row, batch.subject_last),
            owner: Tensor = owner,
            n: int = len(groups),
            moves: dict[nn.Module, Tensor] = moves,
        ) -> Tensor:
            moves[module] = torch.zeros(n, output.shape[-1], device=output.device, requires_grad=True)
            return output.index_put(at, output[at] + moves[module][owner].to(output.dtype))

        modules = {layer: workspace.architecture[layer].projection for layer in layers}
        changes: dict[nn.Module, Callable[[Tensor], Tensor]] = {
            module: partial(moved, module=module) for module in modules.values()
        }
        of, at = (batch.labels >= 0).nonzero(as_tuple=True)
        with (
            torch.enable_grad(),
            change_outputs(changes, batch.input_ids.shape[1]),
            logits_only_at(workspace.model, of, at - 1),
        ):
            logits = workspace.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits[0]
            by_token = nn.functional.cross_entropy(logits.float(), batch.labels[of, at], reduction="none")
            lengths = torch.zeros(len(owner), device=of.device).index_add(0, of, torch.ones_like(by_token))
            rows = torch.tensor([len(rows) for rows in groups], device=of.device)
            share = 1 / (lengths[of] * rows[owner[of]])  # of a token in its request's loss
            loss = torch.zeros(len(groups), device=of.device).index_add(0, owner[of], by_token * share)
            # Requests are independent: the sum's gradient is each one's own.
            found = torch.autograd.grad(loss.sum(), [moves[modules[layer]] for layer in layers])
        losses.append(loss.detach())
        for layer, slope in zip(layers, found, strict=True):
            slopes[layer].append(slope)
    return torch.cat(losses), {layer: torch.cat(parts) for layer, parts in slopes.items()}


def known_spectral_norm(site: EditedWeight) -> float:
    """``‖W‖₂``, computed anew only after the weight was written to."""
    return site.cached("spectral norm", lambda: spectral_norm(site.weight))
