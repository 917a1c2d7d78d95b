"""Layer policies: which layers a request is edited in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.algebra.updates import LowRank
from lit_edit.editors.keys import KeyAverage, compute_keys
from lit_edit.editors.prediction import known_spectral_norm, predicted_scores
from lit_edit.editors.solvers import ROME, Solver
from lit_edit.editors.values import ValueOptimizer, ValueProblem
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
            ValueError: If a layer was asked for that the model does not have.
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
            workspace: The model as edited so far.
            requests: The batch.
            values: How the editor will optimise v*.
            average: Average of the keys it will solve with.
            value_average: Average of the keys at which it will optimise v* and take the residual; None for the same.
        """


class FixedLayers(LayerPolicy):
    """Always the same layers, as ROME (one) and MEMIT or AlphaEdit (several) do.

    Args:
        layers: Indices, from 0.
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


class TriedLayers(LayerPolicy, ABC):
    """Tries every candidate for every request and takes the one with the lowest score, with its neighbours.

    A trial optimises the value in that layer alone; all trials of a batch are one batched optimisation.

    Args:
        layers: Candidates; all layers of the model if None.
        steps: Steps of the trials; None takes the editor's own number.
        reach: Candidates whose value never moved, or whose final loss exceeds the lowest by more than this, are passed
            over; None passes over none.
        neighbours: Layers on either side of the chosen one that are edited as well.
        contexts: Number of the workspace's contexts that the trials use, the bare prompt first; None uses all.

    Raises:
        ValueError: If there is no candidate, or a number is out of range.
    """

    def __init__(
        self,
        layers: list[int] | None,
        steps: int | None,
        reach: float | None,
        neighbours: int = 0,
        contexts: int | None = None,
    ) -> None:
        name = type(self).__name__
        if layers is not None and not layers:
            raise ValueError(f"{name} needs at least one candidate layer.")
        if neighbours < 0 or (steps is not None and steps < 1) or (contexts is not None and contexts < 1):
            raise ValueError(
                f"{name} needs steps, contexts >= 1 and neighbours >= 0, not {steps}, {contexts} and {neighbours}."
            )
        if reach is not None and reach < 0:
            raise ValueError(f"`reach` is a difference of losses and cannot be negative ({reach}).")
        self.layers = None if layers is None else sorted(set(layers))
        self.steps, self.reach, self.neighbours, self.contexts = steps, reach, neighbours, contexts

    def check(self, values: ValueOptimizer) -> None:
        """Refuses values of blocks, which say nothing of a single layer's weight."""
        if values.site != "mlp":
            raise ValueError(f"{type(self).__name__} needs values of `site: mlp`: it scores each layer by its weight.")

    def candidates(self, architecture: Architecture) -> list[int]:
        """The candidates and their neighbours."""
        return sorted({layer for c in self._centers(architecture) for layer in self._around(c, len(architecture))})

    @abstractmethod
    def key_averages(self, average: KeyAverage, value_average: KeyAverage | None) -> list[KeyAverage]:
        """Averages of the keys that `score` is given; the arguments are those of `choose`."""

    @abstractmethod
    def score(self, site: EditedWeight, keys: Sequence[Tensor], target: Tensor) -> float:
        """How little a layer suits one request.

        Args:
            site: The layer.
            keys: ``(p, 1)`` for each of `key_averages`.
            target: The optimised value ``(d,)``.
        """

    def choose(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        values: ValueOptimizer,
        average: KeyAverage,
        value_average: KeyAverage | None = None,
    ) -> list[Choice]:
        """The candidate with the lowest score for every request, with its neighbours."""
        tried = self.shortlist(workspace, requests, values, value_average or average)
        centers = sorted(set().union(*tried))
        problems = [ValueProblem(i, (layer,)) for i, layers in enumerate(tried) for layer in layers]
        contexts = None if self.contexts is None else workspace.contexts[: self.contexts]
        found = values.optimise(
            workspace, requests, problems, value_average or average, steps=self.steps, contexts=contexts
        )
        averages = self.key_averages(average, value_average)
        keys = [compute_keys(workspace, requests, centers, each) for each in averages]
        scores: list[dict[int, float]] = [{} for _ in requests]
        losses: list[dict[int, float]] = [{} for _ in requests]
        for trial, target, loss in zip(found.problems, found.targets, found.loss, strict=True):
            i, layer = trial.request, trial.layers[0]
            own = [each[layer][:, i : i + 1] for each in keys]
            scores[i][layer] = self.score(workspace.site(layer), own, target[layer])
            losses[i][layer] = loss
        best = [min(_in_reach(lost, s, self.reach), key=s.__getitem__) for lost, s in zip(losses, scores, strict=True)]
        n = len(workspace.architecture)
        return [Choice(self._around(layer, n), layer, s) for layer, s in zip(best, scores, strict=True)]

    def shortlist(
        self, workspace: Workspace, requests: Sequence[EditRequest], values: ValueOptimizer, average: KeyAverage
    ) -> list[list[int]]:
        """The candidates to try for each request: all of them."""
        return [self._centers(workspace.architecture)] * len(requests)

    def _centers(self, architecture: Architecture) -> list[int]:
        if self.layers is None:
            return list(range(len(architecture)))
        architecture.check(self.layers)
        return self.layers

    def _around(self, center: int, n: int) -> tuple[int, ...]:
        return tuple(range(max(0, center - self.neighbours), min(n, center + self.neighbours + 1)))


