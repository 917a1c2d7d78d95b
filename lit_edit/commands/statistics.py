"""``python train.py statistics``: key covariances and gradients collected before they are needed."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_edit.commands.estimate import size_text
from lit_edit.commands.options import Parser
from lit_edit.editors import Editor
from lit_edit.model.loading import on_terminal
from lit_edit.model.workspace import Workspace
from lit_edit.module import LitEdit
from lit_edit.session import statistics_of
from lit_edit.statistics import GRADIENTS, KEY_COVARIANCES, Kind, Statistics, spoken
from lit_edit.statistics.corpora import load_corpus

SUMMARY = "Collect key covariances beforehand, in steps that can be interrupted."

_DESCRIPTION = """\
Collects the statistics that `fit` with the same options would collect, into the files where it looks for them: key
covariances C = E[k k^T] of the layers that the editor may edit, and the gradient of the language-model loss if the
editor needs it. What is there already is not collected again; each layer has a file of its own.

Ctrl-C, or an error of the network, leaves a file with the sums so far: the same command goes on from there, and ends
with the very numbers of a run that was not interrupted. A text longer than a sequence is read as several, to its end.

The command is one process. In a program of your own that has initialised torch.distributed, the processes share the
work: lit_edit.statistics.collect_covariances and collect_gradients say how."""

_EPILOG = """\
Every other option is one of `fit`, see `train.py fit --help`:
  --model.model gpt2-xl --model.dtype bfloat16   the model, as it will be edited
  --model.corpus texts.txt                       a text on each line; also .jsonl, where the field `text` is one
  --model.corpus hf:owner/name                   a data set of the Hugging Face hub, read as a stream and only as far
                                                 as needed, shuffled with a fixed seed; hf:owner/name@revision:split,
                                                 hf:owner/name:config:split:field, hf:folder
  --model.corpus_tokens 1000000                  tokens to count: at least 10 for each feature of a key are advised
  --model.cache_dir statistics                   where the files are kept
