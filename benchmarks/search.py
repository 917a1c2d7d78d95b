"""The same small search for every method: nine settings each, on records that no table uses.

Every method is tried with its configuration's step size of values halved, kept and doubled, and with three strengths of
what holds its update back: λ of the preserved keys a tenth, once and ten times; for AlphaEdit its ridge; for solvers
that have neither (ROME) half, once and double the bound on values. Records are those of ``split: choose`` at the end of
the embedded CounterFact file. The score is the mean of reliability, generalization and locality at the end.

Every try is noted as soon as it is over; the same command goes on where it was stopped.

    python benchmarks/search.py --configs rome memit alphaedit mose --edits 40
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a try per core

from rich.progress import track

WORLD = Path(__file__).resolve().parents[1] / "lit_edit" / "world" / "data" / "counterfact.json"
CONFIGS = ("rome", "eac-rome", "memit", "alphaedit", "mose", "mose-key", "mose-plus", "memit-plus")
STEPS = (0.5, 1.0, 2.0)
STRENGTHS = {
    ("solver", "preservation"): (0.1, 1.0, 10.0),
    ("solver", "ridge"): (0.1, 1.0, 10.0),
    ("values", "constraint", "factor"): (0.5, 1.0, 2.0),
}
OWN = 4  # the configuration as it is
KEPT = ("reliability", "generalization", "locality", "locality/same_subject")


def found(section: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments that hold the last name of a path, where they have a number there other than 0."""
    here: Any = section
    for name in (*path[:-1], None):
        here = here.get("init_args", {})
        if name is None:
            break
        here = here.get(name) or {}
    value = here.get(path[-1])
    return here if isinstance(value, (int, float)) and value else None


def settings(name: str) -> Iterator[tuple[dict[str, float], dict[str, Any]]]:
    """The nine settings of a method: (what was changed, ``model`` section of its configuration)."""
    from copy import deepcopy

    from lit_edit.configs.find import read_config

    model = read_config(name)["model"]
    strength = next(path for path in STRENGTHS if found(model["editor"], path))
    for step, factor in itertools.product(STEPS, STRENGTHS[strength]):
        tried = deepcopy(model)
        changed = {}
        for path, by in ((("values", "lr"), step), (strength, factor)):
            place = found(tried["editor"], path)
            assert place is not None, path
            place[path[-1]] = changed[".".join(path)] = place[path[-1]] * by
        yield changed, tried


def attempt(name: str, number: int, edits: int, seed: int) -> dict[str, Any]:
    """Makes the edits of one try, one after another, and judges all of them at the end."""
    import torch
    from jsonargparse import ArgumentParser

    from lit_edit import Session
    from lit_edit.editors import Editor, Mending

    torch.set_num_threads(1)
    changed, model = list(settings(name))[number]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--editor", type=Editor)
    editor = parser.instantiate(parser.parse_object({"editor": model["editor"]})).editor
    mending = Mending(**model["mending"]) if model.get("mending") else None
    requests = chosen(edits, seed)
    session = Session("embedded", editor, mending=mending, seed=seed)
    session.evaluate(requests)  # what the unedited model says
    for request in requests:
        session.edit(request)
    session.finish()
    scores = session.evaluate(requests)
    seconds = sum(edit.seconds for edit in session.journal.edits) / edits
    return {
        "config": name,
        "number": number,
        "edits": edits,
        "seed": seed,
        "settings": changed,
        **{key: scores[key] for key in KEPT if key in scores},
        "seconds": seconds,
    }


def chosen(edits: int, seed: int) -> list[Any]:
    """The first records of ``split: choose`` of the embedded file, shuffled."""
    from lit_edit.datamodules import CounterFactDataModule

    splits = [record.get("split") for record in json.loads(WORLD.read_text("utf-8"))]
    number = splits.count("choose")
    if number < edits or splits[-number:] != ["choose"] * number:
        raise SystemExit(f"{number} records at the end of {WORLD} are for choosing; asked for {edits}.")
    data = CounterFactDataModule(offset=len(splits) - number)
    data.setup("fit")
    return random.Random(seed).sample(data.requests, edits)


def score(row: Mapping[str, Any]) -> float:
    """Mean of the three figures of retention."""
    return float(row["reliability"] + row["generalization"] + row["locality"]) / 3


def table(rows: list[dict[str, Any]]) -> str:
    """The best setting of every method beside its configuration's own, as Markdown."""
    lines = [
        "| method | tried | own setting | best | reliability | generalization | locality | best with |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["config"] for row in rows):
        tried = [row for row in rows if row["config"] == name]
        own = [f"{score(row):.2f}" for row in tried if row["number"] == OWN]
        best = max(tried, key=score)
        figures = [f"{score(best):.2f}", *(f"{best[key]:.2f}" for key in KEPT[:3])]
        said = ", ".join(f"`{key}: {value:g}`" for key, value in best["settings"].items())
        lines.append("| " + " | ".join([name, str(len(tried)), *(own or ["-"]), *figures, said]) + " |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--configs", nargs="+", default=list(CONFIGS))
    options.add_argument("--edits", type=int, default=40)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=2, help="tries at a time, a core each")
    options.add_argument("--out", type=Path, default=Path("runs/search.jsonl"), help="where tries are noted")
    given = options.parse_args()
    rows = [json.loads(line) for line in given.out.read_text("utf-8").splitlines()] if given.out.is_file() else []
    rows = [row for row in rows if (row["edits"], row["seed"]) == (given.edits, given.seed)]
    done = {(row["config"], row["number"]) for row in rows}
    count = len(STEPS) * 3
    order = sorted(range(count), key=lambda n: n != OWN)
    left = [(c, n) for n in order for c in given.configs if (c, n) not in done]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        tries = [pool.submit(attempt, name, number, given.edits, given.seed) for name, number in left]
        for future in track(as_completed(tries), "tries", total=len(tries)):
            rows.append(future.result())
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table([row for row in rows if row["config"] in given.configs]))


if __name__ == "__main__":
    main()
