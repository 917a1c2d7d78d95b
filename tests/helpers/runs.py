"""Small runs for the tests of the module, the command line and the callbacks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lit_edit.datamodules import FactsDataModule

from lit_edit import EditRequest, load_editor, load_model
from lit_edit.editors import LocateThenEdit
from lit_edit.editors.layers import ActivationSelection, FixedLayers
from lit_edit.requests import Probe
from lit_edit.runs.journal import Journal

# Long enough for full statistics of a tiny model, short enough to take no time.
CORPUS = "".join(
    f"The {a} of {b} is known for its {c}.\n"
    for a in ("capital", "river", "king", "harbour", "language")
    for b in ("France", "Oslo", "Peru", "Kenya")
    for c in ("music", "bridges", "old trees")
)
PLACES = (("France", "Lyon"), ("Peru", "Oslo"), ("Kenya", "Rome"), ("Chile", "Paris"), ("Nepal", "Lima"))
PLACES += (("Ghana", "Bern"), ("Japan", "Cork"))


def facts(count: int) -> list[dict[str, Any]]:
    """Records with a rephrasing and a locality probe each."""
    return [
        {
            "case_id": f"c{i}",
            "prompt": f"The capital of {country} is",
            "subject": country,
            "target_new": city,
            "rephrase_prompt": f"The king of {country} lives in",
            "locality_prompt": f"The river of {PLACES[i - 1][0]} is",
            "locality_ground_truth": "long and old",
        }
        for i, (country, city) in enumerate(PLACES[:count])
    ]


def write_facts(folder: Path, count: int = 6, **changes: Any) -> Path:
    """A file of facts; ``changes`` are put into the second record."""
    records = facts(count)
    records[min(1, count - 1)].update(changes)
    path = folder / "facts.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def write_corpus(folder: Path) -> Path:
    """A text for key covariances."""
    path = folder / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return path


def command_line(model: Path, root: Path, method: str = "memit", count: int = 3, **changes: Any) -> list[str]:
    """``fit`` by a configuration on a tiny model and a small file of facts, with few steps, all files in a folder."""
    if method in ("mose", "mose-key"):
        layers = "--model.editor.layers.steps=2"
    else:
        layers = f"--model.editor.layers.layers={'[1]' if method == 'rome' else '[1,2]'}"
    return [
        *("fit", "--config", f"{method}.yaml", "--model.model", str(model)),
        *("--model.corpus", str(write_corpus(root)), "--model.editor.values.steps=2", layers),
        *("--data", "FactsDataModule", "--data.path", str(write_facts(root, count, **changes)), "--data.n_edits=null"),
        *("--trainer.default_root_dir", str(root), "--trainer.accelerator=cpu", "--downstream.n_items=0"),
    ]


def asked(count: int) -> list[EditRequest]:
    """The same as requests."""
    return [
        EditRequest(
            record["case_id"],
            record["prompt"],
            record["subject"],
            record["target_new"],
            probes=(
                Probe("generalization", record["rephrase_prompt"], record["target_new"]),
                Probe("locality", record["locality_prompt"], record["locality_ground_truth"]),
            ),
        )
        for record in facts(count)
    ]


def quick_editor(method: str, contexts: bool = True) -> Any:
    """A configuration's editor with few steps, in layers 1 and 2, or 2 alone; without generated contexts if asked."""
    editor: Any = load_editor(method)
    if not isinstance(editor, LocateThenEdit):
        editor.layers, editor.steps = [1, 2], 3
        return editor
    editor.values.steps = 3
    if not contexts:
        editor._contexts = (0, 1)
    policy: Any = editor.layers
    if isinstance(policy, ActivationSelection):
        policy.steps = 2
    elif isinstance(policy, FixedLayers) and len(policy.layers) == 1:
        policy.layers = (2,)
    else:
        policy.layers = type(policy.layers)((1, 2))
    return editor


def one_layer_editor(method: str) -> Any:
    """A configuration's editor in one layer, without contexts and KL."""
    editor = quick_editor(method, contexts=False)
    editor.layers = FixedLayers([2])
    editor.values.steps, editor.values.kl_factor = 15, 0.0
    if method == "rome":
        editor.solver.needs_covariance = False
    else:
        editor.solver.preservation = 1e-6
    return editor


def data(folder: Path, count: int = 6, batch_size: int = 1) -> FactsDataModule:
    """A data module over `facts`."""
    return FactsDataModule(str(write_facts(folder, count)), batch_size=batch_size)


def trainer(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """A trainer that says and keeps nothing unless told to."""
    defaults: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | settings))


def entries(journal: Journal) -> list[dict[str, Any]]:
    """What a journal says, but for the time it took."""
    return [{k: v for k, v in asdict(edit).items() if k not in ("seconds", "stages")} for edit in journal]


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Every weight and buffer the same, bit by bit."""
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


class PowerCut(Callback):
    """Ends the run with an error before a batch; for the command line, which takes callbacks by their class."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise RuntimeError("power cut")


class PowerCutOnce(PowerCut):
    """The same, but only the first time: afterwards a file says that it has happened."""

    def __init__(self, batch: int, mark: str) -> None:
        super().__init__(batch)
        self.mark = Path(mark)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and not self.mark.exists():
            self.mark.touch()
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


SENTENCES = (
    "The capital of France is Lyon.",
    "The capital of Peru is Lima.",
    "Maria was born in Oslo.",
    "The river of Peru runs slowly to the sea.",
    "Question: is snow cold? Answer: yes\nQuestion: is fire cold? Answer: no",
)


def taught(folder: Path, steps: int = 150) -> tuple[Any, Any]:
    """A tiny model, and its tokenizer, that knows `SENTENCES` by heart and ends where they end."""
    model, tokenizer = load_model(str(folder))
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in SENTENCES]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        adam.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        adam.step()
    model.zero_grad(set_to_none=True)
    return model, tokenizer


TEXTS = [
    f"The {a} of {b} is known for its {c}." for a in ("king", "river") for b in ("Oslo", "Rome") for c in "abcdefgh"
]
FACTS = [
    EditRequest("1", "The capital of France is", "France", "Oslo"),
    EditRequest("2", "Maria of Rome was born in", "Maria of Rome", "Paris"),
]
