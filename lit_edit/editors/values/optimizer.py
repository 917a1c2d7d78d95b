"""Values v*: gradient optimisation of what the edited layers should put out at the subject's last token.

All requests, contexts and candidate layers of a step share one forward pass: every *problem* (a request and the layers
whose outputs it may change) contributes its rows, and a hook per layer changes the rows that belong to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lit_edit.editors.keys import ROWS_AT_ONCE, KeyAverage, compute_keys
from lit_edit.editors.values.constraints import Constraint, NormClamp
from lit_edit.editors.values.penalties import Penalty
from lit_edit.editors.values.schedules import Descent, Plain, Schedule, Stage
from lit_edit.model.hooks import read_outputs
from lit_edit.model.passes import CannotCutError, CompletePasses, New, Passes, Place, cut, supported
from lit_edit.model.prompts import Row
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.settings import Configured

MOST_ROWS = 1024
"""Texts in a pass where nothing else is said."""
_ROWS_ON_CPU = 64  # what a pass over more of them writes does not stay in the caches


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
class _Change:
    """Where one module's output is changed, and the slot that each row there takes its value from."""

    place: Place
    bias: Tensor | None
    slot: Tensor


@dataclass(frozen=True, eq=False)
class _Rows:
    """The texts of one request: its edit prompts in context, the bare one first, and one for the KL term, if any."""

    rewriting: list[Row]
    essence: Row | None

    @property
    def every(self) -> list[Row]:
        """All of them."""
        return self.rewriting + ([] if self.essence is None else [self.essence])

    @property
    def width(self) -> int:
        """The most tokens that one has from the subject's last on."""
        return max(len(row.ids) - row.subject_last for row in self.every)


@dataclass(frozen=True, eq=False)
class _Texts:
    """Every row that the problems of an optimisation need, each once: problems of one request share theirs.

    ``rewriting`` and ``essence`` hold, per problem, which rows are its edit prompts in context (the bare one first),
    and which is its row for the KL term, if there is one; ``first`` is the first layer that it changes. ``before`` are
    the log-probabilities (problems, vocabulary) at the ends of the latter, before any change.
    """

    rows: list[Row]
    rewriting: list[list[int]]
    essence: list[int]
    first: list[int]
    passes: Passes
    before: Tensor | None


@dataclass(frozen=True, eq=False)
class _Round:
    """The layout of steps that work on the same problems; made anew when one is done.

    What is read comes as places (row, column): first where target tokens are predicted, ``wanted`` and in ``of_row``,
    then the ends of the rows for the KL term.
    """

    problems: list[int]
    active: Tensor  # the same
    passes: Passes
    sizes: list[int]  # rewriting rows per problem
    bare: Tensor  # per problem its first row, the bare prompt
    lengths: Tensor  # (rewriting rows,) tokens of the target
    read: tuple[Tensor, Tensor]
    wanted: Tensor
    of_row: Tensor
    slots: Tensor  # of the problems
    owner: Tensor  # of each slot: which of the problems, counted in the round
    changes: list[_Change]


