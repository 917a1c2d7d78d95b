"""Forward passes from the subject's last token on: what a change there cannot reach is computed once.

A value is tried at the subject's last token, in some first layer. Causal attention keeps it from every token to the
left, and the blocks below that layer never see it. So the blocks below need not run again, and of the tokens to the
left only their attention keys and values are needed; both are taken from one complete pass. Of the logits only those
that a loss reads are computed.

Nothing here is an approximation. What is used of `transformers` is public: a cache passed as ``past_key_values``,
explicit ``position_ids``, and hooks on blocks and on the output embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lit_edit.prompts import Batch
from lit_edit.taps import change_outputs


class _Kept(DynamicLayer):
    """The attention keys and values of the tokens to the left: joined to new ones, never added to."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._left = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._left
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class Passes(ABC):
    """Rows of text through a model, over and over, with something changed at the subject's last token of each."""

    @property
    @abstractmethod
    def changed(self) -> Tensor:
        """(rows,): the column of the subject's last token in what the model sees of a row."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> Passes:
        """Some of the rows, in the order given; a row may be taken more than once."""

    @abstractmethod
    def logits(self, rows: Tensor, columns: Tensor, changes: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
        """Logits at some places, with outputs of modules changed.

        Args:
            rows: (n,), of the places to read.
            columns: (n,), counted from each row's subject's last token, which is 0; not below.
            changes: a function of the output (rows, tokens, d) for each module to change.

        Returns:
            (n, vocabulary), in the model's dtype.
        """


@dataclass(frozen=True, eq=False)
class CompletePasses(Passes):
    """Every token through every block, for any model.

    Args:
        model: the model.
        batch: the rows, each with its subject's last token.
    """

    model: nn.Module
    batch: Batch

    @property
    def changed(self) -> Tensor:
        """Where it is in the text."""
        return self.batch.subject_last

    def select(self, rows: Sequence[int]) -> CompletePasses:
        """Some of the rows, without columns that none of them needs."""
        at = torch.tensor(list(rows), device=self.batch.input_ids.device)
        width = int(self.batch.attention_mask[at].sum(1).max())
        return CompletePasses(
            self.model,
            Batch(
                self.batch.input_ids[at, :width],
                self.batch.attention_mask[at, :width],
                self.batch.labels[at, :width],
                self.batch.subject_last[at],
            ),
        )

    def logits(self, rows: Tensor, columns: Tensor, changes: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
        """By one complete pass; the head sees only the places to read."""
        ids, mask = self.batch.input_ids, self.batch.attention_mask
        with change_outputs(changes, len(ids)), _reading(self.model, rows, self.changed[rows] + columns):
            found: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found[0]


@dataclass(frozen=True, eq=False)
class Suffixes(Passes):
    """Rows from each one's subject's last token on, with what lies to the left and below as it was computed once.

    Column ``j`` of a row is its token ``start + j``; rows shorter than the longest are padded on the right.

    Args:
        model: the model.
        blocks: all its blocks.
        ids: (rows, S).
        mask: (rows, P + S): which of the P tokens to the left, and of the suffix, a row has.
        positions: (rows, S), the tokens' places in the whole text.
        starts: (rows,), where each suffix starts in the whole text.
        hidden: (rows, S, d), the input of the first block that runs; None where that is the first of all.
        past: per block the keys and values (rows, heads, P, head size) of the tokens to the left.
        first: the first block that runs; changes in blocks below it are not seen.
        tuples: whether blocks return a tuple that starts with the hidden states, as some do.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    ids: Tensor
    mask: Tensor
    positions: Tensor
    starts: Tensor
    hidden: Tensor | None
    past: list[tuple[Tensor, Tensor]]
    first: int
    tuples: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def changed(self) -> Tensor:
        """The first column."""
        return torch.zeros_like(self.starts)

    def select(self, rows: Sequence[int]) -> Suffixes:
        """Some of the rows, without columns that none of them needs."""
        at = torch.tensor(list(rows), device=self.ids.device)
        prefix = int(self.starts[at].max())
        before = self.mask.shape[1] - self.ids.shape[1]
        width = int(self.mask[at, before:].sum(1).max())
        return replace(
            self,
            ids=self.ids[at, :width],
            mask=torch.cat([self.mask[at, :prefix], self.mask[at, before : before + width]], dim=1),
            positions=self.positions[at, :width],
            starts=self.starts[at],
            hidden=None if self.hidden is None else self.hidden[at, :width],
            past=[(k[at, :, :prefix], v[at, :, :prefix]) for k, v in self.past],
        )

    def logits(self, rows: Tensor, columns: Tensor, changes: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
        """By a pass of the suffixes through the blocks from ``first`` on."""
        cache = Cache(layers=[_Kept(k, v) for k, v in self.past])
        with ExitStack() as stack:
            stack.enter_context(change_outputs(changes, len(self)))
            stack.enter_context(_reading(self.model, rows, columns))
            if self.hidden is not None:
                stack.enter_context(_starting_from(self.blocks[: self.first], self.hidden, self.tuples))
            found: Tensor = self.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=cache,
                use_cache=True,
            ).logits
        return found[0]


