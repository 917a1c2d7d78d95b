"""``compare``: the same edits by several methods, each run in a process of its own, then tables and figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lit_edit.commands.compare.processes import run_all, threads_per_run
from lit_edit.commands.compare.runs import Run, State, plan
from lit_edit.configs.find import config_folder
from lit_edit.files import write_json

EXAMPLES = """\
Every other option is passed on to each run, see `python train.py fit --help`:
  --data ZsREDataModule --data.batch_size=10     other edits, in batches
  --downstream.n_items=20                        fewer items of the general abilities
  --model.editor.contexts=0                      a setting that all the methods have
  --config models/llama3-8b.yaml                 laid over every method's configuration

Seeds: seed 0 takes the requests in the order of the file, as `fit` does; every other seed shuffles the file before the
first n_edits are taken. All methods get the very same edits with the same seed, which is checked. It is the seed of
the sampled contexts, too, and of everything else that is random (--data.seed, --model.seed, --seed_everything of fit).

Each of several runs at a time gets its share of the cores as OMP_NUM_THREADS, unless that is set.

In the folder of --out: table.md (every point in --at, differences, seconds per edit by stage), table.csv, table.json,
figure.png (eight methods each: figure-2.png has the next), and per run <method>/seed-<seed> with log.txt,
results.json, edits.jsonl and config.yaml.

The exit status is 0, 1 if a run failed (the others go on, the table says so), 2 after a wrong setting.

  python train.py compare --configs mose rome memit --n_edits 200 --at 25 50 100 200 --seeds 0 1 --jobs 2
  python train.py compare --configs memit+models/gpt2-xl/memit rome+models/gpt2-xl/rome --n_edits 1000"""


def compare(
    *fit: str,
    configs: list[str] | None = None,
    n_edits: int = 100,
    at: list[int] | None = None,
    seeds: list[int] | tuple[int, ...] = (0,),
    out: Path = Path("runs", "compare"),
    figure: Path | None = None,
    jobs: int = 1,
    fresh: bool = False,
    check: Callable[[list[str]], None],
) -> int:
    """Run several methods over the same edits; tables and figures of them all.

    Each configuration runs with each seed in a process of its own. Interrupted, the comparison goes on where it stopped
    when it is called again: complete runs are not repeated, a run that was cut goes on from its last checkpoint.

    Args:
        *fit: Options of ``fit``, passed on to each run.
        configs: The methods: files, or names of those that come along; one may be several joined by +, later ones laid
            over earlier ones (default: every method that comes along).
        n_edits: Edits of each run.
        at: Counts of edits to measure at, besides before the first and after the last (default: four equal parts).
        seeds: See below.
        out: Folder of runs and tables.
        figure: Where the figure goes (default: figure.png in --out).
        jobs: Runs at a time.
        fresh: Make every run anew, also those that are complete.
        check: Refuses arguments of ``fit`` that cannot work.

    Returns:
        0, 1 if a run failed, or 130 after Ctrl-C.

    Raises:
        ValueError: For a setting that cannot be used, before any run is started.
    """
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}; it must be at least 1.")
    methods = configs or sorted(path.stem for path in config_folder().glob("*.yaml"))
    out = out.expanduser().resolve()
    runs = plan(methods, seeds, n_edits, at or [], out, fit)
    for run in runs:
        if fresh:
            run.clear()
        run.state()
    for run in {run.name: run for run in reversed(runs)}.values():  # seeds change the order of the edits alone
        try:
            check(["fit", *run.options])
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from error
    console = Console(highlight=False)
    try:
        failed = run_all(runs, jobs, threads_per_run(jobs, os.environ), console)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on from here.")
        return 130
    complete = [run for run in runs if run not in failed and run.state() is State.COMPLETE]
    if complete:
        _write(runs, complete, out, (figure or out / "figure.png").expanduser())
    if failed:
        names = ", ".join(f"{run.name} (seed {run.seed})" for run in failed)
        print(f"failed: {names}", file=sys.stderr)
        return 1
    return 0


def _write(runs: list[Run], complete: list[Run], out: Path, figure: Path) -> None:
    """Tables and figures."""
    # Here and not above: no other command needs pandas and Matplotlib, which take a second to import.
    from lit_edit.commands.compare.figure import draw
    from lit_edit.commands.compare.tables import Comparison

    comparison = Comparison(runs, complete)
    text = comparison.markdown()
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.csv").write_text(comparison.csv(), encoding="utf-8")
    write_json(out / "table.json", comparison.plain())
    figures = draw(comparison, figure)
    print(text)
    print(f"table: {out / 'table.md'}   figure: {', '.join(map(str, figures)) or 'none, nothing was measured'}")