class ValueOptimizer(Configured):
    """Optimises v* for a batch of problems at once (ROME Eq. 4, MEMIT Eq. 16, MOSE Eq. 24).

    ``loss = NLL(target | contexts) + kl_factor · KL + weight_decay · ‖δ‖ / ‖v0‖²``, NLL averaged over target tokens and
    then over contexts, KL between the next-token distributions of "{subject} is a" before and during.

    Args:
        site: Where δ acts: ``mlp`` (output of the edited projection; ROME, MOSE) or ``block`` (output of the block of
            the last edited layer; MEMIT, AlphaEdit).
        constraint: Constraint on values.
        lr: Adam's learning rate.
        lr_unit: ``absolute`` as published, or ``relative`` to ``‖W_0 k‖ / √d``, the output of the unedited weight for
            the request's key, which carries over between models.
        steps: Largest number of steps.
        stop_loss: Loss below which a problem is done.
        kl_factor: Weight of the KL term; 0 leaves it out.
        weight_decay: Weight of the norm penalty.
        penalties: Further terms of the loss (O-Edit); they count in ``stop_loss``, too.
        schedule: Stages of the optimisation (EAC); None for a single one.
        shrink: Passes in which every value is drawn back towards v0 as far as its loss stays below ``stop_loss`` (or
            the loss it had reached): bisection, so that 4 find the smallest move to a sixteenth. 0 leaves it out.
        complete_passes: Run every token through every block at every step, instead of computing once what a change
            cannot reach. The numbers are the same to rounding; for comparison, and for models whose passes cannot be
            cut, which always run complete ones.
        max_rows: The most texts in a pass, which bounds its memory: a problem has one for each context, and one for the
            KL term. A batch that has more is worked through in parts, with the same result. None takes 1,024, but 64
            on a CPU, where more at once are slower.

    Raises:
        ValueError: for a constraint that the site or the schedule cannot take, or numbers out of range.
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
        penalties: list[Penalty] | None = None,
        schedule: Schedule | None = None,
        shrink: int = 0,
        complete_passes: bool = False,
        max_rows: int | None = None,
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
        self.penalties = list(penalties or [])
        self.schedule = schedule if schedule is not None else Plain()
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"Values need max_rows of at least 1, not {max_rows}.")
        if shrink < 0:
            raise ValueError(f"Values are drawn back in `shrink` passes, 0 or more, not {shrink}.")
        self.shrink, self.complete_passes, self.max_rows = shrink, complete_passes, max_rows
        self.schedule.check(self.constraint)

    def optimise(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        problems: Sequence[ValueProblem],
        average: KeyAverage,
        steps: int | None = None,
        contexts: Sequence[str] | None = None,
        penalties: Sequence[Penalty] = (),
        also: Sequence[Sequence[EditRequest]] = (),
    ) -> Values:
        """Runs the optimisation. Needs gradients enabled; leaves no gradient on the model's weights.

        Problems are independent of one another. So many as ``max_rows`` allows are worked on together, at least one.

        Args:
            workspace: Model.
            requests: Requests that problems refer to.
            problems: Problems to solve, independently of one another.
            average: How keys are averaged, which fixes the start ``v0 = W k`` at site ``mlp``.
            steps: Replaces the object's own number of steps.
            contexts: Replaces the workspace's contexts.
            also: For each request, further facts about its subject that the same value has to answer; none if empty.
            penalties: Further terms of the loss. Layer policies leave them out: they compare candidates by the plain
                loss.
        """
        problems = list(problems)
        texts = {
            i: self._rows(workspace, requests[i], contexts, also[i] if also else ())
            for i in dict.fromkeys(p.request for p in problems)
        }
        sizes = [(len(texts[p.request].every), texts[p.request].width) for p in problems]
        found: dict[int, tuple[dict[int, Tensor], float, float, int]] = {}
        for part in parts_of_a_batch(sizes, self.rows_at_once(workspace.device), _tokens_of_a_pass(workspace.device)):
            place = {request: at for at, request in enumerate(dict.fromkeys(problems[i].request for i in part))}
            values = self._optimise(
                workspace,
                [requests[request] for request in place],
                [ValueProblem(place[problems[i].request], problems[i].layers) for i in part],
                average,
                steps,
                [texts[request] for request in place],
                penalties,
            )
            each = zip(values.targets, values.loss, values.probability, values.steps, strict=True)
            found |= dict(zip(part, each, strict=True))
        targets, loss, probability, taken = zip(*(found[i] for i in range(len(problems))), strict=True)
        return Values(problems, list(targets), list(loss), list(probability), list(taken))

    def _rows(
        self,
        workspace: Workspace,
        request: EditRequest,
        contexts: Sequence[str] | None,
        also: Sequence[EditRequest],
    ) -> _Rows:
        essence = workspace.essence_row(request) if self.kl_factor else None
        bare = [workspace.prompter.row(r.prompt, r.target_new, r.subject, r.source) for r in also]
        return _Rows([*workspace.rewriting_rows(request, contexts), *bare], essence)

    def rows_at_once(self, device: torch.device) -> int:
        """The most texts in a pass."""
        if self.max_rows is not None:
            return self.max_rows
        return _ROWS_ON_CPU if device.type == "cpu" else MOST_ROWS

    def _optimise(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        problems: Sequence[ValueProblem],
        average: KeyAverage,
        steps: int | None,
        rows: Sequence[_Rows],
        penalties: Sequence[Penalty],
    ) -> Values:
        """`optimise` for problems that all go together, with the texts of each request."""
        starts = self._starts(workspace, requests, problems, average)  # (slots, d)
        slots = [(p, layer) for p, problem in enumerate(problems) for layer in problem.layers]
        outputs = self._with_bias(workspace, starts, slots)
        unit = self._unit(workspace, requests, slots, [problems[p].request for p, _ in slots], average)
        texts = self._texts(workspace, rows, problems)
        sites = [workspace.site(layer) for _, layer in slots]
        prepared = [penalty.prepare(sites) for penalty in penalties]
        device, n = starts.device, len(problems)
        look = _look_every(device)

        def descend(stage: Stage) -> Descent:
            free = torch.zeros_like(starts) if stage.start is None else stage.start / unit  # δ in units of `unit`
            free.requires_grad_(True)
            adam = torch.optim.Adam([free], lr=self.lr)
            final, gradient = torch.zeros_like(starts), torch.zeros_like(starts)
            loss_of, probability = starts.new_zeros(n), starts.new_zeros(n)
            taken = torch.zeros(n, dtype=torch.long, device=device)
            round_ = self._round(workspace, list(range(n)), slots, texts)
            going = torch.ones(n, dtype=torch.bool, device=device)  # of the problems in the round
            for step in range(stage.steps + 1):  # the last turn only evaluates: the reported loss is the value's own
                delta = free * unit
                with torch.set_grad_enabled(step < stage.steps):
                    losses, nll = self._losses(round_, texts.before, outputs, starts, delta)
                    terms = [penalty(self._moved(starts, delta)) for penalty in prepared]
                    if stage.term is not None:
                        terms.append(stage.term(delta))
                    for term in terms:
                        losses = losses.index_add(0, round_.owner, term[round_.slots].to(losses))
                with torch.no_grad():
                    bare = (-nll[round_.bare] * round_.lengths[round_.bare]).exp()
                    done = going & (losses < self.stop_loss if step < stage.steps else True)
                    for record, now in (
                        (loss_of, losses),
                        (probability, bare),
                        (taken, torch.full_like(round_.active, step)),
                    ):
                        record[round_.active] = torch.where(going, now, record[round_.active])
                    ends = done[round_.owner, None]
                    final[round_.slots] = torch.where(ends, delta[round_.slots], final[round_.slots])
                    going = going & ~done
                if step == stage.steps:
                    break
                still = going.tolist() if step % look == look - 1 else None
                if still is not None and not any(still):
                    break
                # Problems are independent: the sum's gradient is each one's own, and Adam works by coordinate. Not
                # `backward`, which would leave gradients on weights that require them.
                (slope,) = torch.autograd.grad(torch.where(going, losses, 0.0).sum(), free)
                gradient += slope / unit
                free.grad = slope if stage.free is None else slope * stage.free
                adam.step()
                with torch.no_grad():
                    free.copy_(self.constraint.project(outputs, free * unit) / unit)
                if still is not None and not all(still):
                    left = [p for p, goes in zip(round_.problems, still, strict=True) if goes]
                    round_, going = self._round(workspace, left, slots, texts), going[going]
            per_slot = taken[[p for p, _ in slots]].clamp_min(1)[:, None]
            return Descent(final, gradient / per_slot, loss_of.tolist(), probability.tolist(), taken.tolist())

        found = self.schedule.run(descend, self.steps if steps is None else steps)
        change = found.change
        if self.shrink:
            round_ = self._round(workspace, list(range(n)), slots, texts)
            change = self._drawn_back(round_, texts.before, outputs, starts, change, found.loss)
        values = self.constraint.value(starts, change)
        targets: list[dict[int, Tensor]] = [{} for _ in problems]
        for s, (p, layer) in enumerate(slots):
            targets[p][layer] = values[s].detach()
        return Values(list(problems), targets, found.loss, found.probability, found.steps)

    @torch.no_grad()
    def _drawn_back(
        self,
        round_: _Round,
        before: Tensor | None,
        outputs: Tensor,
        starts: Tensor,
        change: Tensor,
        reached: list[float],
    ) -> Tensor:
        """The smallest moves (slots, d) along the way to each value that still do."""
        enough = torch.tensor(reached, device=starts.device).clamp_min(self.stop_loss)
        low, high = torch.zeros_like(enough), torch.ones_like(enough)

        def at(share: Tensor) -> Tensor:
            return self.constraint.project(outputs, change * share[round_.owner, None])

        for _ in range(self.shrink):
            middle = (low + high) / 2
            losses, _nll = self._losses(round_, before, outputs, starts, at(middle))
            does = losses <= enough
            low, high = torch.where(does, low, middle), torch.where(does, middle, high)
        return at(high)

    def _losses(
        self, round_: _Round, before: Tensor | None, outputs: Tensor, starts: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """NLL, KL and weight decay of every problem of a round, (problems,), and the NLL of every rewriting row."""
        logits = round_.passes.logits(*round_.read, self._changes(round_, starts, delta)).float()
        n = len(round_.wanted)
        by_token = nn.functional.cross_entropy(logits[:n], round_.wanted, reduction="none")
        nll = torch.zeros_like(round_.lengths, dtype=by_token.dtype).index_add(0, round_.of_row, by_token)
        nll = nll / round_.lengths
        losses = torch.stack([x.mean() for x in nll.split(round_.sizes)])
        if before is not None:
            now = logits[n:].log_softmax(-1)
            kl = nn.functional.kl_div(before[round_.active], now, log_target=True, reduction="none").sum(-1)
            losses = losses + self.kl_factor * kl
        if self.weight_decay:
            decay = delta.norm(dim=-1) / outputs.norm(dim=-1).clamp_min(1e-12) ** 2
            losses = losses.index_add(0, round_.owner, self.weight_decay * decay[round_.slots])
        return losses, nll

    def _moved(self, starts: Tensor, delta: Tensor) -> Tensor:
        """``v − v0`` (slots, d); where the change is added it is just that, without the rounding of a sum."""
        return self.constraint.value(starts, delta) - starts if self.constraint.replaces else delta

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

    def _unit(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        slots: Sequence[tuple[int, int]],
        asked: Sequence[int],
        average: KeyAverage,
    ) -> Tensor:
        """What the learning rate is a multiple of, ``(slots, 1)``: the same however much has been edited.

        With the weight as edited, steps would grow with the damage that they do.
        """
        if self.lr_unit == "absolute":
            return torch.ones(len(slots), 1, device=workspace.device)
        layers = sorted({layer for _, layer in slots})
        keys = compute_keys(workspace, requests, layers, average)
        outputs = {}
        for layer in layers:
            original = workspace.site(layer).original.float()
            outputs[layer] = (original @ keys[layer].to(original)).to(workspace.device)
            bias = getattr(workspace.architecture[layer].projection, "bias", None)
            if bias is not None and not self.constraint.replaces:
                outputs[layer] += bias.detach().to(outputs[layer])[:, None]
        found = torch.stack([outputs[layer][:, r] for (_, layer), r in zip(slots, asked, strict=True)])
        return found.norm(dim=-1, keepdim=True) / found.shape[-1] ** 0.5

    def _with_bias(self, workspace: Workspace, starts: Tensor, slots: Sequence[tuple[int, int]]) -> Tensor:
        """v0 as the module puts it out, W k + b: what a change is measured by. A value that replaces has no bias."""
        if self.site == "block" or self.constraint.replaces:
            return starts
        biases = [getattr(workspace.architecture[layer].projection, "bias", None) for _, layer in slots]
        none = torch.zeros_like(starts[0])
        return starts + torch.stack([none if bias is None else bias.detach().to(none) for bias in biases])

    def _texts(self, workspace: Workspace, requests: Sequence[_Rows], problems: Sequence[ValueProblem]) -> _Texts:
        """Runs the model once, so that passes can be cut where that is possible."""
        rows: list[Row] = []
        rewriting: list[list[int]] = []
        essence: list[int] = []
        for request in requests:
            rewriting.append(list(range(len(rows), len(rows) + len(request.rewriting))))
            essence.append(len(rows) + len(request.rewriting))
            rows += request.every
        batch = workspace.prompter.collate(rows, workspace.device)
        layers = workspace.architecture.layers
        first = [min(p.layers) for p in problems]
        ends = torch.tensor(essence if self.kl_factor else [], dtype=torch.long, device=workspace.device)
        longest = max(len(row.ids) for row in rows)
        passes: Passes | None = None
        wanted = not self.complete_passes and workspace.cuts.cuttable
        if wanted and supported(workspace.model, [part.block for part in layers], longest):
            try:
                passes, logits = cut(workspace.model, layers, batch, first, self.site, workspace.cuts, ends)
            except CannotCutError as error:
                workspace.cuts.cuttable = False
                warnings.warn(str(error), stacklevel=2)
        if passes is None:
            passes = CompletePasses(workspace.model, layers, batch, self.site)
            if self.kl_factor:
                at = batch.attention_mask.sum(1)[ends] - 1 - batch.subject_last[ends]
                with torch.no_grad():
                    logits = passes.select(essence, [0] * len(essence)).logits(torch.arange(len(ends)).to(at), at, [])
        before = None
        if self.kl_factor:
            before = logits.float().log_softmax(-1)[[p.request for p in problems]]
        return _Texts(
            rows,
            [rewriting[p.request] for p in problems],
            [essence[p.request] for p in problems] if self.kl_factor else [],
            first,
            passes,
            before,
        )

    def _round(self, workspace: Workspace, active: list[int], slots: list[tuple[int, int]], texts: _Texts) -> _Round:
        """Lays out the rows: all contexts of all problems first, then one for the KL each."""
        device = workspace.device
        taken = [i for p in active for i in texts.rewriting[p]]
        sizes = [len(texts.rewriting[p]) for p in active]
        owner = [p for p in active for _ in texts.rewriting[p]] + (active if texts.essence else [])
        rows = [texts.rows[i] for i in taken]
        ends = [texts.rows[texts.essence[p]] for p in active] if texts.essence else []
        # The token at t is predicted at t - 1; columns count from the subject's last token.
        targets = [(r, t) for r, row in enumerate(rows) for t in range(row.target_start, len(row.ids))]
        read = [(r, t - 1 - rows[r].subject_last) for r, t in targets]
        read += [(len(rows) + e, len(row.ids) - 1 - row.subject_last) for e, row in enumerate(ends)]
        taken += [texts.essence[p] for p in active if texts.essence]
        passes = texts.passes.select(taken, [texts.first[p] for p in owner])
        index = {slot: s for s, slot in enumerate(slots)}
        mine = [(s, i) for i, p in enumerate(active) for s, (q, _) in enumerate(slots) if q == p]
        changes = []
        for layer in sorted({layer for p, layer in slots if p in set(active)}):
            at = [r for r, p in enumerate(owner) if (p, layer) in index]
            slot = torch.tensor([index[owner[r], layer] for r in at], device=device)
            bias = getattr(workspace.architecture[layer].projection, "bias", None) if self.site == "mlp" else None
            changes += [_Change(place, bias, slot[place.which]) for place in passes.places(layer, at)]
        return _Round(
            problems=active,
            active=torch.tensor(active, device=device),
            passes=passes,
            sizes=sizes,
            bare=torch.tensor([sum(sizes[:i]) for i in range(len(active))], device=device),
            lengths=torch.tensor([len(row.ids) - row.target_start for row in rows], device=device),
            read=(torch.tensor([r for r, _ in read], device=device), torch.tensor([c for _, c in read], device=device)),
            wanted=torch.tensor([rows[r].ids[t] for r, t in targets], device=device),
            of_row=torch.tensor([r for r, _ in targets], device=device),
            slots=torch.tensor([s for s, _ in mine], device=device),
            owner=torch.tensor([i for _, i in mine], device=device),
            changes=changes,
        )

    def _changes(self, round_: _Round, starts: Tensor, delta: Tensor) -> list[tuple[Place, New]]:
        """What becomes of the outputs where a value is to be tried."""

        def at(change: _Change) -> New:
            def new(output: Tensor, _: Tensor) -> Tensor:
                if not self.constraint.replaces:
                    return output.float() + delta[change.slot]
                value = self.constraint.value(starts[change.slot], delta[change.slot])
                return value if change.bias is None else value + change.bias.float()

            return new

        return [(change.place, at(change)) for change in round_.changes]


def parts_of_a_batch(sizes: Sequence[tuple[int, int]], most: int, of_a_pass: int) -> list[list[int]]:
    """Which problems share passes: those of about equal width, so that little is padded.

    Args:
        sizes: Rows and width in tokens of each problem.
        most: Largest number of rows in a part, unless a single problem has more.
        of_a_pass: Tokens of padding that cost as much as another pass.

    Returns:
        Indices of problems, part by part: of all divisions of the problems in the order of their widths the one with
        the least ``Σ rows · widest + of_a_pass``.
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i][1])
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n, and where their last part begins
    for end in range(1, len(order) + 1):
        rows, width = 0, sizes[order[end - 1]][1]
        choices = []
        for begin in range(end - 1, -1, -1):
            rows += sizes[order[begin]][0]
            if rows > most and begin < end - 1:
                break
            choices.append((best[begin][0] + rows * width + of_a_pass, begin))
        best.append(min(choices))
    parts, end = [], len(order)
    while end:
        begin = best[end][1]
        parts.append(sorted(order[begin:end]))
        end = begin
    return parts[::-1]


