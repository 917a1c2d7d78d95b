"""Beginnings that several texts share are run once, and what attention needs of them is handed to each text's rest.

Prompts made from one template, a prompt and its paraphrases, tasks with the same instruction, chats with the same head
begin alike. Causal attention reads nothing of a beginning but its keys and values, and these do not depend on what
follows. They are kept by token; every text fetches those to the left of its rest.

Nothing here is an approximation, and unsupported models run complete texts: models that are not
`supported`, and those that, at every use, are seen to give something else on the texts that differ most. What is used
of `transformers` is public: a cache passed as ``past_key_values``, and explicit ``position_ids``.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lit_edit.model.hooks import logits_only_at
from lit_edit.model.passes import supported

LEVELS = 3  # beginnings of beginnings: more were never worth a pass
_PIECE = 1  # tokens that a row of its own costs, in padding and copying
_PASS = {"cpu": 64}  # tokens that a pass costs on top of its own, as measured on two cores; elsewhere 256
_LEFT = 4  # tokens to the left that take as much memory as one that is run: they are fetched for one block at a time
_COMPARED = 4  # texts that are run a second time
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the spread of logits; in half precision 0.05


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``end`` of a text, the same in several, behind those of the piece ``parent`` (-1: none).

    ``level`` counts the pieces to its left.
    """

    text: int
    start: int
    end: int
    parent: int
    level: int


@dataclass(eq=False)
class _Node:
    """Texts that agree in their first ``depth`` tokens."""

    depth: int
    text: int  # one of them
    texts: list[int] = field(default_factory=list)  # those that agree no further with any other
    children: list[_Node] = field(default_factory=list)
    above: list[int] = field(default_factory=list)  # where the piece to the left may end, ascending
    cost: list[list[float]] = field(default_factory=list)  # by levels left and by place in `above`


def plan(keys: Sequence[tuple[int, ...]], level_cost: int, fixed_cost: int = 0) -> tuple[list[Piece], list[int]]:
    """Which beginnings to run apart, so that the tokens run become as few as they can.

    Args:
        keys: What of each text may be shared.
        level_cost: Tokens that each level of pieces must save.
        fixed_cost: Tokens that must be saved in all.

    Returns:
        (pieces, each behind its parent; for every key the last piece that it begins with, -1 if none).
    """
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = [_agreeing(keys[i], keys[j]) for i, j in pairwise(order)]
    nodes = _tree(order, shared)
    # The cheapest choice below a node depends on what is above it only through the place where the last piece ends.
    # Counted are tokens run from that place on, less the constant lengths of the texts.
    for node in reversed(nodes):
        own = len(node.texts)
        for levels in range(LEVELS + 1):
            inside = math.inf
            if levels and node.depth:
                inside = node.depth - own * node.depth + sum(c.cost[levels - 1][-1] for c in node.children) + _PIECE
            node.cost.append(
                [
                    min(-own * end + sum(child.cost[levels][j] for child in node.children), inside - end)
                    for j, end in enumerate(node.above)
                ]
            )
    root = nodes[0]
    levels = min(range(LEVELS + 1), key=lambda n: root.cost[n][0] + (n * level_cost + fixed_cost if n else 0))
    pieces: list[Piece] = []
    last = [-1] * len(keys)
    ahead = [(root, 0, levels, -1)]
    while ahead:
        node, j, levels, parent = ahead.pop()
        end = node.above[j]
        apart = -len(node.texts) * end + sum(child.cost[levels][j] for child in node.children)
        if node.cost[levels][j] < apart:
            level = pieces[parent].level + 1 if parent >= 0 else 0
            pieces.append(Piece(node.text, end, node.depth, parent, level))
            j, levels, parent = len(node.above), levels - 1, len(pieces) - 1
        for text in node.texts:
            last[text] = parent
        ahead += [(child, j, levels, parent) for child in node.children]
    return pieces, last


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


