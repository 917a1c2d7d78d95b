"""Running a model over a corpus and summing something up, in steps that can be interrupted and gone on with."""

from __future__ import annotations

import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torchmetrics import Metric
from tqdm.auto import tqdm

from lit_edit.statistics.files import Partial, Position, StatisticsError, TextsHash, corpus_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A collection that takes longer than this is announced, and saves its sums so often, both in seconds; the sums of a
# large model take gigabytes, and saving them must not become the work.
_LONG = 60.0
_SAVE_SECONDS = 300.0
_SAVE_SHARE = 0.05
_WINDOW = 16  # batches whose sequences are sorted by length


class Collector(ABC):
    """What is summed up over the tokens of a corpus, for some modules of a model: a metric for each.

    The metrics are those of torchmetrics whose states are sums: where `torch.distributed` runs, they are taken over all
    its processes when the statistics are computed.
    """

    device = torch.device("cpu")
    label: str  # what is collected, as a person reads it
    empty: str  # what to say of a corpus in which nothing counts

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.names = tuple(modules)
        self.metrics: dict[str, Metric] = {}
        self.summands = 0

    @staticmethod
    def check_ran_once(runs: Mapping[str, int]) -> None:
        """Raises unless every module ran once in a pass.

        Args:
            runs: how often, by the module's name.

        Raises:
            StatisticsError: naming those that did not.
        """
        wrong = [f"{name} ran {times} times" for name, times in runs.items() if times != 1]
        if wrong:
            raise StatisticsError(
                f"In one forward pass each module must see every token once, but {', '.join(wrong)}. Are these the "
                "projections of this very model?"
            )

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
    def metric(self, shape: tuple[int, ...]) -> Metric:
        """A metric that has counted nothing, for sums of a shape."""

    @abstractmethod
    def total(self, metric: Metric) -> Tensor:
        """The sum that a metric of this collector has, as it can be added to."""

    def sums(self) -> dict[str, Tensor]:
        """The sums so far, in float64, by the name of the module; empty before anything was counted."""
        return {name: self.total(self.metrics[name]) for name in self.names if name in self.metrics}

    def restore(self, sums: Mapping[str, Tensor], summands: int, device: torch.device) -> None:
        """Goes on from sums that were taken before."""
        self.summands = summands
        for name in self.names:
            metric: Any = self.metric(tuple(sums[name].shape)).to(device)
            self.total(metric).copy_(sums[name])
            metric.count += summands
            self.metrics[name] = metric

    def results(self) -> dict[str, Tensor]:
        """The statistics in float64 by the name of the module, once the corpus is read; the sums are given up.

        Where `torch.distributed` runs, those of all processes together, the same in each of them.

        Raises:
            StatisticsError: if nothing was counted or the statistics are not finite.
        """
        shapes = {name: tuple(total.shape) for name, total in self.sums().items()}
        counted = gathered((self.summands, shapes))
        self.summands = sum(summands for summands, _ in counted)
        if not self.summands:
            raise StatisticsError(self.empty)
        known = {name: shape for _, others in counted for name, shape in others.items()}
        # One by one: the sums of a large model take as much memory as what comes of them.
        return {name: self._result(name, known[name]) for name in self.names}

    def _result(self, name: str, shape: tuple[int, ...]) -> Tensor:
        metric = self.metrics.pop(name, None)
        if metric is None:  # this process had no batch
            metric = self.metric(shape).to(self.device)
        found: Tensor = metric.compute()
        if not torch.isfinite(found.sum()):
            raise StatisticsError(f"The {self.label.lower()} of module {name!r} holds values that are not finite.")
        return found


