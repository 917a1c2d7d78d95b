"""The figures of 200 real CounterFact records, against a plain loop without batches, padding or caches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from helpers.models import tiny_tokenizer
from lit_edit.datamodules import CounterFactDataModule
from transformers import GPT2Config, GPT2LMHeadModel

from lit_edit.evaluation.evaluate import Reference, evaluate, figures
from lit_edit.model.prompts import Prompter

RECORDS = 200


class Plain:
    """One text at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        before = self.tokenizer(prompt)["input_ids"]
        return before, self.tokenizer(f"{prompt} {answer}")["input_ids"][len(before) :]

    @torch.no_grad()
    def continued(self, before: list[int], n: int) -> list[int]:
        out: list[int] = []
        while len(out) < n:
            token = int(self.model(input_ids=torch.tensor([before + out])).logits[0, -1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            out.append(token)
        return out

    @torch.no_grad()
    def scored(self, before: list[int], wanted: list[int]) -> tuple[bool, float, float]:
        """(every token the likeliest, share of tokens that are, mean log-probability)."""
        logits = self.model(input_ids=torch.tensor([before + wanted])).logits[0, len(before) - 1 : -1]
        right = [int(row.argmax()) == token for row, token in zip(logits, wanted, strict=True)]
        logs = [float(row.log_softmax(-1)[token]) for row, token in zip(logits, wanted, strict=True)]
        return all(right), mean(map(float, right)), mean(logs)


@pytest.fixture
def records(real_file: Callable[[str], Path], tmp_path: Path) -> list[dict[str, Any]]:
    """The records, with three neighbours each, for time; also as ``real.json``."""
    text = real_file("counterfact/counterfact-full-1599.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)[:RECORDS]
    for record in found:
        record["neighborhood_prompts"] = record["neighborhood_prompts"][:3]
    (tmp_path / "real.json").write_text(json.dumps(found), encoding="utf-8")
    return found


def learnt(records: list[dict[str, Any]]) -> tuple[Any, Any]:
    """A small random model that was taught some of the new answers, so that not all of its answers are wrong."""
    tokenizer = tiny_tokenizer(bos=False)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 1024}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, **sizes)
    model = GPT2LMHeadModel(config).eval()
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    plain = Plain(model, tokenizer)
    for step in range(300):
        rewrite = records[step % 20]["requested_rewrite"]
        before, wanted = plain.split(rewrite["prompt"].format(rewrite["subject"]), rewrite["target_new"]["str"])
        ids = torch.tensor([before + wanted])
        labels = ids.clone()
        labels[0, : len(before)] = -100
        adam.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        adam.step()
    return model, tokenizer


@pytest.mark.slow
def test_the_figures_are_those_of_a_plain_loop(records: list[dict[str, Any]], tmp_path: Path) -> None:
    model, tokenizer = learnt(records)
    data = CounterFactDataModule(str(tmp_path / "real.json"), n_edits=RECORDS)
    data.setup("fit")
    prompter, reference, plain = Prompter.of(model, tokenizer), Reference(), Plain(model, tokenizer)
    reference.collect(model, prompter, data.requests)
    kept: dict[str, list[int]] = {}  # what the unedited model answers, as long as the recorded answer
    for record in records:
        for prompt in record["neighborhood_prompts"]:
            before, true = plain.split(prompt, record["requested_rewrite"]["target_true"]["str"])
            if len(kept.get(prompt, ())) < len(true):
                kept[prompt] = plain.continued(before, len(true)) or [tokenizer.eos_token_id]
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    sums: dict[str, list[float]] = {}

    def note(kind: str, values: dict[str, list[float]]) -> None:
        for way, scores in values.items():
            if scores:
                sums.setdefault(f"{way}/{kind}", []).append(mean(scores))

    edited = {(r["requested_rewrite"]["subject"], r["requested_rewrite"]["relation_id"]) for r in records}
    assert len(edited) == RECORDS  # no fact is edited twice
    outcomes = evaluate(model, prompter, data.requests, reference)
    for record, outcome in zip(records, outcomes, strict=True):
        rewrite = record["requested_rewrite"]
        new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        own = rewrite["prompt"].format(rewrite["subject"])
        for kind, prompts in (("reliability", [own]), ("generalization", record["paraphrase_prompts"])):
            values: dict[str, list[float]] = {"exact_match": [], "token_accuracy": [], "probability": []}
            for prompt in prompts:
                exact, share, of_new = plain.scored(*plain.split(prompt, new))
                _, _, of_true = plain.scored(*plain.split(prompt, true))
                values["exact_match"].append(float(exact))
                values["token_accuracy"].append(share)
                values["probability"].append(float(of_new > of_true))
            note(kind, values)
        # Neighbours that an edit is about, or whose subject one is about, count elsewhere.
        local = {q.prompt for q in outcome.questions if q.kind == "locality"}
        values = {"exact_match": [], "token_accuracy": [], "probability": []}
        for prompt in record["neighborhood_prompts"]:
            if prompt in local:
                before, _ = plain.split(prompt, new)
                exact, share, of_kept = plain.scored(before, kept[prompt])
                _, _, of_new = plain.scored(*plain.split(prompt, new))
                values["exact_match"].append(float(exact))
                values["token_accuracy"].append(share)
                values["probability"].append(float(of_kept > of_new))
        note("locality", values)

    found = figures(outcomes)
    for name in ("reliability", "generalization", "locality"):
        for way in ("exact_match", "token_accuracy", "probability"):
            key = name if way == "exact_match" else f"{way}/{name}"
            assert found[key] == pytest.approx(mean(sums[f"{way}/{name}"]), abs=1e-6), key
    for name in ("reliability", "generalization"):  # some right and some wrong: agreement says something
        assert 0 < found[f"token_accuracy/{name}"] < 1
        assert 0 < found[f"probability/{name}"] < 1
    assert found["count/reliability"] == RECORDS
    assert found["count/locality"] > 2 * RECORDS
