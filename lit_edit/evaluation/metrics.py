"""How answers are judged: four named ways for edits, and the scores of the downstream tasks.

The functions hold the definitions; the ``torchmetrics`` classes only add up what they return, so that they can be
logged, reset and reduced over processes.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.text import rouge_score, squad

IGNORED = -100


class TargetScores(NamedTuple):
    """How well a model predicts the target of each row; every tensor has shape ``(B,)``.

    Args:
        exact: Whether every target token is the most likely one.
        token_accuracy: Share of target tokens that are the most likely one.
        log_prob: Log-probability of the whole target, in nats.
        mean_log_prob: The same per token, by which targets of different lengths are compared.
        rank: Worst place of a target token among all tokens at its position; 1 if all are the most likely ones.
    """

    exact: Tensor
    token_accuracy: Tensor
    log_prob: Tensor
    mean_log_prob: Tensor
    rank: Tensor


def target_scores(logits: Tensor, targets: Tensor) -> TargetScores:
    """Score the targets of a batch under teacher forcing.

    A causal model's output at position ``t`` is its guess for position ``t + 1``: ``logits[:, t]`` is compared with
    ``targets[:, t + 1]``, and both are passed unshifted. Log-probabilities are computed in float32 or better, on target
    positions only, since logits over a whole vocabulary are large.

    Args:
        logits: Model's output, shape ``(B, T, V)``.
        targets: Token ids, shape ``(B, T)``: those of the input where the target stands, -100 everywhere else.

    Returns:
        The scores of each row.

    Raises:
        ValueError: if the shapes do not agree, a row has no target token, or a target stands at the first position,
            which nothing predicts.

    Example:
        >>> logits = torch.zeros(1, 3, 5)
        >>> logits[0, 1, 4] = 9.0  # after two tokens the model expects token 4
        >>> target_scores(logits, torch.tensor([[-100, -100, 4]])).exact
        tensor([True])
    """
    if logits.ndim != 3 or targets.shape != logits.shape[:2]:
        raise ValueError(
            f"logits of shape (B, T, V) and targets of shape (B, T) are needed, not {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}."
        )
    wanted = targets[:, 1:]
    is_target = wanted != IGNORED
    lengths = is_target.sum(dim=1)
    if bool((targets[:, :1] != IGNORED).any()):
        raise ValueError("A target at the first position cannot be scored: no output predicts it.")
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"Row {row} has no target token.")

    guesses = logits[:, :-1][is_target]
    guesses = guesses if guesses.dtype == torch.float64 else guesses.float()
    ids = wanted[is_target]
    chosen = guesses.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
    places = (guesses > guesses.gather(1, ids[:, None])).sum(dim=-1) + 1

    # Back into (B, T - 1), where positions outside the target add nothing to a row's sum.
    rank = places.new_zeros(is_target.shape).masked_scatter(is_target, places).amax(dim=1)
    right = torch.zeros_like(is_target).masked_scatter(is_target, guesses.argmax(dim=-1) == ids).sum(dim=1)
    log_prob = chosen.new_zeros(is_target.shape).masked_scatter(is_target, chosen).sum(dim=1)
    return TargetScores(
        exact=right == lengths,
        token_accuracy=right.to(log_prob.dtype) / lengths,
        log_prob=log_prob,
        mean_log_prob=log_prob / lengths,
        rank=rank,
    )


def squad_normalise(text: str) -> str:
    """Text as SQuAD compares it: lower case, without punctuation, articles and surplus white space.

    Args:
        text: An answer.

    Returns:
        The normalised answer.

    Example:
        >>> squad_normalise("The  U.S. Congress!")
        'us congress'
    """
    unpunctuated = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", unpunctuated).split())


def squad_f1(given: str, right: Sequence[str]) -> float:
    """SQuAD's F1 over words, of the accepted answer that fits best, as ``torchmetrics`` computes it.

    Args:
        given: An answer.
        right: Answers that are accepted.

    Returns:
        Between 0 and 1.

    Example:
        >>> squad_f1("the big dog", ["a dog", "cat"])
        0.666...
    """
    answers = {"text": list(right), "answer_start": [0] * len(right)}
    wanted: Any = {"answers": answers, "id": "0"}
    found = squad({"prediction_text": given, "id": "0"}, wanted)
    return float(found["f1"]) / 100


def mean_rouge(preds: Sequence[str], golds: Sequence[str]) -> float:
    """The mean of ROUGE-1, ROUGE-2 and ROUGE-L F1 over all texts, as ``torchmetrics`` computes them, without stemming.

    Args:
        preds: Generated texts.
        golds: Reference text of each.

    Returns:
        The mean, between 0 and 1.

    Raises:
        ValueError: if there is no text, or not one reference per text.
    """
    _check_pairs(preds, golds)
    if not preds:
        raise ValueError("There is no text to score.")
    keys = ("rouge1", "rouge2", "rougeL")  # ROUGE-Lsum and stemming would need nltk
    scores = rouge_score(list(preds), list(golds), rouge_keys=keys)
    return sum(scores[f"{key}_fmeasure"].item() for key in keys) / len(keys)


def _check_pairs(preds: Sequence[Any], golds: Sequence[Any]) -> None:
    if isinstance(preds, str) or isinstance(golds, str):
        raise ValueError("Sequences of answers are needed, not one text.")
    if len(preds) != len(golds):
        raise ValueError(f"There are {len(preds)} answers but {len(golds)} gold answers.")