class ActivationSelection(TriedLayers):
    """MOSE's selection by activation (Eq. 21, 22), with the neighbours of the chosen layer.

    ``l* = argmin_l ‖V^l − W^l K^l‖ / (‖W^l‖₂ · ‖k^l‖₂)``: the layer whose output has to change least, relative to how
    strongly it reacts to the request. The paper divides by the vector ``σ(x W_fc)``, which gives no single number; its
    norm, which Eq. 21 uses, is taken.

    The score sees the size of the change, not whether it brings the new answer. The last layer's output at the
    subject's last token reaches no later token, so nothing is optimised there, the change is zero and the published
    rule always takes that layer; norm-matched values fall short in other layers as well. ``reach`` therefore compares
    only candidates whose value moved at all and whose loss came near the lowest; None is the published rule.

    To optimise a value in every candidate takes most of an edit. With ``tries`` the scores are predicted first, from
    the gradient at every candidate's output, which one backward pass gives (`lit_edit.editors.prediction`).

    Args:
        layers: Candidates; all layers of the model if None.
        neighbours: Layers on either side of the chosen one that are edited as well (the paper: 1); 0 for none.
        steps: Steps of the candidates' optimisation.
        contexts: Number of the workspace's contexts that it uses, the bare prompt first.
        reach: Candidates whose final loss exceeds the lowest by more than this are passed over; None passes over none.
        tries: Candidates in which a value is optimised, those with the lowest predicted scores. 1 takes the lowest
            prediction and optimises none; None tries all, as the paper does.
    """

    def __init__(
        self,
        layers: list[int] | None = None,
        neighbours: int = 1,
        steps: int = 20,
        contexts: int = 1,
        reach: float | None = 0.25,
        tries: int | None = None,
    ) -> None:
        super().__init__(layers, steps, reach, neighbours, contexts)
        if tries is not None and tries < 1:
            raise ValueError(f"Layer selection tries at least one candidate, or all with null, not {tries}.")
        self.tries = tries

    def choose(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        values: ValueOptimizer,
        average: KeyAverage,
        value_average: KeyAverage | None = None,
    ) -> list[Choice]:
        """The candidate with the lowest score, tried or predicted, with its neighbours."""
        if self.tries != 1:
            return super().choose(workspace, requests, values, average, value_average)
        predicted = self._predicted(workspace, requests, values, value_average or average)
        n = len(workspace.architecture)
        return [Choice(self._around(c, n), c, scores) for scores in predicted for c in _lowest(scores, 1)]

    def shortlist(
        self, workspace: Workspace, requests: Sequence[EditRequest], values: ValueOptimizer, average: KeyAverage
    ) -> list[list[int]]:
        """All candidates, or those with the lowest predicted scores."""
        if self.tries is None or self.tries >= len(self._centers(workspace.architecture)):
            return super().shortlist(workspace, requests, values, average)
        return [_lowest(scores, self.tries) for scores in self._predicted(workspace, requests, values, average)]

    def _predicted(
        self, workspace: Workspace, requests: Sequence[EditRequest], values: ValueOptimizer, average: KeyAverage
    ) -> list[dict[int, float]]:
        contexts = workspace.contexts[: self.contexts]
        centers = self._centers(workspace.architecture)
        return predicted_scores(workspace, requests, values, average, centers, contexts)

    def key_averages(self, average: KeyAverage, value_average: KeyAverage | None) -> list[KeyAverage]:
        """The key at which the value's optimisation started."""
        return [value_average or average]

    def score(self, site: EditedWeight, keys: Sequence[Tensor], target: Tensor) -> float:
        """Eq. 22."""
        return selection_score(site.weight.float(), keys[0][:, 0], target, known_spectral_norm(site))


class WilKE(TriedLayers):
    """WilKE's choice (Hu et al. 2024): the layer whose weight the edit changes least, in proportion.

    For every candidate the update for the request alone is solved for, as if it were edited there; the one with the
    least ``‖ΔW‖_F / ‖W‖_F`` is edited, and no other.

    Args:
        layers: Candidates. Published: 0-23 (gpt2-xl, of 48), 0-6 (gpt-j, of 28); 5-10 for 7-8B models in O-Edit's
            re-run.
        solver: Solves for the updates that are compared; ROME if None, as in the paper. Keys of past edits are not
            given to it, and penalties of the values' optimisation (O-Edit's) are left out, too.
        steps: Steps of the candidates' optimisation; None takes the editor's own number, as the paper does.
        reach: As in `ActivationSelection`. None is the paper's rule, which looks at the size of the change alone: it
            needs candidates that leave out the last layers, where no change brings the answer.

    Raises:
        ValueError: If there is no candidate, or a number is out of range.
    """

    def __init__(
        self, layers: list[int], solver: Solver | None = None, steps: int | None = None, reach: float | None = None
    ) -> None:
        super().__init__(layers, steps, reach)
        self.solver = solver if solver is not None else ROME()

    @property
    def needs_covariance(self) -> bool:
        """As its solver says."""
        return self.solver.needs_covariance

    def kept_size(self, d: int, p: int) -> int:
        """What its solver keeps."""
        return self.solver.kept_size(d, p)

    def key_averages(self, average: KeyAverage, value_average: KeyAverage | None) -> list[KeyAverage]:
        """The editor's own key, and where its solver takes two the one of the values."""
        return [average, value_average] if value_average and self.solver.mixes_keys else [average]

    def score(self, site: EditedWeight, keys: Sequence[Tensor], target: Tensor) -> float:
        """``‖ΔW‖_F / ‖W‖_F`` of the update that this layer would take."""
        update = self.solver.solve(site, keys[0], target[:, None], *keys[1:])
        # The norm of factors needs no dense change; that of a rotation says nothing of the weight's change.
        size = update.norm if isinstance(update, LowRank) else float(update.delta(site.weight).norm())
        return size / site.cached("norm", site.exact.norm)


def _lowest(scores: dict[int, float], number: int) -> list[int]:
    """The layers with the lowest scores, in their order; of equal ones, such as infinite ones, the lower layer."""
    return sorted(sorted(scores, key=lambda layer: (scores[layer], layer))[:number])


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
        spectral_norm: Spectral norm of the weight, if known.
    """
    norm = float(torch.linalg.matrix_norm(weight, 2)) if spectral_norm is None else spectral_norm
    return float((target - weight @ key).norm() / (norm * key.norm()))
