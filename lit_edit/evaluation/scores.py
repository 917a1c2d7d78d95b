"""Scoring a model on edit requests: reliability, generalization and locality, by exact match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from lit_edit.evaluation.metrics import IGNORED, TargetScores, target_scores
from lit_edit.evaluation.prefixes import parts
from lit_edit.model.hooks import logits_only_at
from lit_edit.model.prompts import Prompter, Row

TOKENS_PER_BATCH = 4096


@torch.no_grad()
def score_targets(model: nn.Module, prompter: Prompter, rows: Sequence[Row]) -> TargetScores:
    """Scores the target of every row under teacher forcing, in the order given; tensors (rows,) on the CPU."""
    device = next(model.parameters()).device
    scored: list[tuple[list[int], TargetScores]] = []
    place: dict[tuple[tuple[int, ...], int], int] = {}
    where = torch.tensor([place.setdefault((row.ids, row.target_start), len(place)) for row in rows], dtype=torch.long)
    rows = [Row(*distinct) for distinct in place]  # neighbours of several facts are often the same
    texts = [row.ids for row in rows]
    # The token that predicts the first of the target is run with every row.
    limits = [max(0, row.target_start - 1) for row in rows]
    for part in parts(model, texts, limits, prompter.pad_id, TOKENS_PER_BATCH):
        labels = prompter.collate([rows[i] for i in part.rows], device).labels
        # The targets alone, each row's moved to the front behind a first column that nothing predicts.
        of, at = (labels != IGNORED).nonzero(as_tuple=True)
        column = at - (labels != IGNORED).int().argmax(1)[of] + 1
        with logits_only_at(model, of, at - 1 - part.first[of]):
            found = part.run(model).logits[0]
        longest = int(column.max())
        targets = torch.full((len(part.rows), longest + 1), IGNORED, device=device)
        targets[of, column] = labels[of, at]
        logits = found.new_zeros(len(part.rows), longest + 1, found.shape[-1])
        logits[of, column - 1] = found
        scored.append((part.rows, target_scores(logits, targets)))
        del part  # it holds keys and values, which those of the next one need not lie beside
    order = torch.tensor([i for group, _ in scored for i in group])
    fields = (torch.cat([score[f].cpu() for _, score in scored]) for f in range(len(TargetScores._fields)))
    return TargetScores(*(_in_order(values, order)[where] for values in fields))


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(values)
    out[order] = values
    return out


@torch.no_grad()
def greedy(
    model: Any,
    prompter: Prompter,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int],
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Greedy continuations, of a number of tokens at most; the end-of-text token ends one and is not included.

    ``ended`` is asked after each token whether a continuation is complete.

    Padding is on the left here, whatever the tokenizer's setting, because every row continues at its end. Not
    `model.generate`: it obeys the model's own generation settings, such as a repetition penalty or further end tokens,
    and its answers would then not be the most likely tokens that `evaluate` compares with.
    """
    texts = [prompter.row(p).ids for p in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    eos = prompter.tokenizer.eos_token_id
    limits = [max(0, len(ids) - 1) for ids in texts]
    for part in parts(model, texts, limits, prompter.pad_id, TOKENS_PER_BATCH, room=max_new_tokens):
        rows, ids, mask, cache = part.rows, part.ids, part.mask, part.cache
        going = [i for i in rows if max_new_tokens[i] > 0]
        while going:
            every = torch.arange(len(rows), device=ids.device)
            with logits_only_at(model, every, torch.full_like(every, ids.shape[1] - 1)):
                found = model(
                    input_ids=ids,
                    attention_mask=mask,
                    # The masked places must not count: absolute positions would shift.
                    position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :],
                    past_key_values=cache,
                    use_cache=True,
                )
            cache, ids = found.past_key_values, found.logits[0].argmax(-1)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            token = dict(zip(rows, ids[:, 0].tolist(), strict=True))
            going = [i for i in going if token[i] != eos]
            for i in going:
                out[i].append(token[i])
            going = [i for i in going if len(out[i]) < max_new_tokens[i] and not (ended and ended(out[i]))]
            # Selecting copies what is kept of all that go on: worth it once half have ended.
            if 0 < 2 * len(going) <= len(rows) and _selectable(cache):
                kept = torch.tensor([rows.index(i) for i in going])
                cache.batch_select_indices(kept)
                rows, ids, mask = going, ids[kept.to(ids.device)], mask[kept.to(ids.device)]
        del part, cache
    return out


def _selectable(cache: Any) -> bool:
    """Whether all that a cache keeps are keys and values by row; recurrent states know no selection."""
    return isinstance(cache, Cache) and {type(of) for of in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
