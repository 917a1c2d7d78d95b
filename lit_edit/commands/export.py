"""``python train.py export``: the edited model of a run as a folder for plain `transformers`, or as a small delta."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_edit.commands.edited_run import EditedRun
from lit_edit.commands.options import Parser
from lit_edit.model.loading import DTYPES, EMBEDDED, embedded_path, push_model, save_model
from lit_edit.runs.adapter import save_adapter
from lit_edit.runs.card import model_card, write_card
from lit_edit.runs.delta import save_delta
from lit_edit.units import counted, size_text

SUMMARY = "Write the edited model of a run as transformers loads it, or what changed as a small file."

_DESCRIPTION = """\
Rebuilds the edited model from a run's configuration and checkpoint and writes it as a folder that plain transformers
loads (weights, configuration, generation settings, tokenizer with its chat template, model card), or what the edits
changed: as a small file for `lit_edit.load_delta`, or as a LoRA adapter for `peft`. The original model must be where
the run found it."""

_EPILOG = """\
  python train.py export --run runs/mose/version_0 --out edited-model
  python train.py export --run runs/mose/version_0 --at 25 --out after-25-edits
  python train.py export --run runs/rome/version_0 --delta rome.safetensors --tolerance 1e-4
  python train.py export --run runs/rome/version_0 --lora rome-lora
  python train.py export --run runs/rome/version_0 --push owner/name"""


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
    options.add_argument("--dtype", help="round the model to this precision (default: that of the run)")
    options.add_argument(
        "--push", metavar="OWNER/NAME", help="upload model, tokenizer and card to the Hugging Face hub"
    )
    options.add_argument("--public", action="store_true", help="with --push: for everybody to see (default: private)")
    options.add_argument("--delta", type=Path, metavar="FILE", help="where what changed goes (safetensors)")
    options.add_argument(
        "--lora", type=Path, metavar="FOLDER", help="where what changed goes as a LoRA adapter, if it is of low rank"
    )
    options.add_argument("--rank", type=int, metavar="R", help="of the adapter (default: the least without loss)")
    options.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="relative error of a weight that delta and adapter may have, to be smaller (default: 0, exact)",
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
    if given.out is None and given.delta is None and given.lora is None and given.push is None:
        raise ValueError("export: what for? --out edited-model writes the model, --delta edits.safetensors the change.")
    if given.tolerance and given.delta is None and given.lora is None:
        raise ValueError("export: --tolerance is for a --delta or a --lora; a model is always written exactly.")
    if given.rank is not None and given.lora is None:
        raise ValueError("export: --rank is for an adapter, --lora FOLDER.")
    if given.dtype is not None and given.dtype not in DTYPES:
        raise ValueError(f"export: --dtype is one of {', '.join(DTYPES)}, not {given.dtype!r}.")
    for folder in (given.out, given.lora):
        if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"export: there is something at {folder} already; name a new folder.")
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
    if given.lora is not None:
        base = str(embedded_path("model")) if run.model == EMBEDDED else run.model
        adapter = save_adapter(
            given.lora, model, applied.originals, base=base, rank=given.rank, tolerance=given.tolerance
        )
        ranks = sorted(set(adapter.ranks.values()))
        print(
            f"Adapter: {given.lora} ({size_text(adapter.size)}, {counted(len(adapter.ranks), 'weight')}, rank "
            f"{' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}, relative error {adapter.error:.1g}, "
            f"{adapter.lost:.1g} of the change; PeftModel.from_pretrained(model, {str(given.lora)!r}) loads it)"
        )
    if given.out is None and given.push is None:
        return 0
    if given.dtype is not None:
        print(_rounded(model, applied.originals, DTYPES[given.dtype]))
    card = model_card(run.model, run.method, run.standing(given.at), run.records(applied.edits))
    if given.out is not None:
        save_model(model, tokenizer, given.out, given.max_shard_size)
        write_card(given.out, card)
        print(f"Model: {given.out} (AutoModelForCausalLM.from_pretrained loads it)")
    if given.push is not None:
        push_model(model, tokenizer, given.push, card, private=not given.public)
        print(f"Uploaded: {given.push} ({'for everybody' if given.public else 'private'})")
    return 0


@torch.no_grad()
def _rounded(model: Any, originals: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """Rounds the model, and says what that takes of the edits."""
    taken = 0.0
    for name, before in originals.items():
        now = model.get_parameter(name).detach().double().cpu()
        rounding = float((now.to(dtype).double() - now).norm())
        taken = max(taken, rounding / max(float((now - before.cpu().double()).norm()), 1e-300))
    model.to(dtype)
    model.config.dtype = dtype
    return f"Rounded to {str(dtype).removeprefix('torch.')}: up to {taken:.1%} of what edits changed in a weight."
