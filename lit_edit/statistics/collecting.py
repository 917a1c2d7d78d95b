"""Running a model over a corpus and summing something up, in steps that can be interrupted and gone on with."""

from __future__ import annotations

import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_edit.statistics.files import Partial, Position, StatisticsError, TextsHash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A collection that takes longer than this is announced, and saves its sums so often, both in seconds; the sums of a
# large model take gigabytes, and saving them must not become the work.
_LONG = 60.0
_SAVE_SECONDS = 300.0
_SAVE_SHARE = 0.05


class Collector(ABC):
    """What is summed up over the tokens of a corpus, for some modules of a model."""

    label: str  # what is collected, as a person reads it

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.names = tuple(modules)
        self.summands = 0

    @abstractmethod
    def remove(self) -> None:
        """Takes the hooks off the modules."""

    @abstractmethod
    def add(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        """Runs the model once and adds to the sums.

        Args:
            model: in evaluation mode.
            ids: token ids ``(B, L)``, padded on the right.
            mask: ``(B, L)``, true for the tokens that count.
        """

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """The sums so far, in float64, by the name of the module."""

    @abstractmethod
    def restore(self, sums: Mapping[str, Tensor], summands: int, device: torch.device) -> None:
        """Goes on from sums that were taken before."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """The statistics in float64 by the name of the module, once the corpus is read; the sums are given up.

        Raises:
            StatisticsError: if nothing was counted or the statistics are not finite.
        """


@dataclass(frozen=True)
class Pace:
    """How a collection goes.

    Attributes:
        max_tokens: when to stop.
        sequence_length: longest sequence, in tokens.
        batch_size: sequences in a forward pass.
        progress: show a progress bar.
        notify: told once, after two batches, how long it will take, if that is more than a minute.
        save_every: save the sums after so many tokens; if ``None``, every five minutes, or less often where saving
            takes long. Only where there is a file for them.
    """

    max_tokens: int
    sequence_length: int
    batch_size: int
    progress: bool = False
    notify: Callable[[str], None] | None = None
    save_every: int | None = None

    def check(self, model: nn.Module) -> None:
        """Raises for what cannot be.

        Raises:
            ValueError: if a number is not positive.
            StatisticsError: if the sequences are too long for the model.
        """
        numbers = {"max_tokens": self.max_tokens, "sequence_length": self.sequence_length}
        numbers |= {"batch_size": self.batch_size}
        numbers |= {} if self.save_every is None else {"save_every": self.save_every}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if longest is not None and self.sequence_length > longest:
            raise StatisticsError(
                f"sequence_length is {self.sequence_length}, the model takes {longest} tokens at most."
            )


def check_texts(texts: Iterable[str]) -> None:
    """Raises for a single text, which is a collection of characters.

    Raises:
        TypeError: if it is one.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a collection of texts, got a single one.")


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    modules: Mapping[str, nn.Module],
    collector_class: Callable[[Mapping[str, nn.Module]], Collector],
    pace: Pace,
    partial: Partial | None = None,
) -> tuple[dict[str, Tensor], Position]:
    """Runs a model over a corpus with a collector on some of its modules.

    With a file for the sums they are saved along the way and when the collection is broken off, and a later call goes
    on from there: over the same texts, in batches of the same size, the result is the same to the last bit. The first
    Ctrl-C takes effect between two batches, a second one at once.

    Args:
        model: a causal language model of ``transformers``, or a module called in the same way. It runs in evaluation
            mode and is left as it was.
        tokenizer: its tokenizer.
        texts: the corpus; read only as far as needed.
        modules: the projections by name.
        collector_class: what is collected.
        pace: how far, in which steps, and what is said along the way.
        partial: where the sums are kept until the collection is done.

    Returns:
        The statistics in float64 on the model's device by the names of ``modules``, and how far the corpus was read.

    Raises:
        StatisticsError: as the collector says; or if the texts are not those of an earlier, interrupted collection.
    """
    check_texts(texts)
    pace.check(model)
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    stream, digest, position = iter(texts), TextsHash(), Position()
    collector = collector_class(modules)
    try:
        model.eval()
        found = partial.load() if partial is not None else None
        if partial is not None and found is not None:
            sums, position = found
            _skip(stream, digest, position, partial)
            collector.restore(sums, position.summands, device)
        position = _loop(model, tokenizer, stream, digest, position, collector, pace, partial)
        return collector.results(), position
    finally:
        collector.remove()
        for module, training in modes.items():
            module.training = training


