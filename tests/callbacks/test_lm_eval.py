"""Tasks of lm-evaluation-harness on the model in memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import trainer
from lightning.pytorch import LightningModule
from lit_edit.callbacks import LMEval
from lit_edit.callbacks.lm_eval import harness_figures
from torch.utils.data import DataLoader

from lit_edit import load_model
from lit_edit.runs.results import ResultsLogger, read_results

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
]

ITEMS = [
    {"question": f"The capital of {country} is", "options": ["Lyon", "Lima", "Oslo", "Rome"], "gold": i % 4}
    for i, country in enumerate(("France", "Peru", "Norway", "Italy", "Kenya", "Nepal", "Chile", "Ghana"))
]
TASK = """\
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


class Shaken(LightningModule):
    """Training that changes the weights without an optimiser, as editing does."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.tokenizer, self.edits_applied = model, tokenizer, 0
        self.seen: list[float] = [plain_accuracy(model, tokenizer)]

    @torch.no_grad()
    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator = torch.Generator().manual_seed(self.edits_applied)
        for weight in self.model.parameters():
            weight.add_(0.5 * torch.randn(weight.shape, generator=generator) * weight.std())
        self.edits_applied += 1
        self.seen.append(plain_accuracy(self.model, self.tokenizer))

    def configure_optimizers(self) -> None: ...


@torch.no_grad()
def plain_accuracy(model: Any, tokenizer: Any) -> float:
    right = 0
    for item in ITEMS:
        logs = []
        for option in item["options"]:  # type: ignore[attr-defined]
            ids = tokenizer(f"{item['question']} {option}")["input_ids"]
            start = len(tokenizer(item["question"])["input_ids"])
            found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            logs.append(sum(float(found[t - 1, ids[t]]) for t in range(start, len(ids))))
        right += logs.index(max(logs)) == item["gold"]
    return right / len(ITEMS)


@pytest.fixture
def task_file(tmp_path: Path) -> str:
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    (tmp_path / "capitals.yaml").write_text(TASK.format(data=tmp_path / "capitals.jsonl"))
    return str(tmp_path / "capitals.yaml")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and what it needs
def test_a_local_task_on_the_weights_as_they_are(
    tiny_folder: Callable[[str], Path], tmp_path: Path, task_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures as a plain loop over the weights after exactly so many edits, which stay as they are."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    modules = [Shaken(*load_model(str(tiny_folder("gpt2")))) for _ in range(2)]
    callback = LMEval([task_file], every_n=2)
    loader: Any = DataLoader([0] * 5)  # type: ignore[arg-type]
    trainer(tmp_path, callback, logger=ResultsLogger(tmp_path)).fit(modules[0], loader)
    trainer(tmp_path).fit(modules[1], loader)
    found = {record["edits"]: record["lm_eval/capitals/acc"] for record in read_results(tmp_path).records}
    assert found == {count: modules[0].seen[count] for count in (0, 2, 4, 5)}
    assert len(set(found.values())) > 1
    torch.testing.assert_close(dict(modules[0].state_dict()), dict(modules[1].state_dict()), rtol=0, atol=0)

    unknown = LMEval([task_file])
    unknown.tasks = ["capitols"]
    with pytest.raises(ValueError, match="lm_eval cannot load capitols"):
        trainer(tmp_path, unknown).fit(modules[1], loader)


def test_figures_by_hand() -> None:
    results = {
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.1,
            "exact_match,flexible-extract": 0.5,
        },
        "wikitext": {"word_perplexity,none": 12, "word_perplexity_stderr,none": "N/A"},
    }
    assert harness_figures(results) == {
        "lm_eval/gsm8k/exact_match/strict-match": 0.25,
        "lm_eval/gsm8k/exact_match/flexible-extract": 0.5,
        "lm_eval/wikitext/word_perplexity": 12.0,
    }


def test_settings(task_file: str, tmp_path: Path) -> None:
    assert LMEval(["piqa", task_file]).tasks == ["piqa", "capitals"]
    assert LMEval().tasks == []
    with pytest.raises(ValueError, match="lm_eval needs batch_size >= 1, limit >= 1"):
        LMEval(["piqa"], limit=0)
    with pytest.raises(ValueError, match=r"nowhere\.yaml' cannot be read"):
        LMEval(["nowhere.yaml"])
    (tmp_path / "none.yaml").write_text("group: x")
    with pytest.raises(ValueError, match="a line `task: name` is needed"):
        LMEval([str(tmp_path / "none.yaml")])


def test_without_the_harness_it_says_what_to_install(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    module = Shaken(*load_model(str(tiny_folder("gpt2"))))
    with pytest.raises(ValueError, match=r"not installed .*pip install 'lit-edit\[eval\]'"):
        trainer(tmp_path, LMEval(["piqa"])).fit(module, DataLoader([0]))  # type: ignore[arg-type]
    trainer(tmp_path, LMEval()).fit(module, DataLoader([0]))  # type: ignore[arg-type]
    assert module.edits_applied == 1
