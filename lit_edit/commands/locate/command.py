"""The command: facts the model knows, tracing, search, and what is left in a folder."""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_edit.algebra.linalg import fill_silent
from lit_edit.commands.locate.picture import draw_findings
from lit_edit.commands.locate.search import (
    FIGURES,
    FLOOR,
    Bench,
    Clock,
    Found,
    Setting,
    candidates,
    finalists,
    judge,
    search,
    strength_of,
    winner,
    with_locality,
)
from lit_edit.commands.options import Parser
from lit_edit.configs.find import read_config
from lit_edit.datamodules import CounterFactDataModule, EditDataModule
from lit_edit.evaluation.scores import score_targets
from lit_edit.evaluation.tracing import TOKENS, Trace, mean_trace, subject_spread, trace_fact
from lit_edit.files import write_json
from lit_edit.model.families import Family
from lit_edit.model.loading import DTYPES, EMBEDDED, load_model, on_terminal
from lit_edit.model.prompts import check_requests, sample_contexts
from lit_edit.model.workspace import Workspace
from lit_edit.program import program
from lit_edit.requests import EditRequest
from lit_edit.session import Preparation
from lit_edit.statistics import KeyCollector
from lit_edit.units import counted, time_text

SUMMARY = "Find out where a model can be edited, and write a configuration for it."

_DESCRIPTION = """\
Finds out where a model can be edited: by causal tracing (which states carry a fact; ROME's figure), and by single edits
of facts that the model knows, by method, layer and lambda, each written, judged and taken back. What is best is judged
once more on facts that it was not chosen on. Leaves a picture, a table, all figures, and a configuration for `fit`, or
says that nothing can be edited."""

_EPILOG = """\
Without --facts the facts are those of the embedded world, of which a real model knows those about countries, cities and
the like. The budget is for tracing and trials: loading the model and collecting key covariances come on top.

  python train.py locate --model gpt2-xl --corpus texts.txt
  python train.py locate --model my-model --facts facts.csv --budget 1800 --methods memit mose-key
  python train.py fit --config locate/my-model/memit.yaml"""

_ASKED = 400  # facts to ask for at most, to find those that are known
_TRACED, _TRACE_SHARE = 24, 0.25  # facts at most, and what part of the budget they may take
_FEWEST = 2  # facts that a search takes


def parser() -> Parser:
    """The options of ``locate``."""
    options = Parser("locate", _DESCRIPTION, _EPILOG)
    options.add_argument("--model", default=EMBEDDED, help="embedded, a folder, or a name on the Hugging Face hub")
    options.add_argument("--dtype", default="float32", choices=list(DTYPES), help="default: %(default)s")
    options.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    options.add_argument("--family", type=_family, metavar="YAML", help="as --model.family of fit")
    options.add_argument("--facts", metavar="FILE", help="facts to try, in any form that fit reads")
    options.add_argument("--corpus", default=EMBEDDED, help="text for the key covariances, as --model.corpus of fit")
    options.add_argument("--corpus_tokens", type=int, default=50_000, metavar="N", help="default: %(default)s")
    options.add_argument("--cache_dir", metavar="FOLDER", help="folder of the key covariances, as for fit")
    options.add_argument("--budget", type=float, default=300, metavar="SECONDS", help="default: %(default)s")
    options.add_argument(
        "--methods", nargs="+", default=["rome", "memit", "mose-key"], metavar="CONFIG", help="default: %(default)s"
    )
    options.add_argument("--layers", nargs="+", type=int, metavar="LAYER", help="to try one by one (default: all)")
    options.add_argument("--sample", type=int, default=16, metavar="N", help="facts to judge by (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of the sample and the contexts (default: %(default)s)")
    options.add_argument("--out", type=Path, metavar="FOLDER", help="default: locate/<model>")
    return options


def _family(text: str) -> Family:
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError("is not of the form '{blocks: ..., down_projection: ..., transposed: false}'")
    try:
        return Family(**content)
    except TypeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass
