"""Forward passes from the subject's last token on: what a change there cannot reach is computed once.

A value is tried at the subject's last token, in some first layer. Causal attention keeps it from every token to the
left, and the blocks below that layer never see it. So the blocks below need not run again, and of the tokens to the
left only their attention keys and values are needed; both are taken from one complete pass. Rows that differ in their
first layer share a pass all the same: each joins it at its own block. Of the logits only those that a loss reads are
computed.

Nothing here is an approximation. What is used of `transformers` is public: a cache passed as ``past_key_values``,
explicit ``position_ids``, and hooks on blocks and on the output embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lit_edit.prompts import Batch
from lit_edit.taps import change_outputs, logits_only_at, output_embeddings


class _Kept(DynamicLayer):
    """The attention keys and values of the tokens to the left: joined to new ones, never added to."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._left = keys, values

    def get_seq_length(self) -> int:
        """Also where no row takes part in the block yet: masks are laid out by the first block's cache."""
        return self._left[0].shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._left
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class Passes(ABC):
    """Rows of text through a model, over and over, with something changed at the subject's last token of each."""

    @abstractmethod
    def select(self, rows: Sequence[int], firsts: Sequence[int]) -> Passes:
        """Some of the rows, in the order given; a row may be taken more than once.

        Args:
            rows: which.
            firsts: for each the first block in which something will be changed.
        """

    @abstractmethod
    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where the subject's last tokens of some rows stand in the outputs of modules: (row, column), both (n,)."""

    @abstractmethod
    def logits(self, rows: Tensor, columns: Tensor, changes: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
        """Logits at some places, with outputs of modules changed.

        Args:
            rows: (n,), of the places to read.
            columns: (n,), counted from each row's subject's last token, which is 0; not below.
            changes: a function of the output (rows, tokens, d) for each module to change, at `places`.

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

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows themselves, and where the token is in the text."""
        return rows, self.batch.subject_last[rows]

    def select(self, rows: Sequence[int], firsts: Sequence[int]) -> CompletePasses:
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
        at = self.batch.subject_last[rows] + columns
        with change_outputs(changes, ids.shape[1]), logits_only_at(self.model, rows, at):
            found: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found[0]


@dataclass(frozen=True, eq=False)
class Suffixes(Passes):
    """Rows from each one's subject's last token on, with what lies to the left and below as it was computed once.

    Column ``j`` of a row is its token ``start + j``; rows shorter than the longest are padded on the right. Rows are
    kept in the order of their first blocks, so that those which take part in a block come before those that do not yet.

    Args:
        model: the model.
        blocks: all its blocks.
        ids: (rows, S).
        mask: (rows, P + S): which of the P tokens to the left, and of the suffix, a row has.
        positions: (rows, S), the tokens' places in the whole text.
        starts: (rows,), where each suffix starts in the whole text.
        firsts: (rows,), the first block that a row takes part in, ascending.
        rank: (rows,), the place that a row has in this order.
        hidden: by first block, what enters it: (rows, S, d) of the rows that join there.
        past: per block the keys and values (rows, heads, P, head size) of the tokens to the left.
        tuples: whether blocks return a tuple that starts with the hidden states, as some do.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    ids: Tensor
    mask: Tensor
    positions: Tensor
    starts: Tensor
    firsts: tuple[int, ...]
    rank: Tensor
    hidden: dict[int, Tensor]
    past: list[tuple[Tensor, Tensor]]
    tuples: bool

    def __len__(self) -> int:
        return len(self.ids)

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' ranks, and the first column."""
        return self.rank[rows], torch.zeros_like(rows)

    def select(self, rows: Sequence[int], firsts: Sequence[int]) -> Suffixes:
        """Some of the rows, without columns that none of them needs.

        Only of what `cut` gave: there every row can join at every block.
        """
        order = sorted(range(len(rows)), key=lambda i: firsts[i])
        device = self.ids.device
        at = torch.tensor([rows[i] for i in order], device=device)
        prefix = int(self.starts[at].max())
        before = self.mask.shape[1] - self.ids.shape[1]
        width = int(self.mask[at, before:].sum(1).max())
        joining = tuple(firsts[i] for i in order)
        rank = torch.empty(len(order), dtype=torch.long)
        rank[torch.tensor(order)] = torch.arange(len(order))
        taking_part = [sum(first <= block for first in joining) for block in range(len(self.blocks))]
        return replace(
            self,
            ids=self.ids[at, :width],
            mask=torch.cat([self.mask[at, :prefix], self.mask[at, before : before + width]], dim=1),
            positions=self.positions[at, :width],
            starts=self.starts[at],
            firsts=joining,
            rank=rank.to(device),
            hidden={
                first: self.hidden[first][at[[i for i, f in enumerate(joining) if f == first]], :width]
                for first in set(joining)
            },
            past=[
                (k[at[:n], :, :prefix], v[at[:n], :, :prefix]) for n, (k, v) in zip(taking_part, self.past, strict=True)
            ],
        )

    def logits(self, rows: Tensor, columns: Tensor, changes: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
        """By a pass of the suffixes, each through the blocks from its first on."""
        cache = Cache(layers=[_Kept(k, v) for k, v in self.past])
        with (
            change_outputs(changes, self.ids.shape[1]),
            logits_only_at(self.model, self.rank[rows], columns),
            _joining(self.blocks, self.firsts, self.hidden, self.tuples),
        ):
            found: Tensor = self.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=cache,
                use_cache=True,
            ).logits
        return found[0]


class CannotCutError(RuntimeError):
    """A cut pass does not give what a complete one gives."""


_WINDOWED = {"full_attention", "sliding_attention"}
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the spread of logits; in half precision 0.05


def supported(model: nn.Module, blocks: Sequence[nn.Module], longest: int) -> bool:
    """Whether a model's passes can be cut: plain causal attention over all tokens, positions given explicitly.

    Left out are attention windows shorter than the texts, state-space and recurrent layers, biases that grow with the
    distance of tokens in the cache (ALiBi), and attention implementations that take no mask. Such models run complete
    passes. What this does not know of a model, `cut` finds out by comparing.

    Args:
        model: a causal language model.
        blocks: all its blocks.
        longest: tokens of the longest text.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if getattr(text, "_attn_implementation", None) not in ("sdpa", "eager") or getattr(text, "alibi", False):
        return False
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])
    window = getattr(text, "sliding_window", None) if "sliding_attention" in kinds else None
    fits = kinds <= _WINDOWED and (not window or longest < window)
    return fits and len(blocks) > 0 and output_embeddings(model) is not None


@torch.no_grad()
def cut(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch, firsts: Sequence[int]) -> Suffixes:
    """Runs the model once in full and cuts each row at its subject's last token.

    Args:
        model: a causal language model that is `supported`.
        blocks: all its blocks, in order.
        batch: the rows, each with its subject's last token.
        firsts: blocks at which rows may join; the result is to be used through its ``select``.

    Raises:
        CannotCutError: if the longest row comes out differently when cut.
    """
    entered: dict[int, Tensor] = {}
    tuples: list[bool] = []

    def entering(first: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[first] = args[0] if args else kwargs["hidden_states"]

        return enter

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        tuples.append(isinstance(output, tuple))

    cache = Cache(layer_class_to_replicate=DynamicLayer)
    handles = [blocks[f].register_forward_pre_hook(entering(f), with_kwargs=True) for f in sorted(set(firsts))]
    handles.append(blocks[0].register_forward_hook(leave))
    starts = batch.subject_last
    lengths = batch.attention_mask.sum(1)
    row = lengths.argmax()[None]
    try:
        with logits_only_at(model, row, lengths[row] - 1):
            whole = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, past_key_values=cache, use_cache=True
            ).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    length = batch.input_ids.shape[1]
    prefix, width = int(starts.max()), int((lengths - starts).max())
    at = starts[:, None] + torch.arange(width, device=starts.device)
    inside = at < lengths[:, None]
    at = at.clamp_max(length - 1)
    left = torch.arange(prefix, device=starts.device)[None] < starts[:, None]
    found = Suffixes(
        model=model,
        blocks=blocks,
        ids=batch.input_ids.gather(1, at),
        mask=torch.cat([left, inside], dim=1).long(),
        positions=at,
        starts=starts,
        firsts=(0,) * len(starts),
        rank=torch.arange(len(starts), device=starts.device),
        hidden={f: state.gather(1, at[..., None].expand(-1, -1, state.shape[-1])) for f, state in entered.items()},
        past=[(keys[:, :, :prefix], values[:, :, :prefix]) for keys, values in _filled(cache)],
        tuples=tuples[0],
    )
    twice = found.select(row.tolist() * 2, [min(firsts), max(firsts)])
    part = twice.logits(torch.tensor([0, 1], device=row.device), (lengths[row] - 1 - starts[row]).repeat(2), {})
    # A constant on top of all logits says nothing, and may be large.
    wanted = (whole - whole.mean(-1, keepdim=True)).float()
    off = (part - part.mean(-1, keepdim=True)).float() - wanted
    if not bool(off.norm(dim=-1).max() <= _TOLERANCE.get(whole.dtype, 0.05) * wanted.norm()):
        raise CannotCutError(
            f"Passes of {type(model).__name__} from the edited token on do not give what complete ones give: values "
            "are optimised on complete passes, which takes longer."
        )
    return found


def _filled(cache: Cache) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys and values of every block."""
    for layer in cache.layers:
        yield layer.keys, layer.values  # type: ignore[union-attr,misc]


@contextmanager
def _joining(
    blocks: Sequence[nn.Module], firsts: Sequence[int], hidden: dict[int, Tensor], tuples: bool
) -> Iterator[None]:
    """Lets every block run only the rows that take part in it; those that join bring their own states along."""
    every = len(firsts)

    def replaced(block: nn.Module, index: int) -> Callable[..., Any]:
        original = block.forward
        before, now = (sum(f < i for f in firsts) for i in (index, index + 1))

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not now:  # nobody yet: the states are passed on as they are
                return (hidden_states,) if tuples else hidden_states
            if now > before:
                joined = hidden[index].to(hidden_states.dtype)
                hidden_states = torch.cat([hidden_states[:before], joined]) if before else joined
            if now < every:
                args, kwargs = _of_rows(args, now, every), _of_rows(kwargs, now, every)
            return original(hidden_states, *args, **kwargs)

        return forward

    # Libraries that move weights between devices set a `forward` on the instance, too: it is put back.
    changed = [(i, block) for i, block in enumerate(blocks) if any(first >= i for first in firsts)]
    own = [block.__dict__.get("forward") for _, block in changed]
    try:
        for i, block in changed:
            block.forward = replaced(block, i)
        yield
    finally:
        for (_, block), forward in zip(changed, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def _of_rows(given: Any, now: int, every: int) -> Any:
    """What a block is called with, for the first rows only: masks, positions and rotations that have a row for each."""
    if isinstance(given, Tensor):
        return given[:now] if given.ndim > 1 and given.shape[0] == every else given
    if isinstance(given, (tuple, list)):
        return type(given)(_of_rows(item, now, every) for item in given)
    if isinstance(given, dict):
        return {name: _of_rows(item, now, every) for name, item in given.items()}
    return given