def _tree(order: Sequence[int], shared: Sequence[int]) -> list[_Node]:
    """The tree of beginnings of sorted texts, parents before children; ``shared`` is what neighbours agree in."""
    root = _Node(0, -1, above=[0])
    path = [root]
    for text, depth in zip(order, (0, *shared), strict=False):
        deeper = False
        while path[-1].depth > depth:
            path.pop()
            deeper = True
        if path[-1].depth < depth:
            node, over = _Node(depth, text), path[-1]
            if deeper:
                node.children.append(over.children.pop())
            else:
                node.texts.append(over.texts.pop())
            over.children.append(node)
            path.append(node)
        path[-1].texts.append(text)
    nodes = [root]
    for node in nodes:
        for child in node.children:
            child.above = [*node.above, node.depth] if node.depth else node.above
        nodes += node.children
    return nodes


@dataclass(frozen=True, eq=False)
class Part:
    """Texts that go through a model together, each from some token on.

    Args:
        rows: Texts to run.
        first: (rows,), the token of its text that stands in a row's first column; below 0 where padding does.
        ids: (rows, R).
        mask: (rows, P + R): which of the P tokens to the left, and of those that are run, a row has.
        cache: Keys and values to the left; None if there are none.
    """

    rows: list[int]
    first: Tensor
    ids: Tensor
    mask: Tensor
    cache: Cache | None = None

    @property
    def positions(self) -> Tensor:
        """The tokens' places in the whole text, (rows, R)."""
        return (self.mask.cumsum(1) - 1).clamp_min(0)[:, -self.ids.shape[1] :]

    def run(self, model: nn.Module) -> Any:
        """The model's output; nothing is kept of texts that are complete."""
        if self.cache is None:
            return model(input_ids=self.ids, attention_mask=self.mask, use_cache=False)
        return model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )


def parts(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    limits: Sequence[int],
    pad_id: int,
    tokens: int,
    room: Sequence[int] | None = None,
) -> Iterator[Part]:
    """Texts in batches, of those that begin alike only the rests; each text once, in any order.

    Args:
        model: A causal language model, in evaluation mode.
        texts: Token ids.
        limits: Tokens at the beginning of each text that need not be run with it; fewer than all.
        pad_id: Token id to pad with.
        tokens: Tokens of a padded batch, and of the shared beginnings kept at a time.
        room: Tokens that will be written behind each text. With it texts end in the last column and their caches
            grow; without, padding stands on the right and nothing is added to the caches.
    """
    length = [len(text) for text in texts]
    writing = [0] * len(texts) if room is None else room
    most = dict(enumerate(n + more for n, more in zip(length, writing, strict=True)))
    make = _Maker(model, texts, pad_id, tokens, at_end=room is not None)
    alone: list[int] = []
    sharing = len(texts) > 1 and can_share(model, max(most.values()))
    keys = [tuple(text[:limit]) if sharing else () for text, limit in zip(texts, limits, strict=True)]
    group_cost = make.pass_cost * (1 + max(writing, default=0))  # where texts are written, a pass for each token
    for chunk in _chunks(keys, tokens):
        # Two passes to compare, and another group, for those that share nothing stay apart.
        fixed = 2 * make.pass_cost + _COMPARED * max(length[i] for i in chunk) + group_cost
        pieces, last = plan([keys[i] for i in chunk], make.pass_cost, fixed) if sharing else ([], [])
        pieces = [Piece(chunk[p.text], p.start, p.end, p.parent, p.level) for p in pieces]
        behind = {i: piece for i, piece in zip(chunk, last, strict=False) if piece >= 0}
        kept = None  # what was kept for the chunk before is not held beside it
        kept = make.beginnings(pieces, behind) if behind else None
        if kept is None:
            sharing = sharing and not behind
            alone += chunk
            continue
        alone += [i for i in chunk if i not in behind]
        rest = {i: length[i] - pieces[piece].end for i, piece in behind.items()}
        size = most if room is not None else {i: n + (length[i] - n) // _LEFT for i, n in rest.items()}
        for rows in batches(rest, size, tokens, group_cost):
            yield make.rests(rows, [behind[i] for i in rows], kept)
    for rows in batches({i: length[i] for i in alone}, most, tokens, group_cost):
        yield make.complete(rows, at_end=room is not None)


def batches(width: Mapping[int, int], size: Mapping[int, int], tokens: int, pass_cost: int) -> Iterator[list[int]]:
    """Groups of texts of like width.

    Args:
        width: Tokens to run, by text.
        size: Tokens that a text counts for in memory, by text.
        tokens: Largest padded size of a group, unless it has one text only.
        pass_cost: Tokens of padding that are worth another group.
    """
    order = sorted(width, key=lambda i: (width[i], size[i]))
    count = Counter(width.values())
    widths = sorted(count)
    # From the narrowest on: the least that those up to a width cost, and where the last of their groups begins.
    best, begins = [0], [0]
    for j, widest in enumerate(widths):
        rows, options = 0, []
        for i in range(j, -1, -1):
            rows += count[widths[i]]
            options.append((best[i] + rows * widest + pass_cost, i))
        cost, begin = min(options)
        best.append(cost)
        begins.append(begin)
    ends: set[int] = set()
    j = len(widths)
    while j:
        ends.add(widths[j - 1])
        j = begins[j]
    group: list[int] = []
    longest = 0
    for i in order:
        longest = max(longest, size[i])
        full = (len(group) + 1) * longest > tokens
        if group and (full or (width[group[-1]] in ends and width[i] > width[group[-1]])):
            yield group
            group, longest = [], size[i]
        group.append(i)
    if group:
        yield group


def _chunks(keys: Sequence[tuple[int, ...]], tokens: int) -> Iterator[list[int]]:
    """Sorted keys, in runs any two of which share no more than a number of tokens."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    chunk: list[int] = []
    kept = before = 0
    for i in order:
        agreeing = _agreeing(keys[chunk[-1]], keys[i]) if chunk else 0
        kept += max(0, agreeing - before)
        if chunk and kept > tokens:
            yield chunk
            chunk, kept, agreeing = [], 0, 0
        before = agreeing
        chunk.append(i)
    if chunk:
        yield chunk


def can_share(model: nn.Module, longest: int) -> bool:
    """Whether the keys and values of a text's beginning are those of the text, as far as a model says so itself.

    That is so where passes can be cut (see `lit_edit.model.passes.supported`), unless rotations depend on how long
    the whole text is. What this does not know of a model, comparing finds out.

    Args:
        model: A causal language model.
        longest: Tokens of the longest text.
    """
    if model.training or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if not supported(model, [model], longest):
        return False
    config: Any = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    for rope in (found, *(part for part in found.values() if isinstance(part, dict))):
        kind = str(rope.get("rope_type"))
        limit = rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None) or 0
        if ("dynamic" in kind or "longrope" in kind) and longest > limit:
            return False
    return True


class _Behind(DynamicLayer):
    """A block's keys and values behind those that were kept, which are fetched only while the block needs them.

    Args:
        kept: Keys and values (slots, heads, head size).
        slots: (rows, P), those to the left of each row.
        keeps: Whether to remember the new ones.
    """

    def __init__(self, kept: tuple[Tensor, Tensor], slots: Tensor, keeps: bool) -> None:
        super().__init__()
        self.lazy_initialization(*kept)
        self._kept, self._slots, self._keeps = kept, slots, keeps

    def get_seq_length(self) -> int:
        return self._slots.shape[1]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self._keeps:
            self.keys, self.values = key_states, value_states
        keys, values = _fetched(self._kept, self._slots)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def _fetched(kept: tuple[Tensor, Tensor], slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values at slots (rows, P), as (rows, heads, P, head size)."""
    keys, values = (of[slots.to(of.device)].transpose(1, 2) for of in kept)
    return keys, values


class _Kept:
    """Keys and values of the tokens of pieces, by block and slot.

    Slot 0 holds zeros: what a row has not is masked, and what is masked still has to be a number.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self.blocks: list[tuple[Tensor, Tensor]] = []
        self.size = 1
        self.own: list[list[int]] = []
        self.slots: list[list[int]] = []  # of all tokens up to a piece's end
        for piece in pieces:
            self.own.append(list(range(self.size, self.size + piece.end - piece.start)))
            self.slots.append([*(self.slots[piece.parent] if piece.parent >= 0 else ()), *self.own[-1]])
            self.size += piece.end - piece.start

    def add(self, cache: Cache, inside: Tensor, slots: Sequence[int]) -> None:
        """Takes over what a pass gave for the places (rows, R) that hold tokens, which go to as many slots."""
        for i, layer in enumerate(cache.layers):
            new: tuple[Tensor, Tensor] = (layer.keys, layer.values)  # type: ignore[union-attr,assignment]
            if i == len(self.blocks):
                keys, values = (of.new_zeros(self.size, of.shape[1], of.shape[3]) for of in new)
                self.blocks.append((keys, values))
            for kept, of in zip(self.blocks[i], new, strict=True):
                kept[torch.tensor(slots, device=of.device)] = of.transpose(1, 2)[inside.to(of.device)]

    def cache(self, slots: Tensor, grows: bool = False, keeps: bool = False) -> Cache:
        """For rows that have these slots (rows, P) to their left."""
        if not grows:
            return Cache(layers=[_Behind(kept, slots, keeps) for kept in self.blocks])
        layers = [DynamicLayer() for _ in self.blocks]
        for layer, kept in zip(layers, self.blocks, strict=True):
            layer.update(*_fetched(kept, slots))
        return Cache(layers=list(layers))


class _Maker:
    """Makes parts of texts: see `parts`."""

    def __init__(
        self, model: nn.Module, texts: Sequence[Sequence[int]], pad_id: int, tokens: int, at_end: bool
    ) -> None:
        self.model, self.texts, self.pad_id, self.tokens, self.at_end = model, texts, pad_id, tokens, at_end
        self.device = next(model.parameters()).device
        self.pass_cost = _PASS.get(self.device.type, 256)

    def complete(self, rows: list[int], at_end: bool) -> Part:
        """Texts with nothing to their left."""
        texts = [self.texts[i] for i in rows]
        first, ids, mask, _ = self._laid_out(texts, [0] * len(rows), [[]] * len(rows), at_end)
        return Part(rows, first, ids, mask)

    def rests(self, rows: list[int], behind: Sequence[int], kept: _Kept) -> Part:
        """What follows in texts behind pieces that were run."""
        texts, slots = [self.texts[i] for i in rows], [kept.slots[piece] for piece in behind]
        starts = [kept.pieces[piece].end for piece in behind]
        first, ids, mask, left = self._laid_out(texts, starts, slots, self.at_end)
        return Part(rows, first, ids, mask, kept.cache(left, grows=self.at_end))

    def _laid_out(
        self, texts: Sequence[Sequence[int]], starts: Sequence[int], slots: Sequence[Sequence[int]], at_end: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(first, ids, mask) as in `Part`, and (rows, P) slots to the left.

        Left of a row's first token, and between its tokens, there is never padding: also a model that counts places
        itself then sees the distances that there are in the text. Where texts have to end together, shorter rests are
        made as long as the longest by running more of their beginnings.
        """
        width = max(len(text) - start for text, start in zip(texts, starts, strict=True))
        first = [len(text) - width if at_end else start for text, start in zip(texts, starts, strict=True)]
        prefix = max(0, *first)
        ids = torch.full((len(texts), width), self.pad_id)
        inside = torch.zeros(len(texts), width, dtype=torch.long)
        left = torch.zeros(len(texts), prefix, dtype=torch.long)
        for row, (text, begin) in enumerate(zip(texts, first, strict=True)):
            begin_column = max(0, -begin)
            piece = torch.tensor(text[max(0, begin) : begin + width])
            ids[row, begin_column : begin_column + len(piece)] = piece
            inside[row, begin_column : begin_column + len(piece)] = 1
            if begin > 0:
                left[row, prefix - begin :] = torch.tensor(slots[row][:begin])
        mask = torch.cat([(left > 0).long(), inside], dim=1)
        return tuple(of.to(self.device) for of in (torch.tensor(first), ids, mask, left))  # type: ignore[return-value]

    def beginnings(self, pieces: Sequence[Piece], behind: dict[int, int]) -> _Kept | None:
        """Runs pieces, and compares some texts that go on from them with complete ones; None if that does not do.

        Args:
            pieces: Pieces to run.
            behind: Piece that each text goes on from.
        """
        try:
            kept = self._run(pieces)
            wanted, found = self._compared(behind, kept)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            why = f"cannot be run: {' '.join(str(error).split()) or type(error).__name__}"
        else:
            if not bool(wanted.isfinite().all()):
                return None  # a model that is broken is so on complete texts
            # A constant on top of all logits says nothing, and may be large.
            spread = (wanted - wanted.mean(-1, keepdim=True)).float()
            off = (found - found.mean(-1, keepdim=True)).float() - spread
            if bool((off.norm(dim=-1) <= _TOLERANCE.get(wanted.dtype, 0.05) * spread.norm(dim=-1)).all()):
                return kept
            why = "do not give what complete texts give"
        warnings.warn(
            f"Passes of {type(self.model).__name__} that go on from a shared beginning {why}: complete texts are run, "
            "which takes longer.",
            stacklevel=2,
        )
        return None

    def _run(self, pieces: Sequence[Piece]) -> _Kept:
        kept = _Kept(pieces)
        for level in range(max(piece.level for piece in pieces) + 1):
            size = {i: piece.end for i, piece in enumerate(pieces) if piece.level == level}
            for some in batches({i: n - pieces[i].start for i, n in size.items()}, size, self.tokens, self.pass_cost):
                texts = [self.texts[pieces[i].text][: pieces[i].end] for i in some]
                slots = [kept.slots[pieces[i].parent] if level else [] for i in some]
                first, ids, mask, left = self._laid_out(texts, [pieces[i].start for i in some], slots, False)
                cache = kept.cache(left, keeps=True) if level else Cache(layer_class_to_replicate=DynamicLayer)
                one = torch.zeros(1, dtype=torch.long, device=self.device)
                with logits_only_at(self.model, one, one):  # nobody reads any
                    Part(some, first, ids, mask, cache).run(self.model)
                kept.add(cache, mask[:, left.shape[1] :].bool(), [slot for i in some for slot in kept.own[i]])
        return kept

    def _compared(self, behind: dict[int, int], kept: _Kept) -> tuple[Tensor, Tensor]:
        """Logits of the texts that differ most in length and in what was shared: in complete passes, and as rests."""

        def start(i: int) -> int:
            return kept.pieces[behind[i]].end

        chosen = {
            max(behind, key=lambda i: len(self.texts[i])),
            max(behind, key=start),
            min(behind, key=start),
            max(behind, key=lambda i: kept.pieces[behind[i]].level),
        }
        rows = sorted(chosen)
        places = [(row, t) for row, i in enumerate(rows) for t in range(start(i), len(self.texts[i]))]
        row, at = torch.tensor(places, device=self.device).T
        logits = []
        for part in (self.complete(rows, at_end=False), self.rests(rows, [behind[i] for i in rows], kept)):
            with logits_only_at(self.model, row, at - part.first[row]):
                logits.append(part.run(self.model).logits[0])
        return logits[0], logits[1]
