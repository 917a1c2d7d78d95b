"""``python train.py export``: the edited model of a run as a folder for plain `transformers`, or as a small delta."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lit_edit.commands.edited_run import EditedRun
from lit_edit.commands.options import Parser
from lit_edit.model.loading import save_model
from lit_edit.runs.delta import save_delta
from lit_edit.units import size_text

SUMMARY = "Write the edited model of a run as transformers loads it, or what changed as a small file."

_DESCRIPTION = """\
Rebuilds the edited model from a run's configuration and checkpoint and writes it as a folder that plain transformers
loads (weights, configuration, generation settings, tokenizer with its chat template), or what the edits changed as a
small file for `lit_edit.load_delta`, or both. The original model must be where the run found it."""

_EPILOG = """\
  python train.py export --run runs/mose/version_0 --out edited-model
  python train.py export --run runs/mose/version_0 --at 25 --out after-25-edits
  python train.py export --run runs/rome/version_0 --delta rome.safetensors --tolerance 1e-4"""


def parser() -> Parser:
    """The options of ``export``."""
    options = Parser("export", _DESCRIPTION, _EPILOG)
    options.add_argument("--run", type=Path, metavar="FOLDER", help="the run, a folder with config.yaml")
    options.add_argument("--ckpt_path", type=Path, metavar="FILE", help="a checkpoint other than the run's own")
    options.add_argument("--original", metavar="MODEL", help="where the unedited model is now, if it has moved")
    options.add_argument("--at", type=int, metavar="N", help="as the model was after N edits (default: after all)")
    options.add_argument("--out", type=Path, metavar="FOLDER", help="where the model goes; must be empty or new")
    options.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="largest file of weights (default: %(default)s)"
    )
    options.add_argument("--delta", type=Path, metavar="FILE", help="where what changed goes (safetensors)")
    options.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="relative error of a weight that the delta may have, to be smaller (default: 0, exact)",
    )
    return options


def main(args: Sequence[str] | None = None) -> int:
    """Writes what was asked for. Returns 0.

    Args:
        args: the options, without the word ``export``; those of the process after it if None.

    Raises:
        ValueError: if the run, its checkpoint or its model cannot be used, or there is something at ``--out`` already.
    """
    given = parser().parse_args(list(sys.argv[2:] if args is None else args))
    if given.out is None and given.delta is None:
        raise ValueError("export: what for? --out edited-model writes the model, --delta edits.safetensors the change.")
    if given.tolerance and given.delta is None:
        raise ValueError("export: --tolerance is for a --delta; a model is always written exactly.")
    if given.out is not None and given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise ValueError(f"export: there is something at {given.out} already; name a new folder.")
    run = EditedRun.find(given.run, given.ckpt_path, given.original)
    model, tokenizer = run.load()
    applied = run.apply(model, given.at)
    print(f"{applied.edits} edits{f' with {run.method}' if run.method else ''} to {run.model!r}.")
    if given.delta is not None:
        header = save_delta(
            given.delta,
            model,
            applied.originals,
            original=applied.fingerprint,
            tolerance=given.tolerance,
            method=run.method,
            edits=applied.edits,
        )
        size = given.delta.stat().st_size
        exact = f"relative error {header.error:.1g}" if header.error else "exact"
        print(f"Delta: {given.delta} ({size_text(size)}, {len(header.parameters)} weights, {exact})")
    if given.out is not None:
        save_model(model, tokenizer, given.out, given.max_shard_size)
        print(f"Model: {given.out} (AutoModelForCausalLM.from_pretrained loads it)")
    return 0
