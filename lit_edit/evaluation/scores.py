"""Scoring a model on edit requests: reliability, generalization and locality, by exact match."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from lit_edit.evaluation.metrics import IGNORED, TargetScores, target_scores
from lit_edit.evaluation.prefixes import parts
from lit_edit.model.hooks import logits_only_at
from lit_edit.model.prompts import Prompter, Row
from lit_edit.requests import EditRequest

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
    fields = (torch.cat([score[f].cpu() for _, score in scored]) for f in range(4))
    return TargetScores(*(_in_order(values, order)[where] for values in fields))


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(values)
    out[order] = values
    return out


@torch.no_grad()
def greedy(model: Any, prompter: Prompter, prompts: Sequence[str], max_new_tokens: Sequence[int]) -> list[list[int]]:
    """Greedy continuations, at most so many tokens each; the end-of-text token ends one and is not included.

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
            going = [i for i in going if len(out[i]) < max_new_tokens[i]]
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


class LocalityReference:
    """The unedited model's answers to locality probes: what "unchanged" is judged against.

    The reference of a probe is the greedy continuation of its prompt, as long as the recorded answer (or the new
    target, where the file records none). MOSE Eq. 27 compares with the model before the latest edit; the unedited one
    is the stricter default of this project.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[int]] = {}

    def collect(self, model: nn.Module, prompter: Prompter, requests: Sequence[EditRequest]) -> int:
        """Asks the unedited model every locality probe it has not been asked yet; returns how many these were."""
        length: dict[str, int] = {}
        for request in requests:
            for probe in request.probes_of("locality"):
                if probe.prompt in self.answers:
                    continue
                wanted = probe.target or request.target_new
                fields = (probe.field or "prompt", "target_new")
                row = prompter.row(probe.prompt, wanted, source=request.source, fields=fields)
                length[probe.prompt] = max(len(row.ids) - row.target_start, length.get(probe.prompt, 0))
        prompts = list(length)
        for prompt, answer in zip(prompts, greedy(model, prompter, prompts, [length[p] for p in prompts]), strict=True):
            self.answers[prompt] = answer
        return len(prompts)

    def row(self, prompter: Prompter, prompt: str) -> Row | None:
        """The probe with its reference as target; None if the unedited model answered nothing (end of text at once)."""
        ids = prompter.row(prompt).ids
        answer = self.answers[prompt]
        return Row((*ids, *answer), len(ids)) if answer else None


def evaluate(
    model: nn.Module, prompter: Prompter, requests: Sequence[EditRequest], reference: LocalityReference
) -> dict[str, float]:
    """Reliability, generalization, locality (and portability) over requests, each by exact match.

    A probe counts 1 if every token of its target is the most likely one under teacher forcing, which for locality
    means: the greedy answer is still the unedited model's. Probes are averaged within a request, then over the
    requests that have any (MOSE Eq. 25-27).

    Returns:
        A figure per kind that occurs in the requests; ``reliability`` always.
    """
    rows: list[Row] = []
    owners: list[tuple[str, int]] = []
    for i, request in enumerate(requests):
        rows.append(prompter.row(request.prompt, request.target_new, source=request.source))
        owners.append(("reliability", i))
        for probe in request.probes:
            row: Row | None = None
            if probe.kind == "generalization":
                row = prompter.row(probe.prompt, probe.target or request.target_new, source=request.source)
            elif probe.kind == "portability" and probe.target:
                row = prompter.row(probe.prompt, probe.target, source=request.source)
            elif probe.kind == "locality":
                row = reference.row(prompter, probe.prompt)
            if row is not None:
                rows.append(row)
                owners.append((probe.kind, i))
    exact = score_targets(model, prompter, rows).exact.tolist()
    per_request: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (kind, i), hit in zip(owners, exact, strict=True):
        per_request[kind][i].append(float(hit))
    return {
        kind: sum(sum(hits) / len(hits) for hits in by_request.values()) / len(by_request)
        for kind, by_request in per_request.items()
    }