`fit` with --model.collect_statistics=false ends in an error if they are not there.

  python train.py statistics --config memit.yaml
  python train.py statistics --config memit.yaml --config models/gpt2-xl/memit.yaml --model.corpus_tokens 100000
  python train.py statistics --layers 4 5 6 --model.model gpt2-xl --gradients"""

Ready = Callable[[list[str]], tuple[LitEdit, torch.device]]


def parser() -> Parser:
    """The options of ``statistics`` besides those of ``fit``."""
    options = Parser("statistics", _DESCRIPTION, _EPILOG)
    options.add_argument(
        "--layers", type=int, nargs="+", metavar="LAYER", help="layers to collect for (default: the editor's)"
    )
    options.add_argument("--gradients", action="store_true", help="the gradient, too, whatever the editor needs")
    options.add_argument(
        "--batch_size", type=int, metavar="N", help="sequences in a forward pass (default: 16; 4 with a backward pass)"
    )
    options.add_argument(
        "--save_every", type=int, metavar="TOKENS", help="save the sums so often (default: every five minutes)"
    )
    return options


@dataclass(frozen=True)
class Spectrum:
    """How well a key covariance can be inverted.

    Attributes:
        rank: eigenvalues above rounding, ``p ε λ_max``.
        condition: ``λ_max / λ_min``; infinite if the rank is not full.
    """

    rank: int
    condition: float


def spectrum(covariance: Tensor) -> Spectrum:
    """Rank and condition number of a symmetric matrix ``(p, p)`` without negative eigenvalues, in float64."""
    values = torch.linalg.eigvalsh(covariance.double())
    largest = float(values[-1])
    rank = int((values > len(values) * torch.finfo(torch.float64).eps * largest).sum())
    return Spectrum(rank, largest / float(values[0]) if rank == len(values) else float("inf"))


def main(args: Sequence[str] | None, ready: Ready) -> int:
    """Collects what is missing.

    Args:
        args: the options, without the word ``statistics``; those of the process after it if None.
        ready: makes the module, and says where it computes, of the arguments of ``fit``.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        ValueError: for a setting that cannot be used, or statistics that cannot be collected.
    """
    own, others = parser().parse_known_args(list(sys.argv[2:] if args is None else args))
    if not any(arg.split("=", 1)[0] in ("--config", "-c") for arg in others):
        if own.layers is None:
            raise ValueError("statistics: for which layers? --config memit.yaml, or --layers 4 5 6.")
        others = ["--config", "memit.yaml", *others]  # with the layers given, any editor will do
    module, device = ready(["fit", *others])
    module.model.to(device)
    module.model.eval().requires_grad_(False)
    workspace = Workspace.of(module.model, module.tokenizer, family=module.family)
    layers = _layers(workspace, module.editor, own.layers)
    kinds = _kinds(module.editor, own.layers is not None, own.gradients)
    corpus = load_corpus(module.corpus)
    console = Console(highlight=False)
    for kind in kinds:
        asked = statistics_of(kind, workspace, layers, corpus, module.corpus, module.corpus_tokens, module.cache_dir)
        print(
            f"{_name(kind)} of {module.model_name!r} over {module.corpus_tokens:,} tokens of the corpus "
            f"{module.corpus!r}, {corpus.order}, in sequences of at most {asked.wanted.sequence_length}."
        )
        console.print(_before(asked, layers, workspace))
        sys.stdout.flush()
        began, missing = time.monotonic(), asked.missing()
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = asked.get(
                    batch_size=own.batch_size, progress=on_terminal(), notify=_say, save_every=own.save_every
                )
        except KeyboardInterrupt:
            there = asked.partial().path.is_file()
            print(f"Interrupted. {'The same command goes on from here.' if there else 'No batch was counted yet.'}")
            return 130
        seconds = time.monotonic() - began
        tokens = max(header.n_tokens or 0 for header in asked.headers.values())
        if missing:
            print(f"{tokens:,} tokens counted in all, {spoken(seconds)} this time.")
        if tokens < module.corpus_tokens:
            print(f"The corpus has no more than {tokens:,} tokens.")
        for warning in said:
            print(f"note: {warning.message}")
        console.print(_after(asked, layers, found))
        for layer, path in zip(layers, asked.paths.values(), strict=True):
            print(f"layer {layer}: {path}")
    return 0


def _say(said: str) -> None:
    print(said, flush=True)


def _name(kind: Kind) -> str:
    return "Key covariances" if kind is KEY_COVARIANCES else "Gradients"


def _layers(workspace: Workspace, editor: Editor, given: list[int] | None) -> list[int]:
    """The layers asked for, or else the editor's.

    Raises:
        ValueError: if the model does not have one, or one is named twice.
    """
    if given is None:
        return editor.editable_layers(workspace)
    if len(set(given)) < len(given):
        raise ValueError(f"statistics: --layers {' '.join(map(str, given))} names a layer twice.")
    return [workspace.architecture[layer].index for layer in given]


def _kinds(editor: Editor, layers_given: bool, gradients: bool) -> list[Kind]:
    kinds = [KEY_COVARIANCES] if editor.needs_covariances or layers_given else []
    kinds += [GRADIENTS] if editor.needs_gradients or gradients else []
    if not kinds:
        raise ValueError(
            f"statistics: {type(editor).__name__} needs none; name --layers to collect key covariances all the same."
        )
    return kinds


def _before(asked: Statistics, layers: Sequence[int], workspace: Workspace) -> Table:
    """What will be collected, and the memory for it."""
    table = Table("layer", "matrix", "p", "memory", "state")
    total = 0
    missing = asked.missing()
    for layer, name in zip(layers, asked.modules, strict=True):
        d, p = workspace.architecture[layer].weight.shape
        size = 8 * p * (p if asked.kind is KEY_COVARIANCES else d)
        total += size
        table.add_row(str(layer), name, str(p), size_text(size), "missing" if name in missing else "there")
    table.add_row("all", "float64", "", size_text(total), f"{len(missing)} missing")
    return table


def _after(asked: Statistics, layers: Sequence[int], found: dict[str, Tensor]) -> Table:
    """What the statistics are like."""
    if asked.kind is not KEY_COVARIANCES:
        table = Table("layer", "tokens", "norm")
        for layer, (name, matrix) in zip(layers, found.items(), strict=True):
            table.add_row(str(layer), f"{asked.headers[name].n_tokens:,}", f"{float(matrix.norm()):.4g}")
        return table
    table = Table("layer", "tokens", "p", "tokens / p", "rank", "condition number")
    for layer, (name, matrix) in zip(layers, found.items(), strict=True):
        tokens, p, has = asked.headers[name].n_tokens or 0, len(matrix), spectrum(matrix)
        table.add_row(str(layer), f"{tokens:,}", str(p), f"{tokens / p:.1f}", str(has.rank), f"{has.condition:.3g}")
    return table
