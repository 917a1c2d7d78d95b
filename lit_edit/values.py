"""Values v*: gradient optimisation of what the edited layers should put out at the subject's last token.

All requests, contexts and candidate layers of a step share one forward pass: every *problem* (a request and the layers
whose outputs it may change) contributes its rows, and a hook per layer changes the rows that belong to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lit_edit.keys import KeyAverage, compute_keys
from lit_edit.prompts import Batch, Row
from lit_edit.requests import EditRequest
from lit_edit.taps import change_outputs
from lit_edit.workspace import Workspace


class Constraint(ABC):
    """The set a value may come from. ``replaces`` says whether it takes the output's place or is added to it."""

    replaces: bool

    @abstractmethod
    def value(self, start: Tensor, delta: Tensor) -> Tensor:
        """The value for a change of the starting point, both (..., d)."""

    @abstractmethod
    def project(self, start: Tensor, delta: Tensor) -> Tensor:
        """The change after each step, moved back to where it is allowed, (..., d)."""


class NormClamp(Constraint):
    """ROME's and MEMIT's constraint: the change is at most ``factor`` times as long as the original output."""

    replaces = False

    def __init__(self, factor: float = 4.0) -> None:
        if not factor > 0:
            raise ValueError(f"The clamp factor must be positive, not {factor}.")
        self.factor = factor

    def value(self, start: Tensor, delta: Tensor) -> Tensor:
        """Start plus change."""
        return start + delta

    def project(self, start: Tensor, delta: Tensor) -> Tensor:
        """Shortens what is too long."""
        limit = self.factor * start.norm(dim=-1, keepdim=True)
        return delta * (limit / delta.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)


class NormMatched(Constraint):
    """Values on the sphere ``‖v‖ = ‖W k‖``: the only ones an orthogonal update can reach exactly.

    ``W ← Q W`` keeps the norm of every output, so a target of another length is met in direction at best. The
    value replaces the output in every context, as the edited weight will put out nearly the same in all of them.
    """

    replaces = True

    def value(self, start: Tensor, delta: Tensor) -> Tensor:
        """Start plus change, brought back to the length of start."""
        moved = start + delta
        return moved * (start.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12))

    def project(self, start: Tensor, delta: Tensor) -> Tensor:
        """The change itself put on the sphere, so that its length does not run away."""
        return self.value(start, delta) - start


@dataclass(frozen=True)
class ValueProblem:
    """One optimisation: a request (by index) and the layers whose outputs are free."""

    request: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Values:
    """The result of an optimisation, an entry per problem.

    ``targets[i][layer]`` is v* (d,) for the projection's product W k (without its bias), or the block's output z*
    where the site is the block. ``loss`` and ``probability`` (of the new target under the bare edit prompt) are those
    of the last step.
    """

    problems: list[ValueProblem]
    targets: list[dict[int, Tensor]]
    loss: list[float]
    probability: list[float]
    steps: list[int]


@dataclass(frozen=True, eq=False)
class _Place:
    """Where one module's output is changed: rows, positions in them, and the slot that each takes its value from."""

    module: nn.Module
    bias: Tensor | None
    row: Tensor
    position: Tensor
    slot: Tensor


@dataclass(frozen=True, eq=False)
class _Round:
    """The layout of steps that work on the same problems; made anew when one is done."""

    active: list[int]
    batch: Batch
    sizes: list[int]  # rewriting rows per problem
    n_rewriting: int
    bare: Tensor  # per problem its first row, the bare prompt
    target_lengths: Tensor
    slots: list[list[int]]  # per problem
    places: list[_Place]


