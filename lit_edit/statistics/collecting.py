"""Running a model over a corpus and summing something up, in steps that can be interrupted and resumed."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torchmetrics import Metric
from tqdm.auto import tqdm

from lit_edit.files import load_tensors, save_tensors
from lit_edit.units import time_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WINDOW = 16  # batches whose sequences are sorted by length, and after which a collection can be resumed
_LONG = 60.0  # seconds from which on a collection is announced, and after which its sums are saved
_SHARE = 0.05  # of the time that saving may take: the sums of a large model are gigabytes


class StatisticsError(ValueError):
    """Statistics that are missing, damaged, made from something else, or cannot be collected."""


class Collector(ABC):
    """What is summed up over the tokens of a corpus: a torchmetrics metric for each of some modules.

    The states of the metrics are sums, so that where `torch.distributed` runs their results are those of all processes.

    Attributes:
        kind: What the statistics are, as in a file's header.
        label: The same for people.
        batch_size: Sequences in a forward pass unless told otherwise.
        square: Whether a statistic is a square matrix.
    """

    kind: str
    label: str
    batch_size: int
    square: bool

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self.metrics: dict[str, Any] = {}

    @abstractmethod
    def hooks(self) -> AbstractContextManager[None]:
        """Installs what reads the modules."""

    @abstractmethod
    def add(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        """Runs the model once and adds to the sums.

        Args:
            model: In evaluation mode.
            ids: Token ids ``(B, L)``, padded on the right.
            mask: ``(B, L)``, true for the tokens that count.
        """

    @abstractmethod
    def metric(self, shape: tuple[int, ...]) -> Metric:
        """A metric that has counted nothing, with a ``total`` of this shape and a ``count``."""

    def results(self, device: torch.device) -> dict[str, Tensor]:
        """The statistics in float64 by the name of the module; the sums are given up.

        Raises:
            StatisticsError: If nothing was counted or a result is not finite.
        """
        shapes = {name: tuple(metric.total.shape) for name, metric in self.metrics.items()}
        known = {name: shape for others in gathered(shapes) for name, shape in others.items()}
        found = {}
        for name in self.modules:
            if name not in known:
                raise StatisticsError(f"The corpus for the {self.label.lower()} has no token that counts.")
            metric = self.metrics.pop(name, None) or self.metric(known[name]).to(device)
            matrix: Tensor = metric.compute()
            if not torch.isfinite(matrix.sum()):
                raise StatisticsError(f"The {self.label.lower()} of module {name!r} is not finite.")
            found[name] = matrix
        return found


def check_ran_once(runs: Mapping[str, int]) -> None:
    """Raises StatisticsError unless every module ran once in a pass."""
    wrong = [f"{name} ran {times} times" for name, times in runs.items() if times != 1]
    if wrong:
        raise StatisticsError(
            f"In one forward pass each module must see every token once, but {', '.join(wrong)}. Are these the "
            "projections of this very model?"
        )


def processes() -> tuple[int, int]:
    """Rank and number of processes of `torch.distributed`; (0, 1) where it does not run."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(own: Any) -> list[Any]:
    """What each process gives, by rank."""
    if processes()[1] == 1:
        return [own]
    found: list[Any] = [None] * processes()[1]
    distributed.all_gather_object(found, own)
    return found


@dataclass
class Progress:
    """How far into a corpus a collection has come.

    Attributes:
        batch_size: Sequences in a forward pass.
        windows: Windows that were counted.
        tokens: Tokens in them.
        texts_sha256: SHA-256 over the texts in them.
    """

    batch_size: int
    windows: int = 0
    tokens: int = 0
    texts_sha256: str = ""


