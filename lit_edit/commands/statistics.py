"""``python train.py statistics``: key covariances and gradients collected before they are needed."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_edit.commands.options import Parser
from lit_edit.configs.find import values_of
from lit_edit.model.loading import on_terminal
from lit_edit.model.workspace import Workspace
from lit_edit.module import LitEdit
from lit_edit.statistics import Collector, GradientCollector, KeyCollector, Statistics, cache_folder
from lit_edit.statistics.kept import Kept, clear, kept
from lit_edit.units import counted, size_text, time_text

SUMMARY = "Collect key covariances beforehand, in steps that can be interrupted."

_DESCRIPTION = """\
Collects the statistics that `fit` with the same options would collect, into the files where it looks for them: key
covariances C = E[k k^T] of the layers that the editor may edit, and the gradient of the language-model loss if the
editor needs it. What is there already is not collected again; each layer has a file of its own.

After Ctrl-C or an error of the network the same command resumes from the last saved sums (at most a minute old), and
ends with the very numbers of an uninterrupted run."""

_EPILOG = """\
Every other option is one of `fit`, see `python train.py fit --help`:
  --model.model gpt2-xl --model.dtype bfloat16   the model, as it will be edited
  --model.corpus texts.txt                       a text on each line; also .jsonl, where the field `text` is one
  --model.corpus hf:owner/name                   a data set of the Hugging Face hub, read as a stream and only as far
                                                 as needed, shuffled with a fixed seed; hf:owner/name@revision:split,
                                                 hf:owner/name:config:split:field, hf:folder
  --model.corpus_tokens 1000000                  tokens to count: at least 10 for each feature of a key are advised
  --model.cache_dir statistics                   folder of the files
