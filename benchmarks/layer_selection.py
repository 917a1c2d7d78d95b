"""How often MOSE's predictions from one backward pass are the layers of Eq. 22, and what each way costs.

Along a sequence of MOSE edits of the embedded model, layers by Eq. 22 with a value optimised in every candidate, every
request is chosen for in several ways on the very same weights, one after the other: Eq. 22 in all candidates, the first
by prediction (`tries: 1`) from one, two, three or all contexts, and Eq. 22 in the two that are predicted first
(`tries: 2`). Seconds are medians within the run, keys and spectral norms included.

    python benchmarks/layer_selection.py --edits 100 --seed 11
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lit_edit.datamodules import CounterFactDataModule

from lit_edit.api import load_editor
from lit_edit.editors.prediction import predicted_scores
from lit_edit.model.loading import load_model
from lit_edit.session import EditSession, Preparation

WAYS: dict[str, tuple[int | None, int]] = {
    "Eq. 22 in all": (None, 1),
    "predicted, 1 context": (1, 1),
    "predicted, 2 contexts": (1, 2),
    "predicted, 3 contexts": (1, 3),
    "predicted, all contexts": (1, 1000),
    "Eq. 22 in two": (2, 1),
}
"""By name, how many candidates are tried out, and the contexts."""


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """An entry per edit: centers and seconds by way, the place of Eq. 22's layer in the order predicted, the rest."""
    data = CounterFactDataModule(n_edits=args.edits, seed=args.seed)
    data.setup("fit")
    model, tokenizer = load_model(args.model)
    editor: Any = load_editor("mose")
    policies = {name: copy.copy(editor.layers) for name in WAYS}
    for name, (tries, contexts) in WAYS.items():
        policies[name].tries, policies[name].contexts = tries, contexts
    editor.layers = policies["Eq. 22 in all"]
    session = EditSession(model, tokenizer, editor, Preparation(corpus_tokens=args.tokens, seed=args.seed))
    space, rows = session.workspace, []
    for request in data.requests:
        found: dict[str, int] = {}
        seconds: dict[str, float] = {}
        for name, policy in policies.items():
            space.keys.clear()  # every way pays for its own keys and norms
            for site in session.sites:
                site._cached.pop("spectral norm", None)
            start = time.perf_counter()
            with torch.enable_grad():
                (choice,) = policy.choose(space, [request], editor.values, editor.keys, editor.value_keys)
            seconds[name] = time.perf_counter() - start
            found[name] = choice.center
        with torch.enable_grad():
            (scores,) = predicted_scores(
                space,
                [request],
                editor.values,
                editor.keys,
                sorted(editor.layers.layers or range(len(space.architecture))),
            )
        order = sorted(scores, key=lambda layer: (scores[layer], layer))
        start = time.perf_counter()
        (edit,) = session.apply(session.plan([request]))
        whole = time.perf_counter() - start
        rows.append(
            {
                "centers": found,
                "seconds": seconds,
                "place": order.index(found["Eq. 22 in all"]) + 1,
                "rest": whole - edit.stages["layers"],
                "steps": edit.steps,
            }
        )
        if len(rows) % 10 == 0:
            print(f"{len(rows)} of {args.edits} edits", flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Agreement, seconds and the share of an edit, as a table; then the places and the layers."""
    n, rest = len(rows), statistics.median(row["rest"] for row in rows)
    print("| layers by | same layer as Eq. 22 | seconds | share of an edit |\n|---|---|---|---|")
    for name in WAYS:
        same = sum(row["centers"][name] == row["centers"]["Eq. 22 in all"] for row in rows)
        taken = statistics.median(row["seconds"][name] for row in rows)
        print(f"| {name} | {same} of {n} | {taken:.3f} | {taken / (taken + rest):.2f} |")
    layers = Counter(row["centers"]["Eq. 22 in all"] for row in rows)
    print(
        f"\nPlace of Eq. 22's layer in the order predicted: {dict(sorted(Counter(r['place'] for r in rows).items()))}"
    )
    print(f"Layers by Eq. 22: {dict(sorted(layers.items()))}; an edit without selection: {rest:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the corpus, for the key covariance")
    parser.add_argument("--out", type=Path, default=Path("runs/layer_selection.json"))
    args = parser.parse_args()
    rows = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1))
    show(rows)


if __name__ == "__main__":
    main()