def _loop(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    stream: Iterator[str],
    digest: TextsHash,
    position: Position,
    collector: Collector,
    pace: Pace,
    partial: Partial | None,
) -> Position:
    """Batch after batch to the end; where the collection stands then."""
    device = next(model.parameters()).device
    saved, saved_at, saving = position.tokens, time.monotonic(), 0.0
    started, first = time.monotonic(), position.tokens
    whole = True  # no batch is half counted
    bar = tqdm(
        total=pace.max_tokens,
        initial=first,
        unit="token",
        unit_scale=True,
        desc=collector.label,
        disable=not pace.progress,
    )
    with bar, interrupts(held=partial is not None) as let_through:
        try:
            for number, (rows, used) in enumerate(_batches(tokenizer, stream, pace, position.tokens), start=1):
                let_through()
                ids, mask = _pad(rows, device)
                whole = False
                collector.add(model, ids, mask)
                digest.add(used)
                tokens = sum(map(len, rows))
                position = Position(
                    texts=position.texts + len(used),
                    tokens=position.tokens + tokens,
                    texts_sha256=digest.hexdigest(),
                    summands=collector.summands,
                )
                whole = True
                bar.update(tokens)
                seconds = time.monotonic() - started
                if number == 2 and pace.notify is not None:
                    _announce(collector.label, position.tokens - first, seconds, position.tokens, pace)
                if partial is None:
                    continue
                if pace.save_every is None:
                    wait = max(_SAVE_SECONDS, saving / _SAVE_SHARE)
                    due = time.monotonic() - saved_at > wait
                else:
                    due = position.tokens - saved >= pace.save_every
                if due and position.summands and position.tokens < pace.max_tokens:
                    began = time.monotonic()
                    partial.save(collector.sums(), position)
                    saved, saved_at, saving = position.tokens, time.monotonic(), time.monotonic() - began
            let_through()
        except BaseException:
            if partial is not None and whole and position.summands and position.tokens > saved:
                partial.save(collector.sums(), position)
            raise
    return position


def _announce(label: str, tokens: int, seconds: float, done: int, pace: Pace) -> None:
    left = (pace.max_tokens - done) * seconds / tokens
    if left > _LONG and pace.notify is not None:
        pace.notify(
            f"{label}: {pace.max_tokens:,} tokens at {tokens / seconds:,.0f} a second, about {spoken(left)} to go."
        )


def spoken(seconds: float) -> str:
    """A time as a person says it: ``40 seconds``, ``12 minutes``, ``3.5 hours``."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _skip(stream: Iterator[str], digest: TextsHash, position: Position, partial: Partial) -> None:
    """Passes over the texts that were counted before, and makes sure that they are those."""
    digest.add(islice(stream, position.texts))
    if digest.hexdigest() != position.texts_sha256:
        raise StatisticsError(
            f"The corpus does not begin with the {position.texts} texts that an interrupted collection has counted: "
            f"delete {partial.path} to begin again."
        )


@contextmanager
def interrupts(held: bool) -> Iterator[Callable[[], None]]:
    """Holds the first Ctrl-C back until the function that is handed out is called; a second one is not held.

    Only the main thread can be interrupted so, and only there is anything held.
    """
    before = signal.getsignal(signal.SIGINT)
    if not held or threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if waiting:
            before(number, frame)
        waiting.append(number)

    def let_through() -> None:
        if waiting:
            before(waiting.pop(), None)

    signal.signal(signal.SIGINT, hold)
    try:
        yield let_through
    finally:
        signal.signal(signal.SIGINT, before)


def _batches(
    tokenizer: PreTrainedTokenizerBase, texts: Iterator[str], pace: Pace, counted: int
) -> Iterator[tuple[list[list[int]], list[str]]]:
    """Batches of token ids of one text each, cut to length, until ``max_tokens`` are out, and the texts read for them.

    Texts without tokens are passed over.
    """
    left = pace.max_tokens - counted
    rows: list[list[int]] = []
    used: list[str] = []
    last = 0  # of the texts read, up to the last that gave a token
    while left:
        text = next(texts, None)
        if text is None:
            break
        used.append(text)
        ids = tokenizer(text, truncation=True, max_length=pace.sequence_length)["input_ids"][:left]
        if ids:
            rows.append(ids)
            left -= len(ids)
            last = len(used)
        if len(rows) == pace.batch_size:
            yield rows, used
            rows, used = [], []
    if rows:
        yield rows, used[:last]


def _pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the right and the mask of real tokens, both ``(B, L)``.

    Under causal attention what stands to the right of a token cannot reach it, so any id will do as padding, and a
    tokenizer needs none.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device)[None] < lengths[:, None]
