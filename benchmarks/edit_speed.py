"""What batching buys: ratios within one run, medians over repeats: `make bench`.

Value optimisation of several requests in one batch against one after another, layer selection's candidates in one
batch against one after another, and one step of each solver against the optimisation it follows. Writes
``runs/bench.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lit_edit.datamodules import CounterFactDataModule

from lit_edit.api import load_editor
from lit_edit.corpora import load_corpus
from lit_edit.keys import MeanKey, compute_keys
from lit_edit.loading import load_model
from lit_edit.session import EditSession
from lit_edit.solvers import MEMIT, MOSE, ROME, AlphaEdit, Problem
from lit_edit.values import ValueProblem


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of some work, after one call that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    args = parser.parse_args()

    data = CounterFactDataModule(n_edits=args.requests)
    data.setup("fit")
    model, tokenizer = load_model(args.model)
    editor = load_editor("mose")
    session = EditSession(model, tokenizer, editor, load_corpus(), "embedded")
    space, values, requests = session.workspace, editor.values, data.requests  # type: ignore[attr-defined]
    values.stop_loss = 0.0  # every problem takes every step, so that the two sides do the same work
    n_layers, middle = len(space.architecture), len(space.architecture) // 2

    def optimise(problems: list[ValueProblem]) -> None:
        values.optimise(space, requests, problems, MeanKey(), steps=args.steps)

    together = [ValueProblem(i, (middle,)) for i in range(len(requests))]
    candidates = [ValueProblem(0, (layer,)) for layer in range(n_layers)]
    seconds = {
        "requests together": median_seconds(lambda: optimise(together), args.repeats),
        "requests one by one": median_seconds(lambda: [optimise([p]) for p in together], args.repeats),
        "candidate layers together": median_seconds(lambda: optimise(candidates), args.repeats),
        "candidate layers one by one": median_seconds(lambda: [optimise([p]) for p in candidates], args.repeats),
    }
    part = space.architecture[middle]
    keys = compute_keys(space, requests[:1], [middle], MeanKey())[middle]
    targets = part.weight @ keys + torch.randn(part.weight.shape[0], 1)
    problem = Problem(part.weight, keys, targets, covariance=space.covariances[middle], layer=part.name)
    for solver in (MOSE(), ROME(), MEMIT(), AlphaEdit(threshold=None, energy=0.02)):
        name = f"solve {type(solver).__name__}"
        seconds[name] = median_seconds(lambda solver=solver: solver.solve(problem), args.repeats)  # type: ignore[misc]

    one = seconds["requests one by one"] / len(requests)
    rows = {
        "requests: one by one / together": seconds["requests one by one"] / seconds["requests together"],
        "candidates: one by one / together": (
            seconds["candidate layers one by one"] / seconds["candidate layers together"]
        ),
        **{f"{k} / optimisation of {args.steps} steps": v / one for k, v in seconds.items() if k.startswith("solve")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"seconds": seconds, "ratios": rows, "threads": torch.get_num_threads()}, indent=1))
    for name, ratio in rows.items():
        print(f"{name:<45} {ratio:8.3f}")


if __name__ == "__main__":
    main()
