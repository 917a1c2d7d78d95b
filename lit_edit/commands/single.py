"""``python train.py single``: every fact written alone into the unedited model, judged, and taken back."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lit_edit.commands.options import Parser
from lit_edit.datamodules import EditDataModule
from lit_edit.evaluation.evaluate import figures
from lit_edit.files import write_json
from lit_edit.model.loading import on_terminal
from lit_edit.module import LitEdit

SUMMARY = "Write every fact alone into the unedited model: what single edits score."

_DESCRIPTION = """\
Writes each fact into the unedited model, asks its prompt, its rephrasings and its locality probes, and takes it back
bit by bit: what a method does before edits disturb one another (EAC, Table 3)."""

_EPILOG = """\
Every other option is one of `fit`, see `python train.py fit --help`:

  python train.py single --config rome.yaml --data.init_args.n_edits=50
  python train.py single --config eac-rome.yaml --data.init_args.n_edits=50 --out eac-rome.json"""

Prepared = Callable[[list[str]], tuple[LitEdit, EditDataModule, torch.device]]


def main(args: Sequence[str], prepared: Prepared) -> int:
    """Scores single edits. Returns 0.

    Args:
        args: The options, without the word ``single``.
        prepared: Makes the module and the data, and says where it computes, of the arguments of ``fit``.

    Raises:
        ValueError: For a setting that cannot be used.
    """
    options = Parser("single", _DESCRIPTION, _EPILOG)
    options.add_argument("--out", metavar="FILE", help="write the figures as JSON, too")
    own, others = options.parse_known_args(list(args))
    if not any(arg.split("=", 1)[0] in ("--config", "-c") for arg in others):
        raise ValueError("single: which method? --config rome.yaml.")
    module, data, device = prepared(["fit", *others])
    data.setup("fit")
    session = module.open(data.requests, device, progress=on_terminal())
    session.check(data.requests, batch_size=1)
    method, requests = module.editor.describe(), data.requests
    print(f"{method} on {module.model_name!r}: {len(requests)} facts, each alone.", flush=True)
    began = time.monotonic()
    with torch.no_grad():
        single = module.editor.single_edits(session.workspace, requests)
        found = [outcome for _, outcome in tqdm(single, total=len(requests), disable=not on_terminal())]
    seconds = time.monotonic() - began
    scores = figures(found, ["exact_match"])
    table = Table("figure", "single edits", "95 % interval", "questions", box=None)
    for name in [name for name in scores if not name.startswith(("interval/", "count/"))]:
        low, high = (scores.get(f"interval/{name}/{side}") for side in ("low", "high"))
        bounds = "" if low is None or high is None else f"{low:.3g} to {high:.3g}"
        table.add_row(name, f"{scores[name]:.3g}", bounds, f"{int(scores.get(f'count/{name}', 0)) or ''}")
    Console(highlight=False).print(table)
    print(f"{seconds / len(requests):.2f} s per edit, evaluation included.")
    sys.stdout.flush()
    if own.out:
        run = {"method": method, "model": module.model_name, "edits": len(requests), "seconds": round(seconds, 3)}
        write_json(Path(own.out), {**run, "figures": scores})
        print(f"Figures: {own.out}")
    return 0
