"""Forward passes from the subject's last token on: what a change there cannot reach is computed once.

A value is tried at the subject's last token, in some first layer. Causal attention keeps it from every token to the
left, and the blocks below that layer never see it. So the blocks below need not run again, and of the tokens to the
left only their attention keys and values are needed; both are taken from one complete pass. The first layer's own block
need not run either where a change of its MLP's output arrives at the block's output as it is, as it does in a residual
stream without a norm behind the MLP. Rows that differ in their first layer share a pass all the same: each joins it at
its own block. Of the logits only those that a loss reads are computed.

Nothing here is an approximation. What is used of `transformers` is public: a cache passed as ``past_key_values``,
explicit ``position_ids``, and hooks on blocks and on the output embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lit_edit.model.families import Layer
from lit_edit.model.hooks import change_outputs, logits_only_at, output_embeddings, read_outputs
from lit_edit.model.prompts import Batch

Site = Literal["mlp", "block"]
"""What a value is the output of: the MLP's last projection, or the whole block."""

New = Callable[[Tensor, Tensor], Tensor]
"""From outputs (n, d) and which rows they are of (n,) to what they become (n, d), in float32 at least."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where the outputs of one module are changed.

    Args:
        module: A projection, or a block.
        row: (n,), in its output.
        column: (n,), likewise.
        which: (n,), of the rows that were asked for.
        base: Where the module is a block and the change is one of its projection's outputs: these outputs (n, d), which
            the block's take the difference from. None where the module's own output becomes what it is changed to.
    """

    module: nn.Module
    row: Tensor
    column: Tensor
    which: Tensor
    base: Tensor | None = None

    def changed(self, output: Tensor, new: New) -> Tensor:
        """The module's output (rows, tokens, d) with what is new in it."""
        at = (self.row, self.column)
        if self.base is None:
            there = new(output[at], self.which)
        else:
            there = new(self.base, self.which)
            there = output[at].to(there.dtype) + (there - self.base.to(there.dtype))
        return output.index_put(at, there.to(output.dtype))


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
            rows: Rows to take.
            firsts: First block in which something will be changed, by row.
        """

    @abstractmethod
    def places(self, layer: int, rows: Sequence[int]) -> list[Place]:
        """Where to change the outputs of a layer at the subject's last tokens of some rows.

        Args:
            layer: Index of a block.
            rows: Rows to take; none whose first block is above the layer.

        Returns:
            Places that together have every row once; none for no rows.
        """

    @abstractmethod
    def logits(self, rows: Tensor, columns: Tensor, changes: Sequence[tuple[Place, New]]) -> Tensor:
        """Logits at some places, with outputs of modules changed.

        Args:
            rows: (n,), of the places to read.
            columns: (n,), counted from each row's subject's last token, which is 0; not below.
            changes: What is changed, at `places`; a place no more than once.

        Returns:
            (n, vocabulary), in the model's dtype.
        """


def _by_module(changes: Sequence[tuple[Place, New]]) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """For every module the function that makes all changes of its output."""

    def of(mine: list[tuple[Place, New]]) -> Callable[[Tensor], Tensor]:
        def change(output: Tensor) -> Tensor:
            for place, new in mine:
                output = place.changed(output, new)
            return output

        return change

    found: dict[nn.Module, list[tuple[Place, New]]] = {}
    for place, new in changes:
        found.setdefault(place.module, []).append((place, new))
    return {module: of(mine) for module, mine in found.items()}


@dataclass(frozen=True, eq=False)
class CompletePasses(Passes):
    """Every token through every block, for any model.

    Args:
        model: Model.
        layers: All blocks of the model.
        batch: Rows, each with its subject's last token.
        site: What is changed.
    """

    model: nn.Module
    layers: Sequence[Layer]
    batch: Batch
    site: Site = "mlp"

    def places(self, layer: int, rows: Sequence[int]) -> list[Place]:
        """The rows themselves, and where the token is in the text."""
        part = self.layers[layer]
        at = torch.tensor(list(rows), dtype=torch.long, device=self.batch.input_ids.device)
        module = part.block if self.site == "block" else part.projection
        return [Place(module, at, self.batch.subject_last[at], torch.arange(len(at), device=at.device))][: len(at)]

    def select(self, rows: Sequence[int], firsts: Sequence[int]) -> CompletePasses:
        """Some of the rows, without columns that none of them needs."""
        at = torch.tensor(list(rows), device=self.batch.input_ids.device)
        width = int(self.batch.attention_mask[at].sum(1).max())
        batch = Batch(
            self.batch.input_ids[at, :width],
            self.batch.attention_mask[at, :width],
            self.batch.labels[at, :width],
            self.batch.subject_last[at],
        )
        return replace(self, batch=batch)

    def logits(self, rows: Tensor, columns: Tensor, changes: Sequence[tuple[Place, New]]) -> Tensor:
        """By one complete pass; the head sees only the places to read."""
        ids, mask = self.batch.input_ids, self.batch.attention_mask
        at = self.batch.subject_last[rows] + columns
        with change_outputs(_by_module(changes), ids.shape[1]), logits_only_at(self.model, rows, at):
            found: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found[0]


@dataclass(frozen=True, eq=False)
class Suffixes(Passes):
    """Rows from each one's subject's last token on, with what lies to the left and below as it was computed once.

    Column ``j`` of a row is its token ``start + j``; rows shorter than the longest are padded on the right. Rows are
    kept in the order of their first blocks, so that those which take part in a block come before those that do not yet.

    Args:
        model: Model.
        layers: All blocks of the model.
        site: What is changed.
        ids: (rows, S).
        mask: (rows, P + S): which of the P tokens to the left, and of the suffix, a row has.
        positions: (rows, S), the tokens' places in the whole text.
        starts: (rows,), where each suffix starts in the whole text.
        firsts: By rank, the first block in which something of the row is changed, ascending.
        behind: Those of the first blocks that rows join behind, where the change arrives as it is; the others they join
            in front of.
        ranks: By row, the place that it has in this order.
        rank: The same as a tensor.
        hidden: By first block, what enters it, or leaves it where rows join behind it: (rows, S, d) of those rows.
        outputs: By first block that rows join behind: their projection's outputs at the first column, (rows, d).
        past: Per block the keys and values (rows, heads, P, head size) of the tokens to the left.
        tuples: Whether blocks return a tuple that starts with the hidden states, as some do.
    """

    model: nn.Module
    layers: Sequence[Layer]
    site: Site
    ids: Tensor
    mask: Tensor
    positions: Tensor
    starts: Tensor
    firsts: tuple[int, ...]
    behind: frozenset[int]
    ranks: tuple[int, ...]
    rank: Tensor
    hidden: dict[int, Tensor]
    outputs: dict[int, Tensor]
    past: list[tuple[Tensor, Tensor]]
    tuples: bool

    def __len__(self) -> int:
        return len(self.ids)

    def running(self, block: int) -> int:
        """How many rows a block has to run, counted from the first."""
        return sum(first + (first in self.behind) <= block for first in self.firsts)

    def places(self, layer: int, rows: Sequence[int]) -> list[Place]:
        """At the first column: of the projection's outputs, or of the block's for rows that join behind it.

        Raises:
            ValueError: for a row that does not take part in the layer yet.
        """
        part, device = self.layers[layer], self.ids.device
        below = sum(first < layer for first in self.firsts)  # the rank from which on rows may join here
        through: list[tuple[int, int]] = []
        joining: list[tuple[int, int]] = []
        for which, rank in enumerate(self.ranks[row] for row in rows):
            if self.firsts[rank] > layer:
                raise ValueError(f"A row that is changed from block {self.firsts[rank]} on cannot be in {layer}.")
            apart = self.site == "mlp" and self.firsts[rank] == layer and layer in self.behind
            (joining if apart else through).append((rank, which))

        def indices(of: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
            rank, which = torch.tensor(of, device=device).T
            return rank, torch.zeros_like(rank), which

        found = []
        if through:
            module = part.block if self.site == "block" else part.projection
            found.append(Place(module, *indices(through)))
        if joining:
            at = indices(joining)
            found.append(Place(part.block, *at, base=self.outputs[layer][at[0] - below]))
        return found

    def select(self, rows: Sequence[int], firsts: Sequence[int]) -> Suffixes:
        """Some of the rows, without columns that none of them needs.

        Only of what `cut` gave: there every row can join at every block.
        """
        order = sorted(range(len(rows)), key=lambda i: firsts[i])
        at = torch.tensor([rows[i] for i in order], device=self.ids.device)
        prefix = int(self.starts[at].max())
        before = self.mask.shape[1] - self.ids.shape[1]
        width = int(self.mask[at, before:].sum(1).max())
        ranks = [0] * len(order)
        for rank, row in enumerate(order):
            ranks[row] = rank
        joining = tuple(firsts[i] for i in order)
        at_first = {first: at[[i for i, f in enumerate(joining) if f == first]] for first in set(joining)}
        chosen = replace(
            self,
            ids=self.ids[at, :width],
            mask=torch.cat([self.mask[at, :prefix], self.mask[at, before : before + width]], dim=1),
            positions=self.positions[at, :width],
            starts=self.starts[at],
            firsts=joining,
            ranks=tuple(ranks),
            rank=torch.tensor(ranks, device=at.device),
            hidden={first: self.hidden[first][mine, :width] for first, mine in at_first.items()},
            outputs={first: self.outputs[first][mine] for first, mine in at_first.items() if first in self.outputs},
        )
        taking_part = [at[: chosen.running(block)] for block in range(len(self.layers))]
        past = [(k[t, :, :prefix], v[t, :, :prefix]) for t, (k, v) in zip(taking_part, self.past, strict=True)]
        return replace(chosen, past=past)

    def logits(self, rows: Tensor, columns: Tensor, changes: Sequence[tuple[Place, New]]) -> Tensor:
        """By a pass of the suffixes, each through the blocks from its first on, or from the one behind it."""
        cache = Cache(layers=[_Kept(k, v) for k, v in self.past])
        with (
            change_outputs(_by_module(changes), self.ids.shape[1]),
            logits_only_at(self.model, self.rank[rows], columns),
            self._joining(),
        ):
            found: Tensor = self.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=cache,
                use_cache=True,
            ).logits
        return found[0]

    @contextmanager
    def _joining(self) -> Iterator[None]:
        """Lets every block run only the rows that take part in it; those that join bring their own states along."""
        every = len(self.firsts)

        def replaced(block: nn.Module, index: int) -> Callable[..., Any]:
            original = block.forward
            run = self.running(index)
            joining = self.firsts.count(index)
            here = index in self.behind
            before = run if here else run - joining  # those that were there already

            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                joined = self.hidden[index].to(hidden_states.dtype) if joining else None
                if joined is not None and not here:
                    hidden_states = torch.cat([hidden_states[:before], joined]) if before else joined
                if not run:  # the states are passed on as they are while nobody is there
                    left = hidden_states if joined is None else joined
                    return (left,) if self.tuples else left
                if run < every:
                    args, kwargs = _of_rows(args, run, every), _of_rows(kwargs, run, every)
                out = original(hidden_states, *args, **kwargs)
                if joined is None or not here:
                    return out
                state = out[0] if isinstance(out, tuple) else out
                state = torch.cat([state, joined.to(state.dtype)])
                return (state, *out[1:]) if isinstance(out, tuple) else state

            return forward

        # Libraries that move weights between devices set a `forward` on the instance, too: it is put back.
        changed = [(i, part.block) for i, part in enumerate(self.layers) if self.running(i) < every or i in self.firsts]
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


class CannotCutError(RuntimeError):
    """A cut pass does not give what a complete one gives."""


@dataclass
class Known:
    """What has been found out about cutting passes of one model, which edits of its weights do not change.

    Attributes:
        cuttable: False once a cut pass did not give what a complete one gives.
        arrives: By layer, whether a change of the MLP's output arrives at the block's output as it is.
        checked: By first block, the tokens of the longest text that was compared.
    """

    cuttable: bool = True
    arrives: dict[int, bool] = field(default_factory=dict)
    checked: dict[int, int] = field(default_factory=dict)


_WINDOWED = {"full_attention", "sliding_attention"}
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the spread of logits; in half precision 0.05


def supported(model: nn.Module, blocks: Sequence[nn.Module], longest: int) -> bool:
    """Whether a model's passes can be cut: plain causal attention over all tokens, positions given explicitly.

    Left out are attention windows shorter than the texts, state-space and recurrent layers, biases that grow with the
    distance of tokens in the cache (ALiBi), and attention implementations that take no mask. Such models run complete
    passes. What this does not know of a model, `cut` finds out by comparing.

    Args:
        model: A causal language model.
        blocks: All blocks of the model.
        longest: Tokens of the longest text.
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
def cut(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch,
    firsts: Sequence[int],
    site: Site = "mlp",
    known: Known | None = None,
    read: Tensor | None = None,
) -> tuple[Suffixes, Tensor]:
    """Runs the model once in full and cuts each row at its subject's last token.

    Args:
        model: A causal language model that is `supported`.
        layers: All blocks of the model, in order.
        batch: Rows, each with its subject's last token.
        firsts: Blocks at which rows may join; use the result through its ``select``.
        site: What will be changed.
        known: What is known of the model; it is not checked again, and what is found out is added.
        read: (n,), rows whose logits at their ends are wanted, too.

    Returns:
        The passes, and these logits (n, vocabulary).

    Raises:
        CannotCutError: if the longest row comes out differently when cut.
    """
    known = Known() if known is None else known
    asked = sorted(set(firsts))
    starts, lengths = batch.subject_last, batch.attention_mask.sum(1)
    length = batch.input_ids.shape[1]
    prefix, width = int(starts.max()), int((lengths - starts).max())
    at = starts[:, None] + torch.arange(width, device=starts.device)
    inside = at < lengths[:, None]
    at = at.clamp_max(length - 1)
    every = torch.arange(len(starts), device=starts.device)

    def suffix(state: Tensor) -> Tensor:
        return state.gather(1, at[..., None].expand(-1, -1, state.shape[-1]))

    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    tuples: list[bool] = []

    def entering(first: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[first] = suffix(args[0] if args else kwargs["hidden_states"])

        return enter

    def leaving(first: int) -> Callable[[nn.Module, Any, Any], None]:
        def leave(_: nn.Module, __: Any, output: Any) -> None:
            left[first] = suffix(output[0] if isinstance(output, tuple) else output)

        return leave

    def projecting(first: int) -> Callable[[Tensor], Tensor]:
        def keep(output: Tensor) -> Tensor:
            outputs[first] = output[every, starts]
            return output

        return keep

    cache = Cache(layer_class_to_replicate=DynamicLayer)
    unclear = [f for f in asked if site == "mlp" and f not in known.arrives]
    behind = {f for f in asked if f not in unclear and (site == "block" or known.arrives[f])}
    blocks = [part.block for part in layers]
    handles = [blocks[0].register_forward_hook(lambda _, __, out: tuples.append(isinstance(out, tuple)))]
    handles += [blocks[f].register_forward_pre_hook(entering(f), with_kwargs=True) for f in asked if f not in behind]
    # Before hooks of others, which will see what rows bring along once more.
    handles += [blocks[f].register_forward_hook(leaving(f), prepend=True) for f in (*behind, *unclear)]
    projections = {layers[f].projection: projecting(f) for f in asked} if site == "mlp" else {}
    row = lengths.argmax()[None]
    rows = row if read is None else torch.cat([row, read])
    try:
        with change_outputs(projections, length), logits_only_at(model, rows, lengths[rows] - 1):
            whole = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, past_key_values=cache, use_cache=True
            ).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    found = Suffixes(
        model=model,
        layers=layers,
        site=site,
        ids=batch.input_ids.gather(1, at),
        mask=torch.cat([torch.arange(prefix, device=at.device)[None] < starts[:, None], inside], dim=1).long(),
        positions=at,
        starts=starts,
        firsts=(0,) * len(starts),
        behind=frozenset(),
        ranks=tuple(range(len(starts))),
        rank=every,
        hidden=entered,
        outputs=outputs,
        past=[(keys[:, :, :prefix], values[:, :, :prefix]) for keys, values in _filled(cache)],
        tuples=tuples[0],
    )
    longest = row.tolist()
    for f in unclear:
        known.arrives[f] = _arrives(found, longest[0], f, left[f][row, 0])
        if known.arrives[f]:
            behind.add(f)
    found = replace(found, hidden={f: (left if f in behind else entered)[f] for f in asked}, behind=frozenset(behind))
    ends = [f for f in {asked[0], asked[-1]} if known.checked.get(f, 0) < length]
    if ends:
        _compare(found, longest * len(ends), ends, (lengths - 1 - starts)[row], whole[:1])
        known.checked |= dict.fromkeys(ends, length)
    return found, whole[1:]


