"""Single edits by layer, method and λ, within a time budget: each written alone, judged, and taken back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from lit_edit.api import load_editor
from lit_edit.editors import LocateThenEdit
from lit_edit.editors.layers import FixedLayers
from lit_edit.evaluation.evaluate import Reference, figures
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest, Probe, plain

FIGURES = ("reliability", "generalization", "locality")
FLOOR = 0.5
"""What every figure has to reach for a model to count as editable."""
STRENGTHS = (0.1, 10.0, 0.01, 100.0)
"""λ to try, in units of the configuration's own."""
_STRENGTH = ("preservation", "ridge")  # what solvers call λ
_WIDTHS = (3, 6)  # layers written together
_MOST_LAYERS = 16  # tried one by one
_FEW = 2  # facts of a trial at least
# What part of the budget may be spent when a stage ends; the rest is for judging the best on other facts.
_SINGLE, _GROUPS, _LAMBDAS = 0.5, 0.75, 0.9


@dataclass(frozen=True)
class Setting:
    """One way to edit: a configuration's method in some layers.

    Attributes:
        method: Name of the configuration.
        layers: Indices of blocks, ascending.
        strength: λ; None as the configuration has it, or where the method has none.
    """

    method: str
    layers: tuple[int, ...]
    strength: float | None = None

    def __str__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        where = f"layer {first}" if first == last else f"layers {first}-{last}"
        return f"{self.method}, {where}" + ("" if self.strength is None else f", λ {self.strength:g}")


@dataclass(frozen=True)
class Found:
    """How single edits fared.

    Attributes:
        setting: How they were made.
        facts: Number of facts.
        figures: Of `FIGURES`, those that the facts have probes for.
        p_value: Mean probability of the new targets with the optimised values in place.
        seconds: Time it took.
        held_out: Whether no setting was chosen on these facts.
    """

    setting: Setting
    facts: int
    figures: dict[str, float]
    p_value: float
    seconds: float
    held_out: bool = False

    @property
    def score(self) -> float:
        """The harmonic mean of the figures: 0 if one of them is."""
        values = list(self.figures.values())
        return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)

    @property
    def editable(self) -> bool:
        """Whether every figure reaches `FLOOR`."""
        return min(self.figures.values()) >= FLOOR

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        setting = {"method": self.setting.method, "layers": list(self.setting.layers), "lambda": self.setting.strength}
        rest = {"facts": self.facts, "p_value": self.p_value, "seconds": self.seconds, "held_out": self.held_out}
        return {**setting, **self.figures, **rest}


@dataclass
class Clock:
    """A time budget.

    Args:
        budget: Seconds.
    """

    budget: float
    began: float = field(default_factory=lambda: time.monotonic())

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.began

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Does not count the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.began += time.monotonic() - began

    def allows(self, seconds: float, share: float = 1.0) -> bool:
        """Whether so much more stays within a share of the budget."""
        return self.spent + seconds <= share * self.budget


def editor_of(method: str) -> LocateThenEdit:
    """The editor of a configuration, if its layers can be searched for.

    Raises:
        ValueError: If it is not put together from layers, values and solver, or needs gradients over a corpus.
    """
    editor = load_editor(method)
    if not isinstance(editor, LocateThenEdit) or editor.needs_gradients:
        raise ValueError(
            f"locate searches layers of methods with keys, values and a solver, which {method} is not: take rome, "
            "memit, mose-key or the like."
        )
    return editor


def strength_of(editor: LocateThenEdit) -> tuple[str, float] | None:
    """What a solver calls its λ, and its value; None where it has none that counts."""
    if editor.solver.max_batch == 1:  # ROME: an equality, whatever C is scaled by
        return None
    found = [(name, float(getattr(editor.solver, name))) for name in _STRENGTH if hasattr(editor.solver, name)]
    return next((one for one in found if one[1] > 0), None)


def with_locality(requests: Sequence[EditRequest], number: int = 2) -> list[EditRequest]:
    """Requests with locality probes: those that have none are given the prompts of other facts."""
    found = []
    for i, request in enumerate(requests):
        others = [r for r in (*requests[i + 1 :], *requests[:i]) if plain(r.subject) != plain(request.subject)]
        probes = tuple(Probe("locality", other.prompt, other.target_true) for other in others[:number])
        has = bool(request.probes_of("locality"))
        found.append(request if has else replace(request, probes=(*request.probes, *probes)))
    return found


class Bench:
    """A workspace on which settings are tried.

    Args:
        workspace: Of the unedited model, with contexts, and key covariances of the candidates.
        methods: Names of configurations.
        reference: The unedited model's answers.
    """

    def __init__(self, workspace: Workspace, methods: Sequence[str], reference: Reference | None = None) -> None:
        self.workspace, self.reference = workspace, Reference() if reference is None else reference
        self.editors: Mapping[str, LocateThenEdit] = {method: editor_of(method) for method in methods}
        self._per_fact: dict[str, float] = {}

    def affordable(self, trials: Sequence[Setting], clock: Clock, share: float, most: int) -> int:
        """Number of facts on which each of some trials can be made within a share of the budget, at most ``most``.

        As many as make a figure, if a method has not been tried yet and nothing is known of what it costs.
        """
        methods = {setting.method for setting in trials}
        if not methods <= self._per_fact.keys():
            return _FEW if clock.allows(0, share) else 0
        each = sum(self._per_fact[setting.method] * _width(setting) for setting in trials)
        return min(most, int((share * clock.budget - clock.spent) / each))

    def measure(self, setting: Setting, requests: Sequence[EditRequest], held_out: bool = False) -> Found:
        """Single edits of some facts; the model is as before afterwards."""
        began = time.monotonic()
        editor = self.editors[setting.method]
        layers, named = editor.layers, strength_of(editor)
        editor.layers = FixedLayers(list(setting.layers))
        if named is not None and setting.strength is not None:
            setattr(editor.solver, named[0], setting.strength)
        try:
            results = list(editor.single_edits(self.workspace, requests, self.reference))
        finally:
            editor.layers = layers
            if named is not None:
                setattr(editor.solver, *named)
        values = figures([outcome for _, outcome in results], ways=["exact_match"])
        seconds = time.monotonic() - began
        self._per_fact[setting.method] = seconds / len(requests) / _width(setting)
        return Found(
            setting,
            len(requests),
            {name: values[name] for name in FIGURES if name in values},
            sum(plan.probability[0] for plan, _ in results) / len(results),
            seconds,
            held_out,
        )


