from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torchmetrics.functional.text import squad

from lit_edit.evaluation.metrics import mean_rouge, squad_f1, squad_normalise, target_scores


def batch(rows: int = 6, length: int = 9, vocabulary: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Random guesses for targets of 1 to 3 tokens at any place; the small vocabulary lets some be right."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(rows, length, vocabulary, generator=generator)
    targets = torch.full((rows, length), -100)
    for row in range(rows):
        start = 1 + row
        stop = min(length, start + 1 + row % 3)
        targets[row, start:stop] = torch.randint(vocabulary, (stop - start,), generator=generator)
    targets[0, 1] = logits[0, 0].argmax()
    return logits, targets


def by_loop(logits: torch.Tensor, targets: torch.Tensor) -> list[tuple[bool, float, float, float, int]]:
    """Token by token: the target at position t + 1 is judged by the output at position t."""
    rows = []
    for row in range(targets.shape[0]):
        hits, log_probs, places = [], [], []
        for t in range(targets.shape[1] - 1):
            target = int(targets[row, t + 1])
            if target == -100:
                continue
            scores = logits[row, t].tolist()
            places.append(sum(score > scores[target] for score in scores) + 1)
            hits.append(max(range(len(scores)), key=scores.__getitem__) == target)
            log_probs.append(scores[target] - math.log(sum(math.exp(score) for score in scores)))
        rows.append((all(hits), sum(hits) / len(hits), sum(log_probs), sum(log_probs) / len(log_probs), max(places)))
    return rows


def test_target_scores_against_a_plain_loop():
    logits, targets = batch()
    scores, loop = target_scores(logits, targets), by_loop(logits, targets)
    assert scores.exact.tolist() == [row[0] for row in loop]
    assert {row[0] for row in loop} == {True, False}
    for position, tensor in enumerate(scores[1:], start=1):
        assert tensor.tolist() == pytest.approx([row[position] for row in loop], abs=1e-5)


def test_the_output_at_the_target_itself_does_not_count():
    logits = torch.zeros(1, 4, 5)
    targets = torch.tensor([[-100, -100, 3, -100]])
    logits[0, 1, 3] = 5.0
    assert target_scores(logits, targets).exact.item()
    logits[0, 2, 1] = 50.0  # predicts what follows the target
    logits[0, 0, 1] = 50.0
    assert target_scores(logits, targets).exact.item()


def test_padding_on_either_side_changes_nothing():
    logits, targets = batch()
    wide = torch.nn.functional.pad(logits, (0, 0, 2, 3), value=7.0)
    shifted = torch.nn.functional.pad(targets, (2, 3), value=-100)
    for one, other in zip(target_scores(logits, targets), target_scores(wide, shifted), strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_is_scored_in_single():
    logits, targets = batch()
    half = logits.bfloat16()
    scores = target_scores(half, targets)
    assert scores.log_prob.dtype == torch.float32
    assert scores.log_prob.tolist() == pytest.approx([row[2] for row in by_loop(half.float(), targets)], abs=1e-5)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), "are needed"),
        (torch.zeros(2, 3, 5), torch.zeros(2, 4).long(), "are needed"),
        (torch.zeros(1, 3, 5), torch.tensor([[1, 2, -100]]), "first position"),
        (torch.zeros(2, 3, 5), torch.tensor([[-100, 2, 1], [-100, -100, -100]]), "Row 1 has no target"),
        (torch.zeros(1, 1, 5), torch.tensor([[-100]]), "Row 0 has no target"),
    ],
)
def test_bad_targets_are_refused(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        target_scores(logits, targets)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat", "cat"),
        ("a theory of an Anthem", "theory of anthem"),
        ("U.S.A.\n", "usa"),
        ("one-way, (really)", "oneway really"),
        ("the", ""),
        ("Åland", "åland"),
    ],
)
def test_squad_normalise(text, normal):
    assert squad_normalise(text) == normal


@pytest.mark.parametrize(
    ("given", "right", "score"),
    [
        ("the big dog", ["a dog", "cat"], 2 / 3),  # one of two words, and all of one
        ("Wilhelm Röntgen", ["Wilhelm Conrad Röntgen"], 4 / 5),
        ("cat", ["dog", "The cat!"], 1.0),
        ("nothing", ["dog"], 0.0),
    ],
)
def test_squad_f1_by_hand(given, right, score):
    assert squad_f1(given, right) == pytest.approx(score, abs=1e-6)


def test_exact_match_agrees_with_torchmetrics():
    """The normalisation here and the one in `torchmetrics` call the same answers equal."""
    texts = ["The  Cat", "cat.", "a theory of an Anthem", "theory of anthem", "U.S.A.\n", "usa", "the", "Åland"]
    for one in texts:
        for other in texts:
            answers = [{"answers": {"text": [other], "answer_start": [0]}, "id": "0"}]
            found = squad([{"prediction_text": one, "id": "0"}], answers)["exact_match"]
            assert (squad_normalise(one) == squad_normalise(other)) == bool(found == 100)


def f1(overlap: int, predicted: int, wanted: int) -> float:
    return 2 * overlap / (predicted + wanted) if overlap else 0.0


def rouge_by_hand(pred: str, gold: str) -> float:
    """ROUGE-1, -2 and -L F1 from their definitions."""
    one, other = pred.lower().split(), gold.lower().split()
    scores = []
    for n in (1, 2):
        grams = [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (one, other)]
        scores.append(f1((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total()))
    longest = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            longest[i + 1][j + 1] = longest[i][j] + 1 if left == right else max(longest[i][j + 1], longest[i + 1][j])
    scores.append(f1(longest[-1][-1], len(one), len(other)))
    return sum(scores) / 3


def test_mean_rouge_from_the_definitions():
    preds = ["Anna will bake a cake tonight", "they meet at noon", "nothing in common"]
    golds = ["Tonight Anna will bake two cakes", "they meet at noon", "wholly different words"]
    by_hand = [rouge_by_hand(*pair) for pair in zip(preds, golds, strict=True)]
    assert by_hand[1:] == [1.0, 0.0]
    assert mean_rouge(preds, golds) == pytest.approx(sum(by_hand) / 3, abs=1e-6)


def test_mean_rouge_needs_pairs():
    with pytest.raises(ValueError, match="no text"):
        mean_rouge([], [])
    with pytest.raises(ValueError, match="gold answers"):
        mean_rouge(["a"], [])
    with pytest.raises(ValueError, match="not one text"):
        mean_rouge("a", ["a"])