def _arrives(passes: Suffixes, row: int, layer: int, output: Tensor) -> bool:
    """Whether what is added to the MLP's output is added to the block's, and nothing else happens.

    Not so with a norm behind the MLP, or a factor.

    Args:
        passes: In which rows join in front of blocks.
        row: Row to try it with.
        layer: Index of a block.
        output: (1, d), what the block puts out at the row's first column.
    """
    added = output.flip(-1)  # as large as all that is there, so that a norm cannot pass for none
    one = passes.select([row], [layer])
    (place,) = one.places(layer, [0])
    with read_outputs({0: passes.layers[layer].block}, one.ids.shape[1]) as seen:
        nowhere = place.row[:0]
        one.logits(nowhere, nowhere, [(place, lambda out, _: out + added)])
    off = (seen[0][0, :1] - output - added).float().norm()
    return bool(off <= _TOLERANCE.get(output.dtype, 0.05) * added.float().norm())


def _compare(passes: Suffixes, rows: list[int], firsts: list[int], column: Tensor, wanted: Tensor) -> None:
    """Compares logits (1, vocabulary) at a place with those of cut passes from some blocks on."""
    part = passes.select(rows, firsts).logits(
        torch.arange(len(rows), device=column.device), column.repeat(len(rows)), []
    )
    # A constant on top of all logits says nothing, and may be large.
    wanted = (wanted - wanted.mean(-1, keepdim=True)).float()
    off = (part - part.mean(-1, keepdim=True)).float() - wanted
    if not bool(off.norm(dim=-1).max() <= _TOLERANCE.get(part.dtype, 0.05) * wanted.norm()):
        raise CannotCutError(
            f"Passes of {type(passes.model).__name__} from the edited token on do not give what complete ones give: "
            "values are optimised on complete passes, which takes longer."
        )


def _filled(cache: Cache) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys and values of every block."""
    for layer in cache.layers:
        yield layer.keys, layer.values  # type: ignore[union-attr,misc]
