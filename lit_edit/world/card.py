"""Measures the embedded model and writes its card: `python -m lit_edit.world.card`.

The card (``lit_edit/world/model/README.md``, its figures in ``scores.json``) holds recall, task scores, perplexity, and
how often a single edit succeeds in each layer.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lit_edit.datamodules import ConceptEditDataModule, CounterFactDataModule, EditDataModule, ZsREDataModule
from lit_edit.editors import LocateThenEdit
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.solvers import MOSE, ROME, Solver
from lit_edit.editors.values import NormClamp, NormMatched, ValueOptimizer
from lit_edit.evaluation.downstream import load_tasks, run_task
from lit_edit.evaluation.evaluate import figures
from lit_edit.evaluation.scores import score_targets
from lit_edit.model.loading import EMBEDDED, embedded_path, load_model
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession


def requests_of(data: EditDataModule) -> list[EditRequest]:
    """Every request of a data module."""
    data.setup("fit")
    return data.requests


def recall(workspace: Workspace, requests: Sequence[EditRequest]) -> dict[str, float]:
    """Share of true objects that are the greedy answer: edit prompts, each paraphrase, locality prompts."""
    ask: dict[str, list[tuple[str, str]]] = {}
    for request in requests:
        if request.target_true is None:
            raise ValueError(f"{request.source}: recall needs the true object.")
        ask.setdefault("edit prompts", []).append((request.prompt, request.target_true))
        for i, probe in enumerate(request.probes_of("generalization")):
            ask.setdefault("paraphrases", []).append((probe.prompt, request.target_true))
            ask.setdefault(f"paraphrase {i + 1}", []).append((probe.prompt, request.target_true))
        for probe in request.probes_of("locality"):
            if probe.target:
                ask.setdefault("locality prompts", []).append((probe.prompt, probe.target))
    out = {}
    for name, pairs in ask.items():
        rows = [workspace.prompter.row(p, t) for p, t in dict.fromkeys(pairs)]
        out[name] = float(score_targets(workspace.model, workspace.prompter, rows).exact.float().mean())
    return out


@torch.no_grad()
def perplexity(workspace: Workspace, texts: Sequence[str]) -> float:
    """exp of the mean negative log-likelihood per token of the texts."""
    rows = [workspace.prompter.row(text) for text in texts]
    rows = [replace(row, target_start=1) for row in rows]
    score = score_targets(workspace.model, workspace.prompter, rows)
    tokens = sum(len(r.ids) - 1 for r in rows)
    return math.exp(-float(score.log_prob.double().sum()) / tokens)


METHODS: dict[str, tuple[Solver, ValueOptimizer]] = {
    "ROME, clamped values": (ROME(), ValueOptimizer(constraint=NormClamp(4.0), lr_unit="relative", steps=40)),
    "MOSE, norm-matched values": (
        MOSE(preservation=1.0, memory=False),
        ValueOptimizer(constraint=NormMatched(), lr_unit="relative", steps=80, weight_decay=0.0),
    ),
}


def single_edits(
    model: nn.Module, tokenizer: Any, requests: Sequence[EditRequest], layers: list[int], method: str
) -> dict[str, float]:
    """Mean reliability, generalization and locality of single edits: each applied, scored and taken back."""
    solver, values = METHODS[method]
    editor = LocateThenEdit(FixedLayers(layers), values, solver, contexts=5, context_length=5)
    session = EditSession(model, tokenizer, editor)
    found = list(editor.single_edits(session.workspace, requests))
    scores = figures([outcome for _, outcome in found], ["exact_match"])
    return {"p(v*)": sum(plan.probability[0] for plan, _ in found) / len(found), **scores}


def measure(model: nn.Module, tokenizer: Any, n_single: int = 24, console: Console | None = None) -> dict[str, Any]:
    """All figures of the card."""
    say = console.print if console else lambda *_: None
    model.eval().requires_grad_(False)
    workspace = Workspace.of(model, tokenizer)
    counterfact = requests_of(CounterFactDataModule(n_edits=None))
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(workspace.architecture),
        "hidden": workspace.architecture[0].weight.shape[0],
        "intermediate": workspace.architecture[0].weight.shape[1],
        "vocabulary": len(tokenizer),
        "n_single": n_single,
        "counterfact": recall(workspace, counterfact),
        "zsre": recall(workspace, requests_of(ZsREDataModule(n_edits=None))),
        "conceptedit": recall(workspace, requests_of(ConceptEditDataModule(n_edits=None))),
        "perplexity": perplexity(
            workspace, embedded_path("data", "text-heldout.txt").read_text(encoding="utf-8").splitlines()
        ),
    }
    say(figures)
    figures["tasks"] = {task.name: run_task(model, workspace.prompter, task)[0] for task in load_tasks()}
    say(figures["tasks"])
    n_layers = len(workspace.architecture)
    sets = [[i] for i in range(n_layers)] + [[i - 1, i, i + 1] for i in range(1, n_layers - 1, 2)]
    figures["single_edits"] = {}
    for method in METHODS:
        for layers in sets if n_single else []:
            key = f"{method} | {'-'.join(map(str, layers[:: max(1, len(layers) - 1)]))}"
            figures["single_edits"][key] = single_edits(model, tokenizer, counterfact[:n_single], layers, method)
            say(key, {k: round(v, 2) for k, v in figures["single_edits"][key].items()})
    return figures


def card_text(figures: dict[str, Any]) -> str:
    """The card in Markdown."""

    def share(value: float) -> str:
        return f"{100 * value:.1f} %"

    counterfact, zsre, concept = figures["counterfact"], figures["zsre"], figures["conceptedit"]
    tasks = figures["tasks"]
    lines = [
        "---",
        "license: apache-2.0",
        "language: en",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "# The embedded model",
        "",
        f"A Llama-architecture causal language model of {figures['parameters'] / 1e6:.1f} million parameters "
        f"({figures['layers']} layers, width {figures['hidden']}, MLP width {figures['intermediate']}, byte-level BPE "
        f"of {figures['vocabulary']:,}), trained from scratch on a generated world so that experiments with knowledge "
        "editing can be repeated in minutes on a laptop. It knows countries, cities, elements, planets, inventors, "
        "companies, seventy-two concepts, and some three hundred invented people and organisations; it knows nothing "
        "else and is of no use for anything else. The invented people are no real ones.",
        "",
        "Made by `python -m lit_edit.world.train` from a seed, measured by `python -m lit_edit.world.card`. Weights "
        "lie in half precision and load in single precision.",
        "",
        "## Recall of the true object (greedy, every token right)",
        "",
        "| file | edit prompts | paraphrases | of these never seen with the fact | locality prompts |",
        "|---|---|---|---|---|",
        f"| CounterFact form | {share(counterfact['edit prompts'])} | {share(counterfact['paraphrases'])} | "
        f"{share(counterfact['paraphrase 2'])} | {share(counterfact['locality prompts'])} |",
        f"| ZsRE form | {share(zsre['edit prompts'])} | {share(zsre['paraphrases'])} | "
        f"{share(zsre['paraphrases'])} | {share(zsre['locality prompts'])} |",
        f"| ConceptEdit form (whole definition) | {share(concept['edit prompts'])} | "
        f"{share(concept['paraphrases'])} | | {share(concept['locality prompts'])} |",
        "",
        "## General abilities (200 held-out items each)",
        "",
        "| inference, accuracy | sentiment, accuracy | QA over a passage, exact match | dialogue summary, mean ROUGE |",
        "|---|---|---|---|",
        f"| {share(tasks['inference'])} | {share(tasks['sentiment'])} | {share(tasks['qa'])} | "
        f"{tasks['summary']:.2f} |",
        "",
        f"Perplexity per token on running text drawn with a seed that training does not use: "
        f"{figures['perplexity']:.2f} (the names and templates of that text are drawn at random and cannot be "
        "predicted).",
        "",
        "## Where facts can be edited",
        "",
        f"Single edits of the first {figures['n_single']} CounterFact-form records, each applied, scored by exact "
        "match and taken back. p(v*) is the probability of the new target with the optimised value in place, which no "
        "update can be expected to exceed. Layers are counted from 0; `2-4` are three layers optimised jointly.",
        "",
        "| method | layers | p(v*) | reliability | generalization | locality |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in figures["single_edits"].items():
        method, layers = key.split(" | ")
        lines.append(
            f"| {method} | {layers} | {row['p(v*)']:.2f} | {row['reliability']:.2f} | {row['generalization']:.2f} | "
            f"{row['locality']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--n_single", type=int, default=24, help="requests for the table of single edits")
    parser.add_argument("--out", type=Path, default=None, help="where the card goes; the embedded model's folder")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    figures = measure(model, tokenizer, args.n_single, Console())
    out = args.out or embedded_path("model", "README.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(card_text(figures), encoding="utf-8")
    out.with_name("scores.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