def candidates(n_layers: int, first: int, most: int = _MOST_LAYERS) -> list[int]:
    """Layers to try one by one, those near ``first`` before others.

    The last layer is left out where there are others: what it writes at the subject reaches no later token. Of many
    layers some are left out, evenly, but none of those around ``first``.

    Args:
        n_layers: Number of layers.
        first: Where to begin, such as the layer that tracing found.
        most: Number of layers at most.
    """
    layers = list(range(max(1, n_layers - 1)))
    by_distance = sorted(layers, key=lambda layer: (abs(layer - first), layer))
    if len(layers) <= most:
        return by_distance
    step = len(layers) / (most // 2)
    spread = {int((i + 0.5) * step) for i in range(most // 2)}
    near = set(by_distance[: most - len(spread)])
    return [layer for layer in by_distance if layer in near | spread]


def around(center: int, width: int, n_layers: int) -> tuple[int, ...]:
    """Neighbouring layers around one, inside the model and without its last layer where there is room."""
    inside = max(1, n_layers - 1)
    first = min(max(0, center - (width - 1) // 2), max(0, inside - width))
    return tuple(range(first, min(first + width, inside)))


def search(
    bench: Bench, layers: Sequence[int], facts: Sequence[EditRequest], clock: Clock, skipped: list[Setting]
) -> Iterator[Found]:
    """Tries settings: layers one by one, then neighbours together, then λ; each stage on as many facts as time allows.

    Args:
        bench: Where to try.
        layers: Candidates, in the order to try them.
        facts: Those to judge by: half of them at most for single layers.
        clock: The budget.
        skipped: Filled with what there was no time for.
    """
    n_layers = len(bench.workspace.architecture)
    tried: list[Found] = []

    def stage(trials: list[Setting], share: float, most: int) -> Iterator[Found]:
        while trials:
            n = bench.affordable(trials, clock, share, most)
            if n < _FEW:  # fewer facts say nothing: less settings then
                n = bench.affordable(trials[:1], clock, share, _FEW)
            if n < _FEW:
                break
            setting = trials.pop(0)
            if not any(found.setting == setting and found.facts >= n for found in tried):
                tried.append(bench.measure(setting, facts[:n]))
                yield tried[-1]
        skipped.extend(trials)

    if layers:  # what a trial of each method costs
        yield from stage([Setting(method, (layers[0],)) for method in bench.editors], _SINGLE, _FEW)
    singles = [Setting(method, (layer,)) for layer in layers for method in bench.editors]
    yield from stage(singles, _SINGLE, max(_FEW, len(facts) // 2))
    groups = []
    for found in finalists(tried, len(bench.editors)):
        wider = [around(found.layers[0], width, n_layers) for width in _WIDTHS]
        allowed = [group for group in wider if len(group) > 1 and set(group) <= set(layers)]
        groups += [found, *(Setting(found.method, group) for group in dict.fromkeys(allowed))]
    yield from stage(groups, _GROUPS, len(facts))
    strengths = []
    for setting in finalists(tried, len(bench.editors)):
        named = strength_of(bench.editors[setting.method])
        if named is not None:
            strengths += [replace(setting, strength=named[1] * factor) for factor in STRENGTHS]
    yield from stage(strengths, _LAMBDAS, len(facts))


def judge(
    bench: Bench, settings: Sequence[Setting], facts: Sequence[EditRequest], clock: Clock, held_out: bool
) -> Iterator[Found]:
    """Tries the best settings once more, on as many facts as time allows; never on fewer than make a figure."""
    for i, setting in enumerate(settings):
        n = max(_FEW, bench.affordable(settings[i:], clock, 1.0, len(facts)))
        yield bench.measure(setting, facts[:n], held_out)


def _width(setting: Setting) -> float:
    """What several layers cost, against one."""
    return 1 + 0.2 * (len(setting.layers) - 1)


def _rank(found: Found) -> tuple[float, float, float]:
    """Better settings rank higher, of equal ones those seen on more facts, or whose values come nearer to the target.

    A score over few facts is taken for a little less than it says.
    """
    return found.score * found.facts / (found.facts + 1), sum(found.figures.values()), found.p_value


def finalists(tried: Sequence[Found], number: int = 2) -> list[Setting]:
    """The best settings, one a method."""
    chosen: dict[str, Setting] = {}
    for found in sorted(tried, key=_rank, reverse=True):
        chosen.setdefault(found.setting.method, found.setting)
    return list(chosen.values())[:number]


def winner(judged: Sequence[Found]) -> Found:
    """The best of those judged last."""
    return max(judged, key=_rank)