def supported(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether a model's passes can be cut: plain causal attention over all tokens, positions given explicitly.

    Left out are attention windows, state-space and recurrent layers, biases that grow with the distance of tokens in
    the cache (ALiBi), and attention implementations that take no mask. Such models run complete passes.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if getattr(text, "_attn_implementation", None) not in ("sdpa", "eager") or getattr(text, "alibi", False):
        return False
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) if kinds is None else set(kinds) != {"full_attention"}
    return not window and len(blocks) > 0 and _head(model) is not None


def _head(model: nn.Module) -> nn.Module | None:
    """The output embeddings, whose input are the last hidden states."""
    find: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


@torch.no_grad()
def cut(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch, firsts: Sequence[int]) -> dict[int, Suffixes]:
    """Runs the model once in full and cuts each row at its subject's last token.

    Args:
        model: a causal language model that is `supported`.
        blocks: all its blocks, in order.
        batch: the rows, each with its subject's last token.
        firsts: blocks from which something may be changed; there is a result for each, and they share what they can.
    """
    entered: dict[int, Tensor] = {}
    tuples: dict[int, bool] = {}

    def watch(first: int) -> list[Any]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[first] = args[0] if args else kwargs["hidden_states"]

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            tuples[first] = isinstance(output, tuple)

        block = blocks[first]
        return [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]

    cache = Cache(layer_class_to_replicate=DynamicLayer)
    handles = [handle for first in firsts for handle in watch(first)]
    starts = batch.subject_last
    nowhere = torch.zeros(1, dtype=torch.long, device=starts.device)
    try:
        with _reading(model, nowhere, nowhere):  # logits are not needed, one place is the least there is
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, past_key_values=cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    length = batch.input_ids.shape[1]
    lengths = batch.attention_mask.sum(1)
    prefix, width = int(starts.max()), int((lengths - starts).max())
    at = starts[:, None] + torch.arange(width, device=starts.device)
    inside = at < lengths[:, None]
    at = at.clamp_max(length - 1)
    left = torch.arange(prefix, device=starts.device)[None] < starts[:, None]
    past = [(keys[:, :, :prefix], values[:, :, :prefix]) for keys, values in _filled(cache)]
    return {
        first: Suffixes(
            model=model,
            blocks=blocks,
            ids=batch.input_ids.gather(1, at),
            mask=torch.cat([left, inside], dim=1).long(),
            positions=at,
            starts=starts,
            hidden=entered[first].gather(1, at[..., None].expand(-1, -1, entered[first].shape[-1])) if first else None,
            past=past,
            first=first,
            tuples=tuples[first],
        )
        for first in firsts
    }


def _filled(cache: Cache) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys and values of every block."""
    for layer in cache.layers:
        yield layer.keys, layer.values  # type: ignore[union-attr,misc]


@contextmanager
def _reading(model: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Lets the head see only some places of the hidden states, as one row: logits come out (1, n, vocabulary)."""

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, columns][None], *args[1:])

    head = _head(model)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: it gives no logits.")
    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _starting_from(skipped: Sequence[nn.Module], hidden: Tensor, tuples: bool) -> Iterator[None]:
    """Lets blocks pass their input on without running, and the last of them put out the states given."""

    def leave_out(block: nn.Module, state: Tensor | None) -> None:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            out = hidden_states if state is None else state
            return (out,) if tuples else out

        block.forward = forward

    # Libraries that move weights between devices set a `forward` on the instance, too: it is put back.
    own = [block.__dict__.get("forward") for block in skipped]
    try:
        for i, block in enumerate(skipped):
            leave_out(block, hidden if i == len(skipped) - 1 else None)
        yield
    finally:
        for block, forward in zip(skipped, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward
