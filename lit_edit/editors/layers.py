"""Layer policies: which layers a request is edited in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.algebra.linalg import spectral_norm
from lit_edit.algebra.updates import LowRank
from lit_edit.editors.keys import KeyAverage, compute_keys
from lit_edit.editors.solvers import ROME, Solver
from lit_edit.editors.values import ValueOptimizer, ValueProblem, Values
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.model.families import Architecture
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.settings import Configured

UNMOVED = 1e-5  # scores below come from the rounding of a value that was never moved


@dataclass(frozen=True)
class Choice:
    """The layers of one request, ascending, the one they are grouped around, and every candidate's score if any."""

    layers: tuple[int, ...]
    center: int
    scores: dict[int, float]


class LayerPolicy(Configured, ABC):
    """Chooses the layers of each request of a batch."""

    @abstractmethod
    def candidates(self, architecture: Architecture) -> list[int]:
        """Every layer that may be edited; statistics are gathered for these.

        Raises:
            ValueError: if a layer was asked for that the model does not have.
        """

    @property
    def needs_covariance(self) -> bool:
        """Whether key covariances of the candidates must be in the workspace."""
        return False

    def kept_size(self, d: int, p: int) -> int:
        """Float64 numbers kept between edits for a layer with ``W (d, p)``; for estimates of memory."""
        return 0

    def check(self, values: ValueOptimizer) -> None:
        """Raises ValueError if layers cannot be chosen with such values; asked when an editor is put together."""

    @abstractmethod
    def choose(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        values: ValueOptimizer,
        average: KeyAverage,
        value_average: KeyAverage | None = None,
    ) -> list[Choice]:
        """A choice per request. May run value optimisations; needs gradients enabled.

        Args:
            workspace: Model as edited so far.
            requests: Batch.
            values: How the editor will optimise v*.
            average: How the keys it will solve with are averaged.
            value_average: The same for the keys at which v* and the residual are taken; None for ``average``.
        """


class FixedLayers(LayerPolicy):
    """Always the same layers, as ROME (one) and MEMIT or AlphaEdit (several) do.

    Args:
        layers: Layer indices, counted from 0.
    """

    def __init__(self, layers: list[int]) -> None:
        if not layers or sorted(set(layers)) != sorted(layers):
            raise ValueError(f"Fixed layers must be distinct and at least one, not {layers}.")
        self.layers = tuple(sorted(layers))

    def candidates(self, architecture: Architecture) -> list[int]:
        """The layers themselves."""
        architecture.check(list(self.layers))
        return list(self.layers)

    def choose(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        values: ValueOptimizer,
        average: KeyAverage,
        value_average: KeyAverage | None = None,
    ) -> list[Choice]:
        """The same for every request."""
        return [Choice(self.layers, self.layers[-1], {}) for _ in requests]


class LeastFull(LayerPolicy):
    """The layers with the fewest edits so far, so that edits spread evenly over all candidates.

    A layer of width d holds O(d) edits before they disturb one another; what counts is edits per layer over width.

    Args:
        layers: Candidates.
        number: Layers that each request is written into, jointly.

    Raises:
        ValueError: Unless 1 ≤ ``number`` ≤ the number of candidates.
    """

    def __init__(self, layers: list[int], number: int = 3) -> None:
        if not layers or len(set(layers)) != len(layers) or not 1 <= number <= len(layers):
            raise ValueError(
                f"{number} of the layers {layers} cannot be chosen: name distinct ones, and enough of them."
            )
        self.layers, self.number = sorted(layers), number

    def candidates(self, architecture: Architecture) -> list[int]:
        """The candidates."""
        architecture.check(self.layers)
        return list(self.layers)

    def choose(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        values: ValueOptimizer,
        average: KeyAverage,
        value_average: KeyAverage | None = None,
    ) -> list[Choice]:
        """The least full layers for the first request, the next for the second, and so on through the batch."""
        edits = {layer: workspace.site(layer).edits for layer in self.layers}
        choices = []
        for _ in requests:
            chosen = tuple(sorted(sorted(self.layers, key=lambda layer: (edits[layer], layer))[: self.number]))
            for layer in chosen:
                edits[layer] += 1
            choices.append(Choice(chosen, chosen[len(chosen) // 2], {}))
        return choices


class ActivationSelection(LayerPolicy):
    """MOSE's selection by activation (Eq. 21, 22), with the neighbours of the chosen layer.

    ``l* = argmin_l ‖V^l − W^l K^l‖ / (‖W^l‖₂ · ‖k^l‖₂)``: the layer whose output has to change least, relative to how
    strongly it reacts to the request. The paper divides by the vector ``σ(x W_fc)``, which gives no single number; its
    norm, which Eq. 21 uses, is taken. ``V`` of every candidate comes from one batched optimisation.

    The score looks at the size of the change alone and not at whether it brings the new answer. In the last layer the
    output at the subject's last token reaches no later token, so nothing is optimised there, the change is zero and the
    rule as printed always takes that layer; on the sphere of norm-matched values other layers fall short as well.
    ``reach`` therefore compares only candidates whose value moved at all and whose loss came near the lowest; None is
    the rule as printed.

    Args:
        layers: Candidates; all layers of the model if None.
        neighbours: Layers on either side of the chosen one that are edited as well (the paper: 1); 0 for none.
        steps: Steps of the candidates' optimisation.
        contexts: Number of the workspace's contexts it uses, the bare prompt first.
        reach: Candidates whose final loss exceeds the lowest by more than this are passed over; None passes over none.
    """

    def __init__(
        self,
        layers: list[int] | None = None,
        neighbours: int = 1,
        steps: int = 20,
        contexts: int = 1,
        reach: float | None = 0.25,
    ) -> None:
        if layers is not None and not layers:
            raise ValueError("Layer selection needs at least one candidate; leave `layers` out to take all.")
        if neighbours < 0 or steps < 1 or contexts < 1:
            raise ValueError("Layer selection needs neighbours >= 0, steps >= 1 and contexts >= 1.")
        if reach is not None and reach < 0:
            raise ValueError(f"`reach` is a difference of losses and cannot be negative ({reach}).")
        self.layers, self.neighbours, self.steps, self.contexts, self.reach = layers, neighbours, steps, contexts, reach

    def check(self, values: ValueOptimizer) -> None:
        """Refuses values of blocks: the score compares a value with the product W k."""
        if values.site != "mlp":
            raise ValueError("Selection by activation needs values of `site: mlp`, which it compares with W k.")

    def candidates(self, architecture: Architecture) -> list[int]:
        """The candidates and their neighbours."""
        centers = self._centers(architecture)
        return sorted({layer for c in centers for layer in self._around(c, len(architecture))})

    def choose(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        values: ValueOptimizer,
        average: KeyAverage,
        value_average: KeyAverage | None = None,
    ) -> list[Choice]:
        """Scores every candidate for every request and takes the best with its neighbours."""
        architecture = workspace.architecture
        centers = self._centers(architecture)
        average = value_average or average  # the score compares v* with the output that its optimisation started from
        contexts = workspace.contexts[: self.contexts]
        found = _try_out(workspace, requests, values, average, centers, self.steps, contexts)
        keys = compute_keys(workspace, requests, centers, average)
        choices = []
        for i in range(len(requests)):
            mine = [
                (p.layers[0], t, loss)
                for p, t, loss in zip(found.problems, found.targets, found.loss, strict=True)
                if p.request == i
            ]
            scores = {
                layer: selection_score(
                    architecture[layer].weight.float(),
                    keys[layer][:, i],
                    target[layer],
                    _spectral_norm(workspace.site(layer)),
                )
                for layer, target, _ in mine
            }
            within = _in_reach({layer: loss for layer, _, loss in mine}, scores, self.reach)
            center = min(within, key=scores.__getitem__)
            choices.append(Choice(self._around(center, len(architecture)), center, scores))
        return choices

    def _centers(self, architecture: Architecture) -> list[int]:
        if self.layers is None:
            return list(range(len(architecture)))
        architecture.check(self.layers)
        return sorted(set(self.layers))

    def _around(self, center: int, n: int) -> tuple[int, ...]:
        return tuple(range(max(0, center - self.neighbours), min(n, center + self.neighbours + 1)))


def _spectral_norm(site: EditedWeight) -> float:
    """``‖W‖₂``, computed anew only after the weight was written to."""
    return site.cached("spectral norm", lambda: spectral_norm(site.weight))


class WilKE(LayerPolicy):
    """WilKE's choice (Hu et al. 2024): the layer whose weight the edit changes least, in proportion.

    For every candidate the value is optimised and the update for the request alone is solved for, as if it were edited
    there; the one with the least ``‖ΔW‖_F / ‖W‖_F`` is edited, and no other. Values of all candidates and requests come
    from one batched optimisation.

    Args:
        layers: Candidates. Published: 0-23 (gpt2-xl, of 48), 0-6 (gpt-j, of 28); 5-10 for 7-8B models in O-Edit's
            re-run.
        solver: Solves for the updates that are compared; ROME if None, as in the paper. Keys of past edits are not
            given to it, and penalties of the values' optimisation (O-Edit's) are left out, too.
        steps: Steps of the candidates' optimisation; None takes the editor's own number, as the paper does.
        reach: Candidates whose value never moved, or whose final loss exceeds the lowest by more than this, are passed
            over, as in `ActivationSelection`. None is the paper's rule as printed, which looks at the size of the
            change alone: it needs candidates that leave out the last layers, where no change brings the answer.

    Raises:
        ValueError: if there is no candidate, or a number is out of range.
    """

    def __init__(
        self, layers: list[int], solver: Solver | None = None, steps: int | None = None, reach: float | None = None
    ) -> None:
        if not layers:
            raise ValueError("WilKE needs at least one candidate layer.")
        if steps is not None and steps < 1:
            raise ValueError(f"WilKE needs steps >= 1, or null for the editor's own number, not {steps}.")
        if reach is not None and reach < 0:
            raise ValueError(f"`reach` is a difference of losses and cannot be negative ({reach}).")
        self.layers, self.steps, self.reach = sorted(set(layers)), steps, reach
        self.solver = solver if solver is not None else ROME()

    @property
    def needs_covariance(self) -> bool:
        """As its solver says."""
        return self.solver.needs_covariance

    def kept_size(self, d: int, p: int) -> int:
        """What its solver keeps."""
        return self.solver.kept_size(d, p)

    def check(self, values: ValueOptimizer) -> None:
        """Refuses values of blocks, which say nothing of a single layer's weight."""
        if values.site != "mlp":
            raise ValueError("WilKE needs values of `site: mlp`: it compares what each layer's own weight takes.")

    def candidates(self, architecture: Architecture) -> list[int]:
        """The candidates themselves."""
        architecture.check(self.layers)
        return list(self.layers)

    def choose(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        values: ValueOptimizer,
        average: KeyAverage,
        value_average: KeyAverage | None = None,
    ) -> list[Choice]:
        """Solves for every request in every candidate and takes the least relative change."""
        found = _try_out(workspace, requests, values, value_average or average, self.layers, self.steps, None)
        keys = compute_keys(workspace, requests, self.layers, average)
        apart = value_average if self.solver.mixes_keys else None
        value_keys = compute_keys(workspace, requests, self.layers, apart) if apart else {}
        scores: list[dict[int, float]] = [{} for _ in requests]
        losses: list[dict[int, float]] = [{} for _ in requests]
        for tried, target, loss in zip(found.problems, found.targets, found.loss, strict=True):
            i, layer = tried.request, tried.layers[0]
            site = workspace.site(layer)
            update = self.solver.solve(
                site,
                keys[layer][:, i : i + 1],
                target[layer][:, None],
                value_keys[layer][:, i : i + 1] if apart else None,
            )
            # The norm of factors needs no dense change; that of a rotation says nothing of the weight's change.
            size = update.norm if isinstance(update, LowRank) else float(update.delta(site.weight).norm())
            scores[i][layer] = size / site.cached("norm", site.exact.norm)
            losses[i][layer] = loss
        best = [min(_in_reach(lost, s, self.reach), key=s.__getitem__) for lost, s in zip(losses, scores, strict=True)]
        return [Choice((layer,), layer, s) for layer, s in zip(best, scores, strict=True)]


def _try_out(
    workspace: Workspace,
    requests: Sequence[EditRequest],
    values: ValueOptimizer,
    average: KeyAverage,
    layers: Sequence[int],
    steps: int | None,
    contexts: Sequence[str] | None,
) -> Values:
    """Optimises a value for every request in every candidate layer by itself, all in one batch."""
    problems = [ValueProblem(i, (layer,)) for i in range(len(requests)) for layer in layers]
    return values.optimise(workspace, requests, problems, average, steps=steps, contexts=contexts)


def _in_reach(losses: dict[int, float], scores: dict[int, float], reach: float | None) -> list[int]:
    """The candidates to compare: those whose value moved and whose loss came near the lowest; all if reach is None."""
    if reach is None:
        return list(losses)
    moved = [layer for layer, score in scores.items() if score > UNMOVED] or list(losses)
    lowest = min(losses[layer] for layer in moved)
    return [layer for layer in moved if losses[layer] <= lowest + reach]


def selection_score(weight: Tensor, key: Tensor, target: Tensor, spectral_norm: float | None = None) -> float:
    """MOSE Eq. 22 for one request and layer: ``‖v − W k‖ / (‖W‖₂ ‖k‖₂)``.

    Args:
        weight: (d, p).
        key: (p,).
        target: (d,).
        spectral_norm: Largest singular value of the weight, if known.
    """
    norm = float(torch.linalg.matrix_norm(weight, 2)) if spectral_norm is None else spectral_norm
    return float((target - weight @ key).norm() / (norm * key.norm()))