def processes() -> tuple[int, int]:
    """Which of how many processes of `torch.distributed` this is; (0, 1) where it does not run."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(own: Any) -> list[Any]:
    """What each of the processes gives, in their order."""
    number = processes()[1]
    if number == 1:
        return [own]
    found: list[Any] = [None] * number
    distributed.all_gather_object(found, own)
    return found


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
        config: Any = getattr(model, "config", None)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        longest = getattr(text, "max_position_embeddings", None)
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

    A text with more tokens than a sequence takes is several sequences, one after the other, the last as long as it
    comes; nothing is left out. What the tokenizer adds to a text, BOS or EOS, it adds to each of them, and it counts as
    part of their length.

    Where `torch.distributed` runs, all processes read the whole corpus, and each runs the model over its share of the
    batches: process r of n over the batches r, r + n, ... All get the same result, that of one process up to the order
    of summation. The sums are then not saved along the way, and a file with them is passed over.

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
    if processes()[1] > 1:
        partial = None  # processes are interrupted at different batches
    collector = collector_class(modules)
    collector.device = device
    try:
        model.eval()
        found = partial.load() if partial is not None else None
        if partial is not None and found is not None:
            sums, position = found
            stream = _skip(stream, digest, position, partial)
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
    whole, number = True, 0  # no batch is half counted
    rank, others = processes()
    bar = tqdm(
        total=pace.max_tokens,
        initial=first,
        unit="token",
        unit_scale=True,
        desc=collector.label,
        disable=not pace.progress or rank > 0,
    )
    with bar, interrupts(held=partial is not None) as let_through:
        try:
            for batch in _batches(tokenizer, stream, pace, position, partial):
                let_through()
                whole = False
                number += 1
                if (number - 1) % others == rank:
                    collector.add(model, *_pad(batch.rows, device))
                if batch.window is None:  # the last one of its window
                    digest.add(batch.used)
                tokens = sum(map(len, batch.rows))
                position = batch.behind(position, tokens, digest, collector.summands)
                whole = True
                bar.update(tokens)
                seconds = time.monotonic() - started
                if number == 2 * others and pace.notify is not None:
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


def _skip(stream: Iterator[str], digest: TextsHash, position: Position, partial: Partial) -> Iterator[str]:
    """Passes over the texts that were counted before, and makes sure that they are those.

    Returns:
        The texts to come, from the last of those on if more sequences of it are.
    """
    last: list[str] = []

    def counted() -> Iterator[str]:
        for text in islice(stream, position.texts):
            last[:] = [text]
            yield text

    digest.add(counted())
    if digest.hexdigest() != position.texts_sha256:
        raise StatisticsError(
            f"The corpus does not begin with the {position.texts} texts that an interrupted collection has counted: "
            f"delete {partial.path} to begin again."
        )
    return chain(last, stream) if position.sequences else stream


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


@dataclass(frozen=True, eq=False)
class _Batch:
    """Sequences of about one length, out of a window of sequences that follow one another in the corpus.

    Attributes:
        rows: the sequences.
        used: the texts that the window begins.
        sequences: how many sequences of the last of its texts are out behind it; 0 if that is used up.
        window: how many batches of the window are done with this one; None if it is the last.
        size: how many sequences a batch of this window has.
    """

    rows: list[list[int]]
    used: list[str]
    sequences: int
    window: int | None
    size: int

    def behind(self, position: Position, tokens: int, digest: TextsHash, summands: int) -> Position:
        """The position behind it, from the one before; the digest is that of all windows that are done by then."""
        counted = position.tokens + tokens
        done = replace(position, tokens=counted, texts_sha256=digest.hexdigest(), summands=summands)
        if self.window is not None:
            sha256 = position.window_sha256 or corpus_sha256(self.used)
            ahead = position.ahead + tokens
            return replace(done, batches=self.window, ahead=ahead, window_sha256=sha256, batch_size=self.size)
        texts = position.texts + len(self.used)
        return replace(done, texts=texts, sequences=self.sequences, batches=0, ahead=0, window_sha256="", batch_size=0)


def _batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterator[str],
    pace: Pace,
    position: Position,
    partial: Partial | None,
) -> Iterator[_Batch]:
    """Batches of sequences of token ids, until ``max_tokens`` are out.

    Within a window of so many batches sequences are sorted, the longest first, and so hardly padded. A window that was
    begun before is gone on with in batches of the size that they had then.

    Args:
        tokenizer: of the model.
        texts: from the one in which the window of ``position`` begins, or the next.
        pace: how long sequences are, how many make a batch, and when to stop.
        position: what was counted before.
        partial: where that was kept, if anywhere.

    Raises:
        StatisticsError: if a window of which batches were counted before has other texts now, or none.
    """
    done, size = position.batches, position.batch_size or pace.batch_size
    found: tuple[list[list[int]], list[str], int]
    for found in chain(_windows(tokenizer, texts, pace, position), [([], [], 0)]):
        rows, used, sequences = found
        if partial is not None and done and corpus_sha256(used) != position.window_sha256:
            raise StatisticsError(
                "The corpus goes on with other texts than those that an interrupted collection has begun to count: "
                f"delete {partial.path} to begin again."
            )
        order = sorted(rows, key=len, reverse=True)
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        for number, part in enumerate(parts, start=1):
            if number > done:
                yield _Batch(part, used, sequences, None if number == len(parts) else number, size)
        done, size = 0, pace.batch_size


def _windows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterator[str], pace: Pace, position: Position
) -> Iterator[tuple[list[list[int]], list[str], int]]:
    """Sequences in the order of the corpus, until ``max_tokens`` are out.

    Texts without tokens are passed over.

    Yields:
        The sequences, the texts read for them that were not begun before, and how many sequences of the last text are
        out by then; 0 if it is used up.
    """
    left, before = pace.max_tokens - (position.tokens - position.ahead), position.sequences
    window = (position.batch_size or pace.batch_size) * _WINDOW
    rows: list[list[int]] = []
    used: list[str] = []
    last = 0  # of the texts read, up to the last that gave a token
    while left:
        text = next(texts, None)
        if text is None:
            break
        if not before:
            used.append(text)
        found = sequences_of(tokenizer, text, pace.sequence_length)
        for number, ids in enumerate(found[before:], start=before + 1):
            rows.append(ids[:left])
            left -= len(rows[-1])
            last = len(used)
            if len(rows) == window or not left:
                yield rows, used, number if number < len(found) else 0
                rows, used, last = [], [], 0
                window = pace.batch_size * _WINDOW
            if not left:
                return
        before = 0
    if rows:
        yield rows, used[:last], 0


def sequences_of(tokenizer: PreTrainedTokenizerBase, text: str, longest: int) -> list[list[int]]:
    """The token ids of a text, in sequences of at most so many tokens; none for a text without tokens.

    What the tokenizer adds before and after a text stands before and after each of them.

    Raises:
        StatisticsError: if the sequences have no room for a token of the text.
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

    Under causal attention what stands to the right of a token cannot reach it, so any id will do as padding, and a
    tokenizer needs none.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device)[None] < lengths[:, None]
