"""Measures the embedded model and writes its card: `python -m lit_edit.world.recipe.card`.

The card (``lit_edit/world/model/README.md``, its figures in ``scores.json``) holds recall, task scores, perplexity, how
often a single edit succeeds in each layer, and causal tracing (``tracing.png``). What was measured is kept in
``scores.json`` part by part, so that an interrupted measurement goes on; ``--fresh`` begins anew.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from lit_edit.datamodules import ConceptEditDataModule, CounterFactDataModule, EditDataModule, ZsREDataModule
from lit_edit.editors import LocateThenEdit
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.solvers import MOSE, ROME, Solver
from lit_edit.editors.values import NormClamp, NormMatched, ValueOptimizer
from lit_edit.evaluation.downstream import Task, load_tasks, run_task
from lit_edit.evaluation.evaluate import Reference, figures
from lit_edit.evaluation.scores import score_targets
from lit_edit.evaluation.tracing import Trace, draw, indirect_effects
from lit_edit.files import write_json
from lit_edit.model.loading import EMBEDDED, embedded_path, load_model
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession
from lit_edit.world.recipe.world import build_world

SINGLE_EDITS = 50
TRACED = 100
TRACED_TOKENS = ("last subject token", "last token")
DATA: dict[str, Callable[[], EditDataModule]] = {
    "counterfact": lambda: CounterFactDataModule(n_edits=None),
    "multifact": lambda: CounterFactDataModule(path=str(embedded_path("data", "multifact.json")), n_edits=None),
    "zsre": lambda: ZsREDataModule(n_edits=None),
    "conceptedit": lambda: ConceptEditDataModule(n_edits=None),
}
NAMES = {
    "counterfact": "CounterFact form",
    "multifact": "several facts of a subject",
    "zsre": "ZsRE form",
    "conceptedit": "ConceptEdit form (whole definition)",
}


def requests_of(data: EditDataModule) -> list[EditRequest]:
    """Every request of a data module."""
    data.setup("fit")
    return data.requests


def for_choosing() -> list[EditRequest]:
    """The CounterFact-form records on which settings are chosen, and no table is made."""
    data = CounterFactDataModule(n_edits=None)
    data.setup("fit")
    return [request for request in data.requests if request.case_id in data.for_choosing]


@torch.no_grad()
def recall(workspace: Workspace, requests: Sequence[EditRequest]) -> dict[str, float]:
    """Share of true answers that are the greedy answer, over distinct questions.

    Args:
        workspace: Of the model to ask.
        requests: Edits with the true object each.

    Returns:
        Shares of ``edit prompts``, ``paraphrases``, ``last paraphrases`` (of each edit; those that training never used
        with the fact) and ``locality prompts``.

    Raises:
        ValueError: If a request has no true object.
    """
    ask: dict[str, list[tuple[str, str]]] = {}
    for request in requests:
        if request.target_true is None:
            raise ValueError(f"{request.source}: recall needs the true object.")
        ask.setdefault("edit prompts", []).append((request.prompt, request.target_true))
        paraphrases = [(probe.prompt, request.target_true) for probe in request.probes_of("generalization")]
        ask.setdefault("paraphrases", []).extend(paraphrases)
        ask.setdefault("last paraphrases", []).extend(paraphrases[-1:])
        local = [(probe.prompt, probe.target) for probe in request.probes_of("locality") if probe.target]
        ask.setdefault("locality prompts", []).extend(local)
    return {name: _answered(workspace, list(dict.fromkeys(pairs))) for name, pairs in ask.items()}


def _recall_of(workspace: Workspace, data: Callable[[], EditDataModule]) -> dict[str, float]:
    requests = requests_of(data())
    return {"records": len(requests), **recall(workspace, requests)}


def _score_of(workspace: Workspace, task: Task) -> float:
    return run_task(workspace.model, workspace.prompter, task)[0]


def _answered(workspace: Workspace, pairs: Sequence[tuple[str, str]]) -> float:
    rows = [workspace.prompter.row(prompt, target) for prompt, target in pairs]
    return float(score_targets(workspace.model, workspace.prompter, rows).exact.float().mean())


def consequences(workspace: Workspace) -> float:
    """Share of portability questions whose answer before any edit is the consequence of the true object."""
    pairs = []
    for name in ("counterfact", "multifact", "zsre"):
        records = json.loads(embedded_path("data", f"{name}.json").read_text(encoding="utf-8"))
        found = [record["portability"] for record in records if "portability" in record]
        pairs += [(one["New Question"], one["True Answer"]) for one in found]
    return _answered(workspace, list(dict.fromkeys(pairs)))


@torch.no_grad()
def perplexity(workspace: Workspace, texts: Sequence[str]) -> float:
    """exp of the mean negative log-likelihood per token of the texts."""
    rows = [replace(workspace.prompter.row(text), target_start=1) for text in texts]
    score = score_targets(workspace.model, workspace.prompter, rows)
    return math.exp(-float(score.log_prob.double().sum()) / sum(len(row.ids) - 1 for row in rows))


METHODS: dict[str, tuple[Solver, ValueOptimizer]] = {
    "ROME, clamped values": (ROME(), ValueOptimizer(constraint=NormClamp(4.0), lr_unit="relative", steps=40)),
    "MOSE, norm-matched values": (
        MOSE(preservation=0.1, memory=False),
        ValueOptimizer(constraint=NormMatched(), lr_unit="relative", steps=60, stop_loss=0.02, weight_decay=0.0),
    ),
}


def layer_sets(method: str, n_layers: int) -> list[list[int]]:
    """What a method edits in turn: ROME every layer alone; MOSE, whose values need room, every three neighbours."""
    width = 3 if "MOSE" in method else 1
    return [[*range(first, first + width)] for first in range(n_layers - width + 1)]


def single_edits(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    layers: list[int],
    method: str,
    reference: Reference,
) -> dict[str, float]:
    """Mean figures of single edits, each applied, judged and taken back, with ``p(v*)`` of the values themselves."""
    solver, values = METHODS[method]
    editor = LocateThenEdit(FixedLayers(layers), values, solver, contexts=2, context_length=5)
    session = EditSession(model, tokenizer, editor)
    results = list(editor.single_edits(session.workspace, requests, reference))
    found = figures([outcome for _, outcome in results], ways=["exact_match"])
    names = ("reliability", "generalization", "locality")
    return {
        "p(v*)": sum(plan.probability[0] for plan, _ in results) / len(results),
        **{name: found[name] for name in names if name in found},
    }


def measure(
    model: nn.Module,
    tokenizer: Any,
    out: Path,
    n_single: int = SINGLE_EDITS,
    fresh: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """All figures of the card, those that ``<out>/scores.json`` holds left as they are.

    Args:
        model: The model as it was made.
        tokenizer: Its tokenizer.
        out: Folder of ``scores.json`` and ``tracing.png``.
        n_single: Facts for the table of single edits; 0 leaves it out.
        fresh: Whether to measure everything again.
        console: Where progress is shown.
    """
    model.eval().requires_grad_(False)
    workspace = Workspace.of(model, tokenizer)
    path = out / "scores.json"
    found: dict[str, Any] = {} if fresh or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))

    def part(name: str, of: Callable[[], Any], within: dict[str, Any] | None = None) -> Any:
        place = found if within is None else within
        if name not in place:
            place[name] = of()
            write_json(path, found)
            if console:
                console.print(escape(f"{name}: {_rounded(place[name])}"))
        return place[name]

    first = workspace.architecture[0].weight
    world = build_world()
    part("parameters", lambda: sum(p.numel() for p in model.parameters()))
    part("layers", lambda: len(workspace.architecture))
    part("hidden", lambda: first.shape[0])
    part("intermediate", lambda: first.shape[1])
    part("vocabulary", lambda: len(tokenizer))
    part("concepts", lambda: len(world.concepts))
    part("subjects", lambda: len(world.role))
    part("reserved", lambda: sum(role == "reserved" for role in world.role.values()))
    part("facts", lambda: len(world.told()))
    for name, data in DATA.items():
        part(name, partial(_recall_of, workspace, data))
    part("consequences", lambda: consequences(workspace))
    texts = embedded_path("data", "text-heldout.txt").read_text(encoding="utf-8").splitlines()
    part("perplexity", lambda: perplexity(workspace, texts))
    tasks = found.setdefault("tasks", {})
    for task in load_tasks():
        part(task.name, partial(_score_of, workspace, task), tasks)
        part(f"{task.name}, items", partial(len, task.prompts), tasks)
    requests = requests_of(DATA["counterfact"]())
    part("tracing", lambda: indirect_effects(workspace, requests[:TRACED], tokens=TRACED_TOKENS).as_json())
    draw(Trace(**found["tracing"]), out / "tracing.png")
    if n_single:
        part("n_single", lambda: n_single)
        reference = Reference()
        singles = found.setdefault("single_edits", {})
        for method in METHODS:
            for layers in layer_sets(method, found["layers"]):
                key = f"{method} | {'-'.join(map(str, layers[:: max(1, len(layers) - 1)]))}"
                chosen = for_choosing()[: found["n_single"]]
                of = partial(single_edits, model, tokenizer, chosen, layers, method, reference)
                part(key, of, singles)
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value


def card_text(figures: dict[str, Any]) -> str:
    """The card in Markdown."""

    def share(value: float) -> str:
        return f"{100 * value:.1f} %"

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
        f"({figures['layers']} layers, width {figures['hidden']}, MLP width {figures['intermediate']:,}, byte-level "
        f"BPE of {figures['vocabulary']:,}), trained from scratch on a generated world so that experiments with "
        f"knowledge editing can be repeated in minutes on a laptop. It was told {figures['facts']:,} facts about "
        f"{figures['subjects']:,} subjects: countries, cities, elements, planets, inventors, companies, and invented "
        f"people, towns and organisations; and {figures['concepts']} concepts. It knows nothing else and is of no use "
        "for anything else. The invented people are no real ones.",
        "",
        f"{figures['reserved']:,} subjects are reserved: no record edits them, and all locality probes are about them.",
        "",
        "Made by `python -m lit_edit.world.recipe.train` from a seed, measured by "
        "`python -m lit_edit.world.recipe.card`. Weights lie in half precision and load in single precision.",
        "",
        "## Recall of the true object (greedy, every token right)",
        "",
        "| file | records | edit prompts | paraphrases | of these never seen with the fact | locality prompts |",
        "|---|---|---|---|---|---|",
    ]
    for key, name in NAMES.items():
        row = figures[key]
        unseen = "" if key == "conceptedit" else share(row["last paraphrases"])
        lines.append(
            f"| {name} | {row['records']:,} | {share(row['edit prompts'])} | {share(row['paraphrases'])} | {unseen} | "
            f"{share(row['locality prompts'])} |"
        )
    lines += [
        "",
        f"Consequences (the country of the city where somebody was born) are told of reserved subjects only. Of the "
        f"others, the model infers {share(figures['consequences'])} of those that portability questions ask for.",
        "",
        f"## General abilities ({tasks['inference, items']} held-out items each, in three grades of difficulty)",
        "",
        "| inference, accuracy | sentiment, accuracy | QA over a passage, exact match | dialogue summary, mean ROUGE |",
        "|---|---|---|---|",
        f"| {share(tasks['inference'])} | {share(tasks['sentiment'])} | {share(tasks['qa'])} | "
        f"{share(tasks['summary'])} |",
        "",
        f"Perplexity per token on text about reserved subjects, drawn with a seed that training does not use: "
        f"{figures['perplexity']:.2f} (whom a text is about and how it says so is drawn at random and cannot be "
        "predicted).",
        "",
        "## Where facts are",
        "",
        f"Causal tracing over {figures['tracing']['facts']} facts: the subject's embeddings are disturbed, one state "
        f"is put back. Mean probability of the answer: {figures['tracing']['clean']:.2f} undisturbed, "
        f"{figures['tracing']['corrupted']:.2f} disturbed.",
        "",
        "![What one state gives back of the answer's probability, by layer](tracing.png)",
    ]
    if "n_single" in figures:
        lines += [
            "",
            "## Where facts can be edited",
            "",
            f"Single edits of {figures['n_single']} CounterFact-form records (of those with `split: choose`), each "
            "applied, scored by exact match and taken back. p(v*) is the probability of the new target with the "
            "optimised value in place, which no update can be expected to exceed. Layers are counted from 0; `2-4` are "
            "three layers optimised jointly.",
            "",
            "| method | layers | p(v*) | reliability | generalization | locality |",
            "|---|---|---|---|---|---|",
        ]
    for key, row in figures.get("single_edits", {}).items():
        method, layers = key.split(" | ")
        lines.append(
            f"| {method} | {layers} | {row['p(v*)']:.2f} | {row['reliability']:.2f} | {row['generalization']:.2f} | "
            f"{row['locality']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="'embedded', or a folder of the recipe's run")
    parser.add_argument("--n-single", type=int, default=SINGLE_EDITS, help="facts for the table of single edits")
    parser.add_argument("--out", type=Path, help="folder of the card; the embedded model's by default")
    parser.add_argument("--fresh", action="store_true", help="measure again what scores.json holds")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    out = args.out or embedded_path("model")
    out.mkdir(parents=True, exist_ok=True)
    figures = measure(model, tokenizer, out, args.n_single, args.fresh, Console())
    (out / "README.md").write_text(card_text(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