`fit` with --model.collect_statistics=false ends in an error if they are not there.

  python train.py statistics --config memit.yaml
  python train.py statistics --config memit.yaml --config models/gpt2-xl/memit.yaml --model.corpus_tokens 100000
  python train.py statistics --layers 4 5 6 --model.model gpt2-xl --gradients
  python train.py statistics --list
  python train.py statistics --clear --older_than 30"""

Ready = Callable[[list[str]], tuple[LitEdit, torch.device]]


def parser() -> Parser:
    """The options of ``statistics`` besides those of ``fit``."""
    options = Parser("statistics", _DESCRIPTION, _EPILOG)
    options.add_argument(
        "--layers", type=int, nargs="+", metavar="LAYER", help="layers to collect for (default: the editor's)"
    )
    options.add_argument("--gradients", action="store_true", help="the gradient, too, whatever the editor needs")
    options.add_argument("--list", action="store_true", help="what is kept, and what it was made from")
    options.add_argument("--clear", action="store_true", help="remove what is kept, or what --older_than DAYS is")
    options.add_argument("--older_than", type=float, default=0.0, metavar="DAYS", help="with --clear: leave the rest")
    options.add_argument(
        "--batch_size", type=int, metavar="N", help="sequences in a forward pass (default: 16; 4 with a backward pass)"
    )
    return options


def condition(covariance: Tensor) -> tuple[int, float]:
    """Rank and condition number of a key covariance ``(p, p)``; the latter is infinite unless the rank is full.

    Eigenvalues below ``p ε λ_max`` are rounding.
    """
    values = torch.linalg.eigvalsh(covariance.double())
    rank = int((values > len(values) * torch.finfo(torch.float64).eps * values[-1]).sum())
    return rank, float(values[-1] / values[0]) if rank == len(values) else float("inf")


def main(args: Sequence[str] | None, ready: Ready) -> int:
    """Collects what is missing.

    Args:
        args: The options, without the word ``statistics``; those of the process after it if None.
        ready: Makes the module, and says where it computes, of the arguments of ``fit``.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        ValueError: For a setting that cannot be used, or statistics that cannot be collected.
    """
    own, others = parser().parse_known_args(list(sys.argv[2:] if args is None else args))
    if own.list or own.clear:
        folder = Path(next(iter(values_of(others, "--model.cache_dir")), cache_folder()))
        print_kept(clear(folder, own.older_than) if own.clear else kept(folder), own.clear, folder)
        return 0
    if not any(arg.split("=", 1)[0] in ("--config", "-c") for arg in others):
        if own.layers is None:
            raise ValueError("statistics: for which layers? --config memit.yaml, or --layers 4 5 6.")
        others = ["--config", "memit.yaml", *others]  # with the layers given, any editor will do
    module, device = ready(["fit", *others])
    module.model.to(device)
    module.model.eval().requires_grad_(False)
    how, editor = module.preparation, module.editor
    workspace = Workspace.of(module.model, module.tokenizer, family=how.family)
    layers: list[int] = editor.editable_layers(workspace) if own.layers is None else own.layers
    workspace.architecture.check(layers)
    if len(set(layers)) < len(layers):
        raise ValueError(f"statistics: --layers {' '.join(map(str, layers))} names a layer twice.")
    kinds: list[type[Collector]] = [KeyCollector] if editor.needs_covariances or own.layers is not None else []
    kinds += [GradientCollector] if editor.needs_gradients or own.gradients else []
    if not kinds:
        raise ValueError(
            f"statistics: {editor.describe()} needs none; name --layers to collect key covariances all the same."
        )
    console = Console(highlight=False)
    for kind in kinds:
        asked = how.statistics(kind, workspace, layers)
        print(
            f"{kind.label} of {module.model_name!r} over {how.corpus_tokens:,} tokens of the corpus {how.corpus!r}, in "
            f"sequences of at most {asked.wanted.sequence_length}."
        )
        console.print(_before(asked, layers, workspace))
        sys.stdout.flush()
        began, missing = time.monotonic(), asked.missing()
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = asked.get(batch_size=own.batch_size, progress=on_terminal(), notify=_say)
        except KeyboardInterrupt:
            there = asked.partial.is_file()
            print(f"Interrupted. {'The same command resumes from here.' if there else 'Nothing was saved yet.'}")
            return 130
        tokens = max(header.n_tokens or 0 for header in asked.headers.values())
        if missing:
            print(f"{tokens:,} tokens counted in all, {time_text(time.monotonic() - began)} this time.")
        if tokens < how.corpus_tokens:
            print(f"The corpus has no more than {tokens:,} tokens.")
        for warning in said:
            print(f"note: {warning.message}")
        console.print(_after(asked, layers, found))
        for layer, path in zip(layers, asked.paths.values(), strict=True):
            print(f"layer {layer}: {path}")
    return 0


def print_kept(found: Sequence[Kept], gone: bool, folder: Path) -> None:
    """Prints files of statistics as a table, and their size together."""
    table = Table("layer", "kind", "corpus", "tokens", "model", "size", "days")
    for one in found:
        made = one.header
        tokens = f"{made.n_tokens:,}" if made is not None and made.n_tokens is not None else "?"
        about = (
            ("?", "unreadable", "?", tokens, "?")
            if made is None
            else (", ".join(made.layers), made.kind, made.corpus, tokens, made.model[:8])
        )
        table.add_row(*about, size_text(one.size), f"{one.days:.0f}")
    if found:
        Console(highlight=False).print(table)
    together = size_text(sum(one.size for one in found))
    print(f"{counted(len(found), 'file')}, {together}{' removed' if gone else ''}, in {folder}.")


def _say(said: str) -> None:
    print(said, flush=True)


def _before(asked: Statistics, layers: Sequence[int], workspace: Workspace) -> Table:
    """What will be collected, and the memory for it."""
    table = Table("layer", "matrix", "p", "memory", "state")
    total, missing = 0, asked.missing()
    for layer, name in zip(layers, asked.modules, strict=True):
        d, p = workspace.architecture[layer].weight.shape
        size = 8 * p * (p if asked.collector.square else d)
        total += size
        table.add_row(str(layer), name, str(p), size_text(size), "missing" if name in missing else "there")
    table.add_row("all", "float64", "", size_text(total), f"{len(missing)} missing")
    return table


def _after(asked: Statistics, layers: Sequence[int], found: dict[str, Tensor]) -> Table:
    """What the statistics are like."""
    if not asked.collector.square:
        table = Table("layer", "tokens", "norm")
        for layer, (name, matrix) in zip(layers, found.items(), strict=True):
            table.add_row(str(layer), f"{asked.headers[name].n_tokens:,}", f"{float(matrix.norm()):.4g}")
        return table
    table = Table("layer", "tokens", "p", "tokens / p", "rank", "condition number")
    for layer, (name, matrix) in zip(layers, found.items(), strict=True):
        tokens, p, (rank, number) = asked.headers[name].n_tokens or 0, len(matrix), condition(matrix)
        table.add_row(str(layer), f"{tokens:,}", str(p), f"{tokens / p:.1f}", str(rank), f"{number:.3g}")
    return table