class Findings:
    """All that was found out.

    Attributes:
        model: Its name.
        n_layers: Number of its layers.
        asked: Number of facts asked for.
        known: Number of them that the model answers as recorded; None where no answers are recorded.
        trace: Average indirect effects; None if nothing was traced.
        tried: Every trial, in order.
        judged: The best settings, on facts they were not chosen on where there are enough.
        skipped: Settings there was no time for.
        seconds: Of the budget.
    """

    model: str
    n_layers: int
    asked: int = 0
    known: int | None = None
    trace: Trace | None = None
    tried: list[Found] = field(default_factory=list)
    judged: list[Found] = field(default_factory=list)
    skipped: list[Setting] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def best(self) -> Found | None:
        """The best of those judged last, if any reaches the floor."""
        best = winner(self.judged) if self.judged else None
        return best if best is not None and best.editable else None

    def verdict(self) -> str:
        """What came out, in one or two sentences."""
        if self.known is not None and self.known < _FEWEST:
            return (
                f"Nothing can be edited here: of {counted(self.asked, 'fact')} the model answers {self.known} as "
                "recorded. An edit changes what a model knows; name facts that it knows with --facts."
            )
        if not self.judged:
            return "The budget was too short to try anything: give more with --budget."
        found = winner(self.judged)
        said = ", ".join(f"{name} {value:.2f}" for name, value in found.figures.items())
        on = f"{counted(found.facts, 'fact')}{' that it was not chosen on' if found.held_out else ''}"
        if not found.editable:
            return (
                f"Nothing can be edited here: the best of {len(self.tried)} trials, {found.setting}, has {said} over "
                f"{on}. Every figure should reach {FLOOR:g}."
                + (f" {counted(len(self.skipped), 'setting')} would take a longer --budget." if self.skipped else "")
            )
        return f"Best: {found.setting}: {said} over {on}."

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "model": self.model,
            "layers": self.n_layers,
            "facts": {"asked": self.asked, "known": self.known},
            "verdict": self.verdict(),
            "best": None if self.best is None else self.best.as_json(),
            "judged": [found.as_json() for found in self.judged],
            "tried": [found.as_json() for found in self.tried],
            "not_tried": [str(setting) for setting in self.skipped],
            "tracing": None if self.trace is None else self.trace.as_json(),
            "seconds": self.seconds,
        }

    def markdown(self) -> str:
        """The table of all trials."""
        lines = [f"# Where {self.model} can be edited", "", self.verdict(), ""]
        if self.trace is not None:
            lines += [
                f"Causal tracing over {counted(self.trace.facts, 'fact')}: p(answer) {self.trace.clean:.2f}, with the "
                f"subject disturbed {self.trace.corrupted:.2f}; the MLP at the subject's last token gives most back in "
                f"layer {self.trace.strongest()}.",
                "",
                "![tracing and single edits](locate.png)",
                "",
            ]
        lines += ["| method | layers | λ | facts | " + " | ".join(FIGURES) + " | p(v*) |", "|---" * 8 + "|"]
        for found in (*self.judged, *self.tried):
            cells = [f"{found.figures[name]:.2f}" if name in found.figures else "" for name in FIGURES]
            setting = found.setting
            layers = "-".join(map(str, dict.fromkeys((setting.layers[0], setting.layers[-1]))))
            strength = "" if setting.strength is None else f"{setting.strength:g}"
            facts = f"{found.facts}, others" if found.held_out else str(found.facts)
            row = [setting.method, layers, strength, facts, *cells, f"{found.p_value:.2f}"]
            lines.append("| " + " | ".join(row) + " |")
        if self.skipped:
            lines += ["", f"Not tried within the budget: {'; '.join(map(str, self.skipped))}."]
        return "\n".join(lines) + "\n"


