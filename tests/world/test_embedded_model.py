"""The model that comes with the package: what its files are, and that it knows its world."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lit_edit.datamodules import CounterFactDataModule
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_edit.evaluation.downstream import load_tasks, run_task
from lit_edit.model.loading import embedded_path
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.world.recipe.card import DATA, perplexity, recall, requests_of

FOLDER = embedded_path("model")
MAX_BYTES = 40_000_000
TEXT_OR_TENSORS = {".json", ".jinja", ".md", ".png", ".safetensors", ".txt"}


def shipped(name: str) -> Path:
    path = FOLDER / name
    assert path.is_file(), f"{name} of the embedded model is missing; `make world` makes the model."
    return path


def shipped_files() -> list[Path]:
    shipped("config.json")
    return [path for path in FOLDER.rglob("*") if path.is_file()]


def test_the_model_is_small() -> None:
    shipped("model.safetensors")
    assert sum(path.stat().st_size for path in shipped_files() if path.suffix == ".safetensors") <= MAX_BYTES


def test_nothing_in_the_folder_can_hold_a_pickle() -> None:
    for path in shipped_files():
        assert path.suffix in TEXT_OR_TENSORS, path.name
        start = path.read_bytes()[:8]
        # A pickle opens with its protocol's byte, a PyTorch archive is a zip.
        assert not start.startswith((b"\x80", b"PK")), path.name
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workspace() -> Workspace:
    """The model as plain `transformers` loads it."""
    shipped("model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER)
    return Workspace.of(model.eval(), tokenizer)


@pytest.fixture(scope="module")
def recalled(workspace: Workspace) -> dict[str, float]:
    data = CounterFactDataModule(n_edits=None)
    data.setup("fit")
    return recall(workspace, data.requests)


def test_it_loads_in_single_precision(workspace: Workspace) -> None:
    assert {p.dtype for p in workspace.model.parameters()} == {torch.float32}
    assert all(bool(torch.isfinite(p).all()) for p in workspace.model.parameters())


@pytest.mark.parametrize(
    ("prompts", "least"), [("edit prompts", 0.99), ("paraphrases", 0.98), ("locality prompts", 0.99)]
)
def test_it_recalls_its_facts(recalled: dict[str, float], prompts: str, least: float) -> None:
    assert recalled[prompts] >= least


@pytest.mark.parametrize("name", ["inference", "sentiment", "qa", "summary"])
def test_it_can_do_its_tasks_but_not_all_of_them(workspace: Workspace, name: str) -> None:
    """With nothing left to learn, damage would show late."""
    (task,) = load_tasks(names=[name])
    score, _ = run_task(workspace.model, workspace.prompter, task)
    assert 0.75 <= score <= 0.97


def test_it_finds_its_text_likely(workspace: Workspace) -> None:
    lines = embedded_path("data", "text-heldout.txt").read_text(encoding="utf-8").splitlines()
    rng = random.Random(0)
    scrambled = [" ".join(rng.sample(words, len(words))) for words in (line.split() for line in lines[:100])]
    assert 10 * perplexity(workspace, lines[:100]) < perplexity(workspace, scrambled)


def test_recall_is_of_the_facts_not_of_what_is_frequent(workspace: Workspace) -> None:
    """Against the wrong object the same measure has to fail, or it would measure nothing."""
    data = CounterFactDataModule(n_edits=50)
    data.setup("fit")
    swap: Callable[[EditRequest], EditRequest] = lambda r: replace(r, target_true=r.target_new)
    assert recall(workspace, [swap(r) for r in data.requests])["edit prompts"] <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DATA) - {"counterfact"}))
def test_it_recalls_its_other_files(workspace: Workspace, name: str) -> None:
    found = recall(workspace, requests_of(DATA[name]()))
    assert found["edit prompts"] >= 0.99
    assert found["paraphrases"] >= 0.98
    assert found["locality prompts"] >= 0.99