class ValueOptimizer:
    """Optimises v* for a batch of problems at once (ROME Eq. 4, MEMIT Eq. 16, MOSE Eq. 24).

    ``loss = NLL(target | contexts) + kl_factor · KL + weight_decay · ‖δ‖ / ‖v0‖²``, NLL averaged over target tokens and
    then over contexts, KL between the next-token distributions of "{subject} is a" before and during.

    Args:
        site: where δ acts: ``mlp`` (output of the edited projection; ROME, MOSE) or ``block`` (output of the block of
            the last edited layer; MEMIT, AlphaEdit).
        constraint: what values are allowed.
        lr: Adam's learning rate.
        lr_unit: ``absolute`` as published, or ``relative`` to ``‖v0‖ / √d``, which carries over between models.
        steps: at most so many.
        stop_loss: a problem is done once its loss is below.
        kl_factor: weight of the KL term; 0 leaves it out.
        weight_decay: weight of the norm penalty.

    Raises:
        ValueError: for a constraint that the site cannot take, or numbers out of range.
    """

    def __init__(
        self,
        site: Literal["mlp", "block"] = "mlp",
        constraint: Constraint | None = None,
        lr: float = 0.5,
        lr_unit: Literal["absolute", "relative"] = "absolute",
        steps: int = 25,
        stop_loss: float = 0.05,
        kl_factor: float = 0.0625,
        weight_decay: float = 1e-3,
    ) -> None:
        self.constraint = constraint if constraint is not None else NormClamp(4.0)
        if site == "block" and self.constraint.replaces:
            raise ValueError("Norm-matched values need `site: mlp`: a block's output is not a product of its weight.")
        if site not in ("mlp", "block"):
            raise ValueError(f"The site of values is 'mlp' or 'block', not {site!r}.")
        if lr_unit not in ("absolute", "relative"):
            raise ValueError(f"The unit of lr is 'absolute' or 'relative', not {lr_unit!r}.")
        if not (lr > 0 and steps >= 1 and kl_factor >= 0 and weight_decay >= 0):
            raise ValueError("Values need lr > 0, steps >= 1, kl_factor >= 0 and weight_decay >= 0.")
        self.site, self.lr, self.lr_unit, self.steps = site, lr, lr_unit, steps
        self.stop_loss, self.kl_factor, self.weight_decay = stop_loss, kl_factor, weight_decay

    def optimise(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        problems: Sequence[ValueProblem],
        average: KeyAverage,
        steps: int | None = None,
        contexts: Sequence[str] | None = None,
    ) -> Values:
        """Runs the optimisation. Needs gradients enabled; leaves no gradient on the model's weights.

        Args:
            workspace: the model.
            requests: the requests that problems refer to.
            problems: what to solve, independently of one another.
            average: how keys are averaged, which fixes the starting point ``v0 = W k`` at site ``mlp``.
            steps: replaces the object's own number.
            contexts: replaces the workspace's contexts.
        """
        starts = self._starts(workspace, requests, problems, average)  # (slots, d)
        slots = [(p, layer) for p, problem in enumerate(problems) for layer in problem.layers]
        unit = (
            starts.norm(dim=-1, keepdim=True) / starts.shape[-1] ** 0.5
            if self.lr_unit == "relative"
            else torch.ones_like(starts[:, :1])
        )
        free = torch.zeros_like(starts, requires_grad=True)  # δ in units of `unit`
        adam = torch.optim.Adam([free], lr=self.lr)

        rows_of = [workspace.rewriting_rows(requests[p.request], contexts) for p in problems]
        essence = [workspace.essence_row(requests[p.request]) for p in problems] if self.kl_factor else []
        before = self._essence_before(workspace, requests, problems) if self.kl_factor else None

        n = len(problems)
        loss_of, probability, steps_taken = [0.0] * n, [0.0] * n, [0] * n
        final = torch.zeros_like(starts)
        limit = self.steps if steps is None else steps
        round_ = self._round(workspace, list(range(n)), slots, rows_of, essence)
        for step in range(limit + 1):  # the last turn only evaluates, so that the reported loss is the value's own
            delta = free * unit
            with torch.set_grad_enabled(step < limit), change_outputs(self._changes(round_, starts, delta)):
                logits = workspace.model(
                    input_ids=round_.batch.input_ids, attention_mask=round_.batch.attention_mask, use_cache=False
                ).logits
                nll = _target_nll(logits[: round_.n_rewriting], round_.batch.labels[: round_.n_rewriting])
                losses = torch.stack([x.mean() for x in nll.split(round_.sizes)])
                if before is not None:
                    at = round_.batch.attention_mask[round_.n_rewriting :].sum(1) - 1
                    now = logits[round_.n_rewriting :][torch.arange(len(at)), at].float().log_softmax(-1)
                    kl = nn.functional.kl_div(before[round_.active], now, log_target=True, reduction="none").sum(-1)
                    losses = losses + self.kl_factor * kl
                if self.weight_decay:
                    decay = delta.norm(dim=-1) / starts.norm(dim=-1).clamp_min(1e-12) ** 2
                    losses = losses + self.weight_decay * torch.stack([decay[mine].sum() for mine in round_.slots])
            bare = (-nll.detach()[round_.bare] * round_.target_lengths).exp()
            still: list[int] = []
            for p, mine, loss, chance in zip(round_.active, round_.slots, losses.tolist(), bare.tolist(), strict=True):
                loss_of[p], probability[p], steps_taken[p] = loss, chance, step
                if loss < self.stop_loss or step == limit:
                    final[mine] = delta[mine].detach()
                else:
                    still.append(p)
            if not still:
                break
            # Problems are independent: the sum's gradient is each one's own, and Adam works by coordinate. Not
            # `backward`, which would leave gradients on weights that require them.
            (free.grad,) = torch.autograd.grad(losses[[p in still for p in round_.active]].sum(), free)
            adam.step()
            with torch.no_grad():
                free.copy_(self.constraint.project(starts, free * unit) / unit)
            if still != round_.active:
                round_ = self._round(workspace, still, slots, rows_of, essence)

        values = self.constraint.value(starts, final)
        targets: list[dict[int, Tensor]] = [{} for _ in problems]
        for s, (p, layer) in enumerate(slots):
            targets[p][layer] = values[s].detach()
        return Values(list(problems), targets, loss_of, probability, steps_taken)

    @torch.no_grad()
    def _starts(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        problems: Sequence[ValueProblem],
        average: KeyAverage,
    ) -> Tensor:
        """v0 of every slot: W k of the averaged key at site ``mlp``, else the block's output on the bare prompt."""
        layers = sorted({layer for p in problems for layer in p.layers})
        if self.site == "block":
            outputs = block_outputs(workspace, requests, layers)
        else:
            keys = compute_keys(workspace, requests, layers, average)
            outputs = {layer: workspace.architecture[layer].weight.float() @ keys[layer] for layer in layers}
        return torch.stack([outputs[layer][:, p.request] for p in problems for layer in p.layers])

    @torch.no_grad()
    def _essence_before(
        self, workspace: Workspace, requests: Sequence[EditRequest], problems: Sequence[ValueProblem]
    ) -> Tensor:
        """Log-probabilities (problems, vocabulary) after "{subject} is a", before any change."""
        batch = workspace.prompter.collate([workspace.essence_row(r) for r in requests], workspace.device)
        logits = workspace.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        at = batch.attention_mask.sum(1) - 1
        found = logits[torch.arange(len(requests)), at].float().log_softmax(-1)
        return found[[p.request for p in problems]]

    def _round(
        self,
        workspace: Workspace,
        active: list[int],
        slots: list[tuple[int, int]],
        rows_of: list[list[Row]],
        essence: list[Row],
    ) -> _Round:
        """Lays out the rows of the problems that are not done: all their contexts first, then one for the KL each."""
        rows = [row for p in active for row in rows_of[p]]
        sizes = [len(rows_of[p]) for p in active]
        bare = [sum(sizes[:i]) for i in range(len(active))]
        owner = [p for p in active for _ in rows_of[p]] + (active if essence else [])
        batch = workspace.prompter.collate(rows + [essence[p] for p in active if essence], workspace.device)
        index = {slot: s for s, slot in enumerate(slots)}
        places = []
        for layer in sorted({layer for p, layer in slots if p in set(active)}):
            at = [r for r, p in enumerate(owner) if (p, layer) in index]
            part = workspace.architecture[layer]
            row = torch.tensor(at, device=workspace.device)
            places.append(
                _Place(
                    module=part.block if self.site == "block" else part.projection,
                    bias=getattr(part.projection, "bias", None) if self.site == "mlp" else None,
                    row=row,
                    position=batch.subject_last[row],
                    slot=torch.tensor([index[owner[r], layer] for r in at], device=workspace.device),
                )
            )
        return _Round(
            active=active,
            batch=batch,
            sizes=sizes,
            n_rewriting=len(rows),
            bare=torch.tensor(bare, device=workspace.device),
            target_lengths=(batch.labels[bare] != -100).sum(1),
            slots=[[s for s, (q, _) in enumerate(slots) if q == p] for p in active],
            places=places,
        )

    def _changes(self, round_: _Round, starts: Tensor, delta: Tensor) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """For every module the function that changes its output where a value is to be tried."""

        def at(place: _Place) -> Callable[[Tensor], Tensor]:
            def change(output: Tensor) -> Tensor:
                if self.constraint.replaces:
                    new = self.constraint.value(starts[place.slot], delta[place.slot])
                    new = new if place.bias is None else new + place.bias.float()
                else:
                    new = output[place.row, place.position].float() + delta[place.slot]
                return output.index_put((place.row, place.position), new.to(output.dtype))

            return change

        return {place.module: at(place) for place in round_.places}


def _target_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the target tokens, a value per row: (rows, T, V), (rows, T) to (rows,)."""
    predicted, wanted = logits[:, :-1].float(), labels[:, 1:]
    mask = wanted != -100
    losses = nn.functional.cross_entropy(predicted[mask], wanted[mask], reduction="none")
    row = mask.nonzero()[:, 0]
    return torch.zeros(len(labels), device=losses.device).index_add(0, row, losses) / mask.sum(1)


@torch.no_grad()
def block_outputs(workspace: Workspace, requests: Sequence[EditRequest], layers: Sequence[int]) -> dict[int, Tensor]:
    """Outputs of blocks at the subject's last token under the bare edit prompt: for each layer (d, n), float32."""
    rows = [workspace.prompter.row(r.prompt, r.target_new, r.subject, r.source) for r in requests]
    batch = workspace.prompter.collate(rows, workspace.device)
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], Tensor]:
        def look(output: Tensor) -> Tensor:
            seen[layer] = output
            return output

        return look

    with change_outputs({workspace.architecture[layer].block: keep(layer) for layer in layers}):
        workspace.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    at = torch.arange(len(rows), device=workspace.device)
    return {layer: seen[layer][at, batch.subject_last].float().T for layer in layers}