def configuration(found: Found, given: argparse.Namespace, strength: tuple[str, float] | None) -> str:
    """A configuration for ``fit``: the method's own, with model, layers, λ and facts.

    Args:
        found: The setting, and how it fared.
        given: Options of the command.
        strength: What the solver calls its λ, and its value in the method's configuration.
    """
    config = read_config(found.setting.method)
    model = {"model": given.model, "dtype": given.dtype}
    if given.corpus != EMBEDDED:
        model |= {"corpus": given.corpus}
    if given.family is not None:
        model["family"] = {key: getattr(given.family, key) for key in ("blocks", "down_projection", "transposed")}
    config["model"] = {**model, **config["model"]}
    arguments = config["model"]["editor"]["init_args"]
    layers = {"layers": list(found.setting.layers)}
    arguments["layers"] = {"class_path": "lit_edit.editors.layers.FixedLayers", "init_args": layers}
    if strength is not None and found.setting.strength is not None:
        arguments["solver"]["init_args"][strength[0]] = found.setting.strength
    if given.facts is not None:
        path = given.facts if given.facts.startswith("hf:") else str(Path(given.facts).expanduser().resolve())
        settings = {"path": path, "n_edits": None, "batch_size": 1}
        config["data"] = {"class_path": "lit_edit.datamodules.EditDataModule", "init_args": settings}
    elif given.model != EMBEDDED:  # `fit` takes these facts for a mistake unless they are named
        config["data"]["init_args"]["path"] = EMBEDDED
    if given.model != EMBEDDED:
        config["downstream"] = None
    said = ", ".join(f"{name} {value:.2f}" for name, value in found.figures.items())
    head = [
        f"# {found.setting.method} on {given.model}, in the layers that `{program()} locate` found best.",
        f"# Single edits of {counted(found.facts, 'fact')}: {said}.",
    ]
    if given.model != EMBEDDED:
        head.append(
            "# `downstream` asks the embedded model's own tasks unless told otherwise: docs/abilities.md has others."
        )
    return "\n".join(head) + "\n" + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def main(args: Sequence[str] | None = None) -> int:
    """Looks for a place to edit.

    Args:
        args: The options, without the word ``locate``; those of the process after it if None.

    Returns:
        0 if a configuration was written, 1 if nothing can be edited.

    Raises:
        ValueError: For a setting that cannot be used, or a model or facts that cannot be read.
    """
    given = parser().parse_args(list(sys.argv[2:] if args is None else args))
    if given.budget <= 0 or given.sample < _FEWEST:
        raise ValueError(f"locate: --budget should be positive, and --sample at least {_FEWEST}.")
    console = Console(highlight=False)
    model, tokenizer = load_model(given.model, given.dtype, given.device)
    model.eval().requires_grad_(False)
    workspace = Workspace.of(model, tokenizer, family=given.family)
    found = Findings(given.model, len(workspace.architecture))
    bench = Bench(workspace, given.methods)
    workspace.architecture.check(given.layers or [])
    out: Path = given.out or Path("locate", _stem(given.model))
    requests = _requests(given, workspace)
    known = _known(found, workspace, requests, console)
    if found.known is None or found.known >= _FEWEST:
        _find(found, bench, known, given, console)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "locate.json", found.as_json())
    (out / "locate.md").write_text(found.markdown(), encoding="utf-8")
    if found.trace is not None or found.tried:
        draw_findings(found.trace, found.tried, found.n_layers, out / "locate.png")
    if found.judged:
        console.print(_table(found.judged))
    console.print(escape(found.verdict()), soft_wrap=True)
    best = found.best
    if found.skipped and best is not None:
        print(f"Not tried within the budget: {counted(len(found.skipped), 'setting')}.")
    if best is None:
        print(f"All figures: {out / 'locate.md'}")
        return 1
    path = out / f"{best.setting.method}.yaml"
    strength = strength_of(bench.editors[best.setting.method])
    path.write_text(configuration(best, given, strength), encoding="utf-8")
    print(f"Picture: {out / 'locate.png'}   table: {out / 'locate.md'}")
    print(f"Edit it: {program()} fit --config {path}", flush=True)
    return 0


