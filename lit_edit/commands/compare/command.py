"""The command: ``python train.py compare --configs mose rome memit --n_edits 200 --at 25 50 100 200 --seeds 0 1``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from lit_edit.commands.compare.figure import draw
from lit_edit.commands.compare.processes import run_all, threads_per_run
from lit_edit.commands.compare.runs import State, plan
from lit_edit.commands.compare.tables import Comparison, measured
from lit_edit.commands.options import as_called
from lit_edit.configs.find import config_folder
from lit_edit.files import write_json
from lit_edit.program import program

SUMMARY = "Run several methods over the same edits; one table and one figure."

_DESCRIPTION = """\
Runs several methods over the same edits, each configuration with each seed in a process of its own, and writes one
table and one figure. Interrupted, it goes on where it stopped when it is called again: complete runs are not repeated,
a run that was cut goes on from its last checkpoint."""

_EPILOG = """\
Every other option is passed on to each run, see `python train.py fit --help`:
  --data ZsREDataModule --data.batch_size=10     other edits, in batches
  --downstream.n_items=20                        fewer items of the general abilities
  --model.editor.contexts=0                      a setting that all the methods have
  --config models/llama3-8b.yaml                 laid over every method's configuration

Seeds: seed 0 takes the requests in the order of the file, as `fit` does; every other seed shuffles the file before the
first n_edits are taken. All methods get the very same edits with the same seed, which is checked. It is the seed of
the sampled contexts, too, and of everything else that is random (--data.seed, --model.seed, --seed_everything of fit).

In the folder of --out: table.md (every point in --at, then seconds per edit by stage), table.csv, table.json,
figure.png, and per run <method>/seed-<seed> with log.txt, results.json, edits.jsonl and config.yaml.

The exit status is 0, 1 if a run failed (the others go on, the table says so), 2 after a wrong setting.

  python train.py compare --configs mose rome memit --n_edits 200 --at 25 50 100 200 --seeds 0 1 --jobs 2
  python train.py compare --configs memit+models/gpt2-xl/memit rome+models/gpt2-xl/rome --n_edits 1000"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as an exception, so that it ends like the errors of the other commands."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"compare: {message}")


def parser() -> argparse.ArgumentParser:
    """The options of ``compare``."""
    made = _Parser(
        prog=f"{program()} compare",
        description=as_called(_DESCRIPTION),
        epilog=as_called(_EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--configs",
        nargs="+",
        metavar="CONFIG",
        help="the methods: files, or names of those that come along; one may be several joined by +, later ones laid "
        "over earlier ones (default: every method that comes along)",
    )
    made.add_argument("--n_edits", type=int, default=100, help="edits of each run (default: %(default)s)")
    made.add_argument(
        "--at",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="counts of edits to measure at, besides before the first and after the last (default: four equal parts)",
    )
    made.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="see below (default: 0)")
    made.add_argument(
        "--out", type=Path, default=Path("runs", "compare"), help="folder of runs and tables (default: %(default)s)"
    )
    made.add_argument("--figure", type=Path, help="where the figure goes (default: figure.png in --out)")
    made.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time, each with its share of the cores as OMP_NUM_THREADS unless that is set; the number of "
        "threads changes how sums round (default: %(default)s)",
    )
    made.add_argument("--fresh", action="store_true", help="make every run anew, also those that are complete")
    return made


def main(args: Sequence[str] | None = None) -> int:
    """Runs a comparison.

    Args:
        args: the options, without the word ``compare``; those of the process after it if None.

    Returns:
        0, or 1 if a run failed.

    Raises:
        ValueError: for a setting that cannot be used, before any run is started.
    """
    given, overrides = parser().parse_known_args(list(sys.argv[2:] if args is None else args))
    if given.jobs < 1:
        raise ValueError(f"--jobs is {given.jobs}; it must be at least 1.")
    configs = given.configs or sorted(path.stem for path in config_folder().glob("*.yaml"))
    out = given.out.expanduser().resolve()
    runs = plan(configs, given.seeds, given.n_edits, given.at, out, overrides)
    if given.fresh:
        for run in runs:
            run.clear()
    for run in runs:
        run.state()  # all refusals before the first run
    console = Console(highlight=False)
    threads = threads_per_run(given.jobs, os.environ)
    try:
        failed = run_all(runs, given.jobs, threads, console)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on from here.")
        return 130
    complete = [measured(run) for run in runs if run not in failed and run.state() is State.COMPLETE]
    comparison = Comparison(runs, complete)
    figure = (given.figure or out / "figure.png").expanduser()
    (out / "table.md").write_text(comparison.markdown(), encoding="utf-8")
    (out / "table.csv").write_text(comparison.tidy(), encoding="utf-8")
    write_json(out / "table.json", comparison.plain())
    draw(comparison, figure)
    print(comparison.markdown())
    print(f"table: {out / 'table.md'}   figure: {figure}")
    if failed:
        names = ", ".join(f"{run.name} (seed {run.seed})" for run in failed)
        print(f"failed: {names}", file=sys.stderr)
        return 1
    return 0