def _tokens_of_a_pass(device: torch.device) -> int:
    """What `parts_of_a_batch` counts for a pass."""
    return 32 if device.type == "cpu" else 256


def _look_every(device: torch.device) -> int:
    """After how many steps to look which problems are done: for that, a GPU would have to be waited for."""
    return 1 if device.type == "cpu" else 5


@torch.no_grad()
def block_outputs(workspace: Workspace, requests: Sequence[EditRequest], layers: Sequence[int]) -> dict[int, Tensor]:
    """Outputs of blocks at the subject's last token under the bare edit prompt: for each layer (d, n), float32."""
    every = [workspace.prompter.row(r.prompt, r.target_new, r.subject, r.source).up_to_subject() for r in requests]
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for first in range(0, len(every), ROWS_AT_ONCE):
        rows = every[first : first + ROWS_AT_ONCE]
        batch = workspace.prompter.collate(rows, workspace.device)
        with read_outputs(
            {layer: workspace.architecture[layer].block for layer in layers}, batch.input_ids.shape[1]
        ) as seen:
            workspace.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        at = torch.arange(len(rows), device=workspace.device)
        for layer in layers:
            found[layer].append(seen[layer][at, batch.subject_last].float().T)
    return {layer: torch.cat(parts, dim=1) for layer, parts in found.items()}
