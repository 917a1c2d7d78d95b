"""A run that collapses is stopped, or goes back to its last good point; in ordinary training and in editing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import assert_same_weights, data, quick_editor, taught, trainer, write_corpus
from lightning.pytorch import LightningModule, Trainer
from lit_edit.callbacks import (
    ActivationScore,
    CollapseGuard,
    EditCheckpoint,
    EditLog,
    EveryNEdits,
    Perplexity,
    Retention,
    UpdateOrthogonality,
)
from lit_edit.callbacks.perplexity import perplexity
from torch import nn

from lit_edit import LitEdit
from lit_edit.model.prompts import Prompter
from lit_edit.runs.outcomes import read_outcomes
from lit_edit.runs.results import ResultsLogger, read_results

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
]

Folder = Callable[[str], Path]


class Health(EveryNEdits):
    """A figure that falls from 1 to a value when a count is reached; and notes when it was measured."""

    def __init__(self, at: int, falls_to: float = 0.0, every_n: int = 2, **settings: Any) -> None:
        super().__init__(every_n, **settings)
        self.at, self.falls_to, self.counts = at, falls_to, list[int]()

    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        again = bool(self.counts) and self.counts[-1] == edits  # after going back all is well
        self.counts.append(edits)
        return {"health": self.falls_to if edits >= self.at and not again else 1.0}


def guard(**settings: Any) -> CollapseGuard:
    return CollapseGuard(at_least={"health": 0.5}, **settings)


@pytest.mark.parametrize("falls_to", [0.0, math.nan, -math.inf])
def test_training_stops_when_a_figure_leaves_its_bounds(falls_to, regression, make_trainer, vector_loader, tmp_path):
    health, logger = Health(at=4, falls_to=falls_to), ResultsLogger(tmp_path)
    fitting = make_trainer(guard(), health, logger=logger)  # listed first, it still judges last
    with pytest.warns(UserWarning, match=r"After 4 edits health is .*The run ends here"):
        fitting.fit(regression, vector_loader(64))
    assert health.counts == [0, 2, 4, 5]  # Lightning ends ordinary training with the batch at hand
    (collapse,) = read_results(tmp_path).run["collapses"]
    assert (collapse["edits"], collapse["figure"], collapse["stopped"], collapse["went_back_to"]) == (
        4, "health", True, None,
    )  # fmt: skip


def test_a_healthy_run_is_left_alone(regression, make_trainer, vector_loader, tmp_path, recwarn):
    health, logger = Health(at=100), ResultsLogger(tmp_path)
    make_trainer(health, guard(), logger=logger).fit(regression, vector_loader(32))
    assert health.counts == [0, 2, 4, 6, 8]
    assert "collapses" not in read_results(tmp_path).run
    assert not [w for w in recwarn if "health" in str(w.message)]


def test_bounds_can_be_multiples_of_the_beginning(regression, make_trainer, vector_loader):
    with pytest.warns(UserWarning, match=r"After 4 edits health is 0, below 0.25"):
        make_trainer(Health(at=4), CollapseGuard(at_least={"health": 0.25}, relative=True)).fit(
            regression, vector_loader(32)
        )
    with pytest.raises(ValueError, match="was not measured: set `at_start`"):
        make_trainer(Health(at=9, at_start=False), CollapseGuard(at_most={"health": 2}, relative=True)).fit(
            regression, vector_loader(32)
        )


def test_bounds_that_cannot_work_are_refused(regression, make_trainer, vector_loader):
    with pytest.raises(ValueError, match="needs finite bounds"):
        CollapseGuard()
    with pytest.raises(ValueError, match="needs finite bounds"):
        CollapseGuard(at_most={"perplexity": math.inf})
    with pytest.raises(ValueError, match="go back, stop, or both"):
        CollapseGuard(at_most={"perplexity": 9}, stop=False)
    with pytest.raises(ValueError, match=r"bound for 'helth', which no callback measures. Measured are health\."):
        make_trainer(Health(at=9), CollapseGuard(at_most={"helth": 1})).fit(regression, vector_loader(8))
    with pytest.raises(TypeError, match="Regression cannot take edits back"):
        make_trainer(Health(at=9), guard(go_back=True)).fit(regression, vector_loader(8))


@pytest.fixture
def module(tiny_folder: Folder, tmp_path: Path) -> LitEdit:
    return LitEdit(quick_editor("rome", contexts=False), str(tiny_folder("llama")), corpus=str(write_corpus(tmp_path)))


def test_an_editing_run_goes_back_and_ends(module: LitEdit, tiny_folder: Folder, tmp_path: Path) -> None:
    run, health = tmp_path / "run", Health(at=4)
    updates = UpdateOrthogonality()
    watching = [guard(go_back=True), Retention(2), updates, EditLog(), EditCheckpoint(every_n=2), health]
    with pytest.warns(UserWarning, match=r"health is 0, below 0.5. 2 edits were taken back, to 2. The run ends here"):
        trainer(tmp_path, *watching, logger=ResultsLogger(run)).fit(module, datamodule=data(tmp_path, 7))
    assert health.counts == [0, 2, 4, 4]  # no further edit is made
    assert [edit.status for edit in module.journal] == ["written", "written", "undone", "undone"]
    plain = LitEdit(quick_editor("rome", contexts=False), str(tiny_folder("llama")), corpus=module.preparation.corpus)
    trainer(tmp_path / "plain").fit(plain, datamodule=data(tmp_path, 2))
    assert_same_weights(module.model, plain.model)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["after"], event["numbers"]) for event in events] == [
        ("collapsed", 4, []), ("undone", 4, [3, 4]),
    ]  # fmt: skip
    assert events[1]["reason"] == "collapse: health is 0, below 0.5"
    results = read_results(run)
    assert [c["went_back_to"] for c in results.run["collapses"]] == [2]
    assert results.records[-1]["health"] == 1  # that of the weights as they are now
    assert [row["number"] for row in read_outcomes(run) if row["edits"] == 4] == [1, 2]
    saved = torch.load(run / "checkpoints" / "edits.ckpt", weights_only=True)
    assert [edit["status"] for edit in saved["lit_edit"]["journal"]["edits"]] == [e.status for e in module.journal]
    assert list(updates.kept) == [1, 2]


def test_an_editing_run_goes_back_and_on(module: LitEdit, tmp_path: Path) -> None:
    health, scores = Health(at=3, every_n=3), ActivationScore()
    watching = [health, guard(go_back=True, stop=False), Retention(3), scores]
    with pytest.warns(UserWarning, match=r"[32] edits were taken back, to [03]. The run goes on"):
        trainer(tmp_path, *watching, logger=ResultsLogger(tmp_path / "run")).fit(module, datamodule=data(tmp_path, 5))
    # Two collapses: the second at the end, where what came since the first goes.
    assert [edit.status for edit in module.journal] == ["undone"] * 5
    assert read_results(tmp_path / "run").records[-1]["reliability"] == 0
    rows = [row["status"] for row in read_outcomes(tmp_path / "run") if row["edits"] == 5]
    assert rows == ["to come"] * 5
    session = module.session
    assert session is not None
    assert not any(site.edited for site in session.sites)
    assert len(read_results(tmp_path / "run").run["collapses"]) == 2


def test_perplexity_is_that_of_all_tokens(tiny_folder: Folder, tmp_path: Path) -> None:
    model, tokenizer = taught(tiny_folder("llama"), steps=5)
    texts = ["The capital of France is Lyon.", "", "Maria was born in Oslo and lives there."]
    losses: list[float] = []
    model.requires_grad_(False)
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        if ids.shape[1] > 1:
            log_p = model(input_ids=ids).logits.double().log_softmax(-1)
            losses += [-float(log_p[0, i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1)]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, Prompter.of(model, tokenizer), texts) == pytest.approx(expected, rel=1e-4)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts))
    callback = Perplexity(str(file))
    trainer(tmp_path, callback).fit(LitEdit(quick_editor("ft"), model, tokenizer), datamodule=data(tmp_path, 1))
    assert callback.texts == [texts[0], texts[2]]
    assert callback.latest["perplexity"] > 1
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    assert math.isnan(perplexity(model, Prompter.of(model, tokenizer), texts))
    with pytest.raises(ValueError, match="There is no text"):
        Perplexity(["", " "])
    with pytest.raises(ValueError, match="n_texts should be positive"):
        Perplexity(n_texts=0)


def test_perplexity_needs_a_language_model(regression, make_trainer, vector_loader):
    with pytest.raises(TypeError, match="needs `model` and `tokenizer` in Regression"):
        make_trainer(Perplexity(["a b"])).fit(regression, vector_loader(4))
    assert isinstance(regression.net, nn.Module)