def collect(
    collector: Collector,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_tokens: int,
    sequence_length: int = 256,
    batch_size: int | None = None,
    progress: bool = False,
    notify: Callable[[str], None] | None = None,
    partial: Path | None = None,
    identity: str = "",
) -> tuple[dict[str, Tensor], Progress]:
    """Runs a model over a corpus with a collector on some of its modules.

    A text with more tokens than a sequence takes is several sequences; nothing is left out. What the tokenizer adds to
    a text, BOS or EOS, it adds to each of them. The model runs in evaluation mode and its own precision, sums are taken
    in float64.

    With a ``partial`` file the sums are saved about once a minute, and a later call resumes from there, with the same
    result to the last bit. Where `torch.distributed` runs, the processes share the batches and nothing is saved.

    Args:
        collector: What is summed up.
        model: A causal language model of ``transformers``, or a module called in the same way.
        tokenizer: Its tokenizer.
        texts: Corpus; read only as far as needed.
        max_tokens: When to stop.
        sequence_length: Longest sequence, in tokens.
        batch_size: Sequences in a forward pass; the collector's own number if None.
        progress: Show a progress bar.
        notify: Told once how long it will take, if that is more than a minute.
        partial: File for the sums until the collection is done.
        identity: What is collected, to know the partial file by.

    Returns:
        The statistics in float64 on the model's device by the names of the modules, and how far the corpus was read.

    Raises:
        TypeError: If ``texts`` is a single text.
        ValueError: If a number is not positive.
        StatisticsError: If the sequences are too long for the model, nothing counts, or the texts are not those of the
            interrupted collection.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a collection of texts, got a single one.")
    size = collector.batch_size if batch_size is None else batch_size
    for name, value in (("max_tokens", max_tokens), ("sequence_length", sequence_length), ("batch_size", size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    _check_length(model, sequence_length)
    device, (rank, world) = next(model.parameters()).device, processes()
    if world > 1:
        partial = None  # processes are interrupted at different batches
    done = Progress(size) if partial is None else _load(partial, identity, collector, device) or Progress(size)
    counted, digest = Progress(done.batch_size), hashlib.sha256()
    modes = {module: module.training for module in model.modules()}
    began = saved_at = time.monotonic()
    saving, boundary = 0.0, True
    model.eval()
    bar = tqdm(total=max_tokens, unit="token", unit_scale=True, desc=collector.label, disable=not progress or rank > 0)
    try:
        with bar, collector.hooks():
            for rows, used in _windows(tokenizer, texts, sequence_length, max_tokens, done.batch_size * _WINDOW):
                if counted.windows >= done.windows:
                    boundary = False
                    order = sorted(rows, key=len, reverse=True)
                    batches = (order[i : i + done.batch_size] for i in range(0, len(order), done.batch_size))
                    for batch in islice(batches, rank, None, world):
                        collector.add(model, *_pad(batch, device))
                for text in used:
                    data = text.encode("utf-8", "surrogatepass")
                    digest.update(len(data).to_bytes(8, "little") + data)
                counted.windows += 1
                counted.tokens += sum(map(len, rows))
                counted.texts_sha256 = digest.hexdigest()
                bar.update(sum(map(len, rows)))
                if counted.windows == done.windows and counted != done:
                    raise StatisticsError(
                        "The corpus does not begin with the texts that an interrupted collection has counted: delete "
                        f"{partial} to begin again."
                    )
                boundary = True
                if counted.windows == done.windows + 1 and notify is not None:
                    pace = (counted.tokens - done.tokens) / (time.monotonic() - began)
                    left = (max_tokens - counted.tokens) / pace
                    if left > _LONG:
                        pace_text = f"{max_tokens:,} tokens, {pace:,.0f} a second"
                        notify(f"{collector.label}: {pace_text}, {time_text(left)} to go.")
                if partial is not None and time.monotonic() - saved_at > max(_LONG, saving / _SHARE):
                    saving = _save(partial, identity, collector, counted)
                    saved_at = time.monotonic()
            if counted.windows < done.windows:
                raise StatisticsError(
                    f"The corpus ends before the texts that an interrupted collection has counted: delete {partial} to "
                    "begin again."
                )
        return collector.results(device), counted
    except BaseException:
        if partial is not None and boundary and counted.windows > done.windows and collector.metrics:
            _save(partial, identity, collector, counted)
        raise
    finally:
        for module, training in modes.items():
            module.training = training


def _check_length(model: nn.Module, sequence_length: int) -> None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise StatisticsError(f"sequence_length is {sequence_length}, the model takes {longest} tokens at most.")


def _save(path: Path, identity: str, collector: Collector, counted: Progress) -> float:
    """Writes the sums so far; the seconds that it took."""
    began = time.monotonic()
    tensors = {}
    for name, metric in collector.metrics.items():
        tensors[f"total.{name}"], tensors[f"count.{name}"] = metric.total.cpu(), metric.count.cpu()
    save_tensors(path, tensors, {"identity": identity, "progress": json.dumps(asdict(counted))})
    return time.monotonic() - began


def _load(path: Path, identity: str, collector: Collector, device: torch.device) -> Progress | None:
    """Gives the collector the sums that were saved, if they are of what is being collected."""
    if not path.is_file():
        return None
    remedy = f"Delete {path} to begin again."
    try:
        tensors, metadata = load_tensors(path)
        known = Progress(**json.loads(metadata["progress"]))
        if metadata["identity"] != identity:
            raise StatisticsError(f"The sums of an interrupted collection are of something else. {remedy}")
        for name in collector.modules:
            total = tensors[f"total.{name}"]
            metric: Any = collector.metric(tuple(total.shape)).to(device)
            metric.total += total.to(device)
            metric.count += tensors[f"count.{name}"].to(device)
            collector.metrics[name] = metric
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, StatisticsError):
            raise
        raise StatisticsError(f"The sums of an interrupted collection cannot be read: {error} {remedy}") from error
    return known


def _windows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], sequence_length: int, max_tokens: int, size: int
) -> Iterator[tuple[list[list[int]], list[str]]]:
    """Sequences in the order of the corpus, a batch at a time, and the texts that begin in them."""
    rows: list[list[int]] = []
    used: list[str] = []
    left = max_tokens
    for text in texts:
        found = sequences_of(tokenizer, text, sequence_length)
        if found:
            used.append(text)
        for ids in found:
            rows.append(ids[:left])
            left -= len(rows[-1])
            if len(rows) == size or not left:
                yield rows, used
                rows, used = [], []
            if not left:
                return
    if rows:
        yield rows, used


def sequences_of(tokenizer: PreTrainedTokenizerBase, text: str, longest: int) -> list[list[int]]:
    """The token ids of a text, in sequences of at most ``longest`` tokens; none for a text without tokens.

    What the tokenizer adds before and after a text stands before and after each of them.

    Raises:
        StatisticsError: If the sequences have no room for a token of the text.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    if len(ids) <= longest:
        return [ids] if ids else []
    if all(added):  # special tokens written out in the text
        return [ids[i : i + longest] for i in range(0, len(ids), longest)]
    start = next(i for i, special in enumerate(added) if not special)
    end = next(i for i in range(len(ids), start, -1) if not added[i - 1])
    head, tail = ids[:start], ids[end:]
    room = longest - len(head) - len(tail)
    if room < 1:
        raise StatisticsError(
            f"sequence_length is {longest}, and the tokenizer adds {len(head) + len(tail)} tokens to each text: there "
            "is no room for any of its own. Raise sequence_length."
        )
    return [head + ids[i : min(i + room, end)] + tail for i in range(start, end, room)]


def _pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the right and the mask of real tokens, both ``(B, L)``.

    Under causal attention what stands to the right of a token cannot reach it: any id will do as padding.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device)[None] < lengths[:, None]