def _stem(model: str) -> str:
    """A folder name for a model."""
    return re.sub(r"[^\w.-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"


def _requests(given: argparse.Namespace, workspace: Workspace) -> list[EditRequest]:
    """The facts to ask for, in an order drawn by the seed; the model takes them all."""
    data = CounterFactDataModule(n_edits=None) if given.facts is None else EditDataModule(given.facts, n_edits=None)
    data.setup("fit")
    drawn = list(data.requests)
    random.Random(given.seed).shuffle(drawn)
    drawn = drawn[:_ASKED]
    check_requests(drawn, workspace.prompter)
    return drawn


def _known(
    found: Findings, workspace: Workspace, requests: Sequence[EditRequest], console: Console
) -> list[EditRequest]:
    """Facts that the model answers as recorded; all of them where the file has no answers from before."""
    found.asked = len(requests)
    recorded = [request for request in requests if request.target_true is not None]
    if not recorded:
        print(f"{counted(len(requests), 'fact')} without `target_true`: what the model answers now is taken for known.")
        return list(requests)
    rows = [workspace.prompter.row(r.prompt, str(r.target_true), source=r.source) for r in recorded]
    right = score_targets(workspace.model, workspace.prompter, rows).exact.tolist()
    known = [request for request, hit in zip(recorded, right, strict=True) if hit]
    found.asked, found.known = len(recorded), len(known)
    console.print(f"The model answers {len(known)} of {len(recorded)} facts as recorded.")
    return known


def _find(
    found: Findings, bench: Bench, known: Sequence[EditRequest], given: argparse.Namespace, console: Console
) -> None:
    """Traces and searches, within the budget; Ctrl-C ends it with what there is."""
    workspace, facts = bench.workspace, with_locality(known)
    clock = Clock(given.budget)
    try:
        found.trace = _traced(workspace, facts[:_TRACED], clock, console)
        peak = found.n_layers // 3 if found.trace is None else found.trace.strongest()
        order = given.layers or candidates(found.n_layers, peak)
        with clock.stopped():
            _prepare(bench, sorted(order), given)
        chosen_on = facts[: given.sample]
        for one in search(bench, order, chosen_on, clock, found.skipped):
            found.tried.append(one)
            _say(one, clock)
        others = facts[given.sample : 2 * given.sample]
        held_out = len(others) >= max(_FEWEST, given.sample // 2)
        for one in judge(bench, finalists(found.tried), others if held_out else chosen_on, clock, held_out):
            found.judged.append(one)
            _say(one, clock)
    except KeyboardInterrupt:
        print("Interrupted: what there is so far follows.", flush=True)
        found.judged = found.judged or [winner(found.tried)] if found.tried else []
    found.seconds = clock.spent


def _prepare(bench: Bench, layers: Sequence[int], given: argparse.Namespace) -> None:
    """Contexts, and the key covariances of the layers that may be tried."""
    workspace = bench.workspace
    number, length = max(editor.context_sampling for editor in bench.editors.values())
    if number:
        workspace.contexts = sample_contexts(workspace.model, workspace.prompter, number, length, given.seed)
    if any(editor.needs_covariances for editor in bench.editors.values()):
        how = Preparation(given.corpus, given.corpus_tokens, given.cache_dir)
        asked = how.statistics(KeyCollector, workspace, layers)
        if asked.missing():
            print(f"Key covariances of {counted(len(asked.missing()), 'layer')} come first.", flush=True)
        covariances = asked.get(progress=on_terminal(), notify=lambda text: print(text, flush=True))
        for layer in layers:
            site = workspace.site(layer)
            site.covariance = fill_silent(covariances[site.name])


def _traced(workspace: Workspace, facts: Sequence[EditRequest], clock: Clock, console: Console) -> Trace | None:
    """Average indirect effects over as many facts as a part of the budget allows."""
    spread, traces, each = subject_spread(workspace, facts), [], 0.0
    # Of large models neighbouring layers are restored together, as ROME does: ten of 48.
    window = max(1, round(len(workspace.architecture) / 5)) if len(workspace.architecture) > 10 else 1
    for i, request in enumerate(facts):
        if not clock.allows(each, _TRACE_SHARE):
            break
        began = clock.spent
        traces.append(trace_fact(workspace, request, spread, tokens=TOKENS, samples=4, window=window, seed=i))
        each = clock.spent - began
    if not traces:
        return None
    trace = mean_trace(traces)
    console.print(
        f"{time_text(clock.spent):>8}  causal tracing of {counted(trace.facts, 'fact')}: p(answer) {trace.clean:.2f}, "
        f"{trace.corrupted:.2f} with the subject disturbed; strongest in the MLP of layer {trace.strongest()}",
        soft_wrap=True,
    )
    return trace


def _say(found: Found, clock: Clock) -> None:
    figures = "  ".join(f"{name[:3]} {value:.2f}" for name, value in found.figures.items())
    on = f"{found.facts} other facts" if found.held_out else counted(found.facts, "fact")
    print(f"{time_text(clock.spent):>8}  {found.setting!s:<34} {figures}  ({on})", flush=True)


def _table(judged: Sequence[Found]) -> Table:
    table = Table("method", "layers", "λ", *(name[:3] for name in FIGURES), "p(v*)", "facts")
    for found in judged:
        setting = found.setting
        strength = "" if setting.strength is None else f"{setting.strength:g}"
        cells = [f"{found.figures[name]:.2f}" if name in found.figures else "-" for name in FIGURES]
        layers = ", ".join(map(str, setting.layers))
        table.add_row(setting.method, layers, strength, *cells, f"{found.p_value:.2f}", str(found.facts))
    return table
