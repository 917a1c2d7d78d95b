from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
from helpers.references import (
    CONTEXTS,
    block_of,
    changed,
    hooked,
    hooks_left,
    make_workspace,
    matrix_of,
    projection_of,
    reference_block,
    reference_keys,
    requests,
    target_log_probabilities,
    tokens,
    weights,
)
from helpers.sites import normal
from torch import Tensor, nn

from lit_edit.algebra.updates import Additive
from lit_edit.editors.keys import MeanKey, TypeMeanKey
from lit_edit.editors.values import (
    EAC,
    Constraint,
    NormClamp,
    NormMatched,
    ValueOptimizer,
    ValueProblem,
    Values,
    block_outputs,
)
from lit_edit.editors.values.optimizer import parts_of_a_batch
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

Site = Literal["mlp", "block"]
KINDS: dict[str, tuple[Site, Callable[[], Constraint]]] = {
    "mlp, clamped": ("mlp", lambda: NormClamp(1.5)),
    "mlp, matched": ("mlp", NormMatched),
    "block, clamped": ("block", lambda: NormClamp(1.5)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
# Where nothing depends on how a family stores its parts.
in_one_family = pytest.mark.parametrize("family", ["llama"])
# Nothing reads the last layer's output before the prompt's last token: only a subject that ends its prompt gets there.
PROBLEMS = [
    ValueProblem(0, (1,)),
    ValueProblem(1, (0, 1, 2)),
    ValueProblem(3, (3,)),
    ValueProblem(0, (2,)),
    ValueProblem(2, (1, 2)),
]


def optimizer(kind: str, **settings: Any) -> ValueOptimizer:
    site, constraint = KINDS[kind]
    return ValueOptimizer(
        site, constraint(), **{"lr": 0.1, "steps": 4, "stop_loss": 0.0, "weight_decay": 0.01, **settings}
    )


def optimise(workspace: Workspace, values: ValueOptimizer, problems: Sequence[ValueProblem] = PROBLEMS) -> Values:
    return values.optimise(workspace, requests(), problems, MeanKey())


def each_target(found: Values) -> Iterator[tuple[ValueProblem, int, Tensor]]:
    for problem, targets in zip(found.problems, found.targets, strict=True):
        for layer, value in targets.items():
            yield problem, layer, value


def chosen(found: Values, order: Sequence[int]) -> Values:
    return Values(*([field[i] for i in order] for field in vars(found).values()))


def assert_close(one: Values, other: Values, tolerance: float) -> None:
    assert one.steps == other.steps
    assert one.loss == pytest.approx(other.loss, rel=tolerance, abs=1e-6)
    assert one.probability == pytest.approx(other.probability, rel=10 * tolerance)
    torch.testing.assert_close(one.targets, other.targets, rtol=tolerance, atol=tolerance)


def start_of(workspace: Workspace, kind: str, problem: ValueProblem, layer: int) -> Tensor:
    """v0 in float64: W k of the mean key, or the block's output under the bare prompt."""
    request = requests()[problem.request]
    if kind.startswith("block"):
        return reference_block(workspace, request, layer)
    return matrix_of(workspace.model, layer) @ reference_keys(workspace, request, layer).mean(0)


def with_values(
    workspace: Workspace, kind: str, values: dict[int, Tensor], starts: dict[int, Tensor], at: int
) -> list[tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]]:
    """Hooks that put values in place at one position of a single text."""
    pairs: list[tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]] = []
    for layer, value in values.items():
        projection = projection_of(workspace.model, layer)
        bias = 0 if projection.bias is None else projection.bias

        def put(
            _: Tensor, output: Tensor, value: Tensor = value, start: Tensor = starts[layer], bias: Any = bias
        ) -> Tensor:
            output = output.clone()
            output[0, at] = value + bias if kind == "mlp, matched" else output[0, at] + value - start
            return output

        pairs.append((block_of(workspace.model, layer) if kind.startswith("block") else projection, put))
    return pairs


@torch.no_grad()
def put_out(workspace: Workspace, kind: str, problem: ValueProblem, layer: int) -> Tensor:
    """v0 as the changed module puts it out, bias included."""
    bias = workspace.architecture[layer].projection.bias if kind == "mlp, clamped" else None
    start = start_of(workspace, kind, problem, layer)
    return start if bias is None else start + bias.double()


def reference_loss(
    workspace: Workspace,
    kind: str,
    problem: ValueProblem,
    values: dict[int, Tensor],
    kl_factor: float,
    weight_decay: float,
) -> tuple[float, float]:
    """(loss, p(target) under the bare prompt) with the values put in place by hand, one text after another."""
    request = requests()[problem.request]
    starts = {layer: start_of(workspace, kind, problem, layer) for layer in problem.layers}
    values = {layer: value.double() for layer, value in values.items()}
    nll, probability = [], None
    for context in workspace.contexts:
        ids, start, last = tokens(workspace.tokenizer, context[:-2], request)
        with hooked(with_values(workspace, kind, values, starts, last)):
            log_p = target_log_probabilities(workspace.model, ids, start)
        nll.append(-log_p.mean())
        probability = float(log_p.sum().exp()) if probability is None else probability
    alone = EditRequest("", f"{request.subject} is a", request.subject, "-")
    ids, _, last = tokens(workspace.tokenizer, "", alone, target=False)
    text = torch.tensor([ids])
    before = workspace.model(input_ids=text).logits[0, -1].log_softmax(-1)
    with hooked(with_values(workspace, kind, values, starts, last)):
        now = workspace.model(input_ids=text).logits[0, -1].log_softmax(-1)
    divergence = (now.exp() * (now - before)).sum()
    decay = sum(
        (values[layer] - starts[layer]).norm() / put_out(workspace, kind, problem, layer).norm() ** 2
        for layer in problem.layers
    )
    assert probability is not None
    return float(torch.stack(nll).mean() + kl_factor * divergence + weight_decay * decay), probability


@each_kind
def test_a_batch_in_any_order_is_solved_as_each_problem_on_its_own(tiny, kind: str) -> None:
    workspace, values = make_workspace(tiny), optimizer(kind)
    values.stop_loss = sorted(optimise(workspace, values).loss)[2] + 1e-3  # some reach it and some do not
    together = optimise(workspace, values)
    assert len(set(together.steps)) > 1
    for i, problem in enumerate(PROBLEMS):
        assert_close(optimise(workspace, values, [problem]), chosen(together, [i]), 1e-6)
    turned = [ValueProblem(3 - p.request, p.layers) for p in reversed(PROBLEMS)]
    backward = values.optimise(workspace, requests()[::-1], turned, MeanKey())
    assert_close(chosen(backward, range(len(PROBLEMS))[::-1]), together, 1e-6)


@each_kind
def test_the_loss_reported_is_that_of_the_value_put_in_place_by_hand(tiny, kind: str) -> None:
    workspace = make_workspace(tiny)
    found = optimise(workspace, optimizer(kind, kl_factor=0.5, weight_decay=0.7, steps=3))
    assert found.steps == [3] * len(PROBLEMS)
    for i, problem in enumerate(PROBLEMS):
        loss, probability = reference_loss(workspace, kind, problem, found.targets[i], 0.5, 0.7)
        assert found.loss[i] == pytest.approx(loss, rel=1e-5)
        assert found.probability[i] == pytest.approx(probability, rel=1e-4)


@each_kind
def test_the_loss_falls_the_target_becomes_likelier_and_the_model_stays_as_it_was(tiny, kind: str) -> None:
    workspace = make_workspace(tiny)
    workspace.model.requires_grad_(True)
    before = weights(workspace.model)
    untouched = optimise(workspace, optimizer(kind, stop_loss=1e9))
    found = optimise(workspace, optimizer(kind, steps=12))
    assert untouched.steps == [0] * len(PROBLEMS)
    for i in range(len(PROBLEMS)):
        assert found.loss[i] < untouched.loss[i] - 0.05
        assert found.probability[i] > 1.1 * untouched.probability[i]
    for problem, layer, value in each_target(untouched):  # done at once: the present output
        torch.testing.assert_close(value.double(), start_of(workspace, kind, problem, layer), rtol=1e-5, atol=1e-5)
    assert changed(before, workspace.model) == set()
    assert hooks_left(workspace.model) == 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in workspace.model.parameters())


@each_kind
def test_a_problem_that_is_done_stays_as_it_is_while_others_go_on(tiny, kind: str) -> None:
    workspace = make_workspace(tiny)
    start = optimise(workspace, optimizer(kind, stop_loss=1e9))
    bound = sorted(start.loss)[1] + 1e-4  # two are below it from the start
    found = optimise(workspace, optimizer(kind, stop_loss=bound, steps=4))
    at_once = [i for i, loss in enumerate(start.loss) if loss < bound]
    assert len(at_once) == 2
    for i in range(len(PROBLEMS)):
        assert (found.steps[i] == 0) == (i in at_once)
        for layer, value in found.targets[i].items():
            assert torch.equal(value, start.targets[i][layer]) == (i in at_once)


@each_kind
@in_one_family
def test_a_batch_worked_through_in_parts_gives_the_same(tiny, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, values = make_workspace(tiny), optimizer(kind)
    whole = optimise(workspace, values)
    rows: list[int] = []
    collate = type(workspace.prompter).collate

    def counting(self: Any, taken: Any, device: Any) -> Any:
        rows.append(len(taken))
        return collate(self, taken, device)

    monkeypatch.setattr(type(workspace.prompter), "collate", counting)
    number = len(workspace.contexts) + 1
    for most in (1, 2 * number):
        values.max_rows = most
        rows.clear()
        parts = optimise(workspace, values)
        assert max(rows) <= max(most, number)
        assert parts.problems == whole.problems
        assert_close(parts, whole, 1e-5)
    with pytest.raises(ValueError, match="max_rows of at least 1, not 0"):
        optimizer(kind, max_rows=0)


def padded(sizes: list[tuple[int, int]], parts: list[list[int]], of_a_pass: int) -> int:
    return sum(sum(sizes[i][0] for i in part) * max(sizes[i][1] for i in part) + of_a_pass for part in parts)


def divisions(order: list[int]) -> Iterator[list[list[int]]]:
    """Every way to cut a list into consecutive parts."""
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        parts = [[order[0]]]
        for i, apart in zip(order[1:], cuts, strict=True):
            parts.append([i]) if apart else parts[-1].append(i)
        yield parts


@pytest.mark.parametrize("of_a_pass", [0, 10, 40, 10_000])
@pytest.mark.parametrize("most", [1, 12, 100])
def test_texts_of_about_one_width_share_passes(most: int, of_a_pass: int) -> None:
    sizes = [(5, 9), (2, 3), (6, 8), (6, 20), (5, 3), (9, 4), (3, 21), (20, 7)]
    parts = parts_of_a_batch(sizes, most, of_a_pass)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert all(len(part) == 1 or sum(sizes[i][0] for i in part) <= most for part in parts)
    allowed = [
        division
        for division in divisions(sorted(range(len(sizes)), key=lambda i: sizes[i][1]))
        if all(len(part) == 1 or sum(sizes[i][0] for i in part) <= most for part in division)
    ]
    assert padded(sizes, parts, of_a_pass) == min(padded(sizes, division, of_a_pass) for division in allowed)


@pytest.mark.parametrize(("kind", "schedule"), [*((kind, None) for kind in KINDS), ("mlp, clamped", EAC(50.0, 0.0))])
@in_one_family
def test_looking_rarely_which_problems_are_done_changes_nothing(
    tiny, kind: str, schedule: EAC | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, values = make_workspace(tiny), optimizer(kind, steps=9, schedule=schedule)
    values.stop_loss = sorted(optimise(workspace, values).loss)[2] + 1e-3
    often = optimise(workspace, values)
    assert len(set(often.steps)) > 1
    monkeypatch.setattr("lit_edit.editors.values.optimizer._look_every", lambda _: 4)
    assert_close(optimise(workspace, values), often, 1e-4)


@pytest.mark.parametrize("kind", ["mlp, clamped", "block, clamped"])
@pytest.mark.parametrize("factor", [0.05, 0.4])
def test_clamped_values_stay_within_the_factor_and_use_it(tiny, kind: str, factor: float) -> None:
    workspace, values = make_workspace(tiny), optimizer(kind, lr=0.5, weight_decay=0.0)
    values.constraint = NormClamp(factor)
    shares = []
    for problem, layer, value in each_target(optimise(workspace, values)):
        start, length = start_of(workspace, kind, problem, layer), put_out(workspace, kind, problem, layer).norm()
        shares.append(float((value.double() - start).norm() / length) / factor)
    assert max(shares) <= 1 + 1e-4
    assert max(shares) > 0.999


def test_matched_values_are_as_long_as_the_present_output(tiny) -> None:
    workspace = make_workspace(tiny)
    for problem, layer, value in each_target(optimise(workspace, optimizer("mlp, matched", lr=0.5))):
        start = start_of(workspace, "mlp", problem, layer)
        assert float(value.double().norm()) == pytest.approx(float(start.norm()), rel=1e-6)
        assert float((value - start).norm() / start.norm()) > 0.1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clamping_shortens_what_is_too_long_and_nothing_else(scale: float) -> None:
    start, delta = (scale * normal(50, 8, seed=seed) for seed in range(2))
    delta = delta * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    delta[0] = 0
    clamp = NormClamp(0.7)
    moved = clamp.project(start, delta)
    limit = 0.7 * start.norm(dim=-1)
    assert (moved.norm(dim=-1) <= limit * (1 + 1e-12)).all()
    inside = delta.norm(dim=-1) <= limit
    assert 10 < inside.sum() < 40
    torch.testing.assert_close(moved[inside], delta[inside], rtol=0, atol=0)
    torch.testing.assert_close(moved[~inside].norm(dim=-1), limit[~inside])
    cosine = nn.functional.cosine_similarity(moved[~inside], delta[~inside])
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(clamp.project(start, moved), moved)
    torch.testing.assert_close(clamp.value(start, moved), start + moved, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_matching_puts_values_on_the_sphere_and_leaves_them_there(scale: float) -> None:
    start, delta = (scale * normal(50, 8, seed=seed) for seed in range(2))
    sphere = NormMatched()
    value = sphere.value(start, delta)
    torch.testing.assert_close(value.norm(dim=-1), start.norm(dim=-1))
    cosine = nn.functional.cosine_similarity(value, start + delta)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(sphere.value(start, sphere.project(start, delta)), value)
    torch.testing.assert_close(sphere.value(start, torch.zeros_like(start)), start)


@in_one_family
def test_hooks_are_gone_after_a_failure(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(start: Tensor, delta: Tensor) -> Tensor:
        raise KeyError("on purpose")

    workspace, matched = make_workspace(tiny), optimizer("mlp, matched")
    monkeypatch.setattr(matched.constraint, "value", fail)
    with pytest.raises(KeyError, match="on purpose"):
        optimise(workspace, matched)
    assert hooks_left(workspace.model) == 0
    assert optimise(workspace, optimizer("mlp, clamped"), PROBLEMS[:1]).steps == [4]


@pytest.mark.parametrize("kind", ["mlp, clamped", "block, clamped"])
@pytest.mark.parametrize("unit", ["absolute", "relative"])
def test_the_first_step_is_as_long_as_the_learning_rate_says(tiny, kind: str, unit: str) -> None:
    # Adam's first step moves every coordinate by lr in its unit, whatever the gradient.
    workspace = make_workspace(tiny)
    found = optimise(workspace, optimizer(kind, lr=0.02, lr_unit=unit, steps=1))
    for problem, layer, value in each_target(found):
        length = float(put_out(workspace, "mlp, clamped", problem, layer).norm())  # of the edited weight's output
        size = float((value.double() - start_of(workspace, kind, problem, layer)).norm())
        assert size == pytest.approx(0.02 * (32**0.5 if unit == "absolute" else length), rel=1e-3)


@pytest.mark.parametrize("kind", ["mlp, clamped", "block, clamped", "mlp, matched"])
def test_a_relative_step_stays_as_long_however_the_weight_was_edited(tiny, kind: str) -> None:
    """With the weight as edited, steps would grow with the damage that they do."""
    workspace, lengths = make_workspace(tiny), []
    for factor in (1.0, 30.0):
        site = workspace.site(1)
        site.write(Additive((factor - 1) * site.weight.double()))
        start = start_of(workspace, kind, PROBLEMS[0], 1)
        found = optimise(workspace, optimizer(kind, lr=1e-3, lr_unit="relative", steps=1, kl_factor=0.0), PROBLEMS[:1])
        lengths.append(float((found.targets[0][1].double() - start).norm()))
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)  # on a larger sphere a chord is another one


@in_one_family
def test_relative_steps_are_measured_in_the_root_mean_square_of_the_start(tiny) -> None:
    # On the sphere, an lr of ‖v0‖ / √d times as much is the same optimisation, but for Adam's epsilon.
    workspace = make_workspace(tiny)
    for problem in (PROBLEMS[0], PROBLEMS[2]):
        (layer,) = problem.layers
        unit = float(start_of(workspace, "mlp", problem, layer).norm()) / 32**0.5
        relative = optimise(workspace, optimizer("mlp, matched", lr_unit="relative"), [problem])
        absolute = optimise(workspace, optimizer("mlp, matched", lr=0.1 * unit), [problem])
        torch.testing.assert_close(relative.targets[0][layer], absolute.targets[0][layer], rtol=1e-3, atol=1e-4)


def test_the_average_of_keys_fixes_the_starting_point(tiny) -> None:
    workspace, values = make_workspace(tiny), optimizer("mlp, clamped", stop_loss=1e9)
    keys = reference_keys(workspace, requests()[0], 1)
    weighted = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64) @ keys
    for average, key in ((MeanKey(), keys.mean(0)), (TypeMeanKey(), weighted)):
        found = values.optimise(workspace, requests(), PROBLEMS[:1], average)
        expected = matrix_of(workspace.model, 1) @ key
        torch.testing.assert_close(found.targets[0][1].double(), expected, rtol=1e-5, atol=1e-5)


@in_one_family
def test_steps_and_contexts_of_a_call_replace_the_objects_own(tiny) -> None:
    workspace, values = make_workspace(tiny), optimizer("block, clamped")
    found = values.optimise(workspace, requests(), PROBLEMS, MeanKey(), steps=2, contexts=CONTEXTS[:1])
    assert found.steps == [2] * len(PROBLEMS)
    bare = make_workspace((workspace.model, workspace.tokenizer), CONTEXTS[:1])
    expected = optimise(bare, optimizer("block, clamped", steps=2))
    assert found.loss == expected.loss
    assert found.loss != values.optimise(workspace, requests(), PROBLEMS, MeanKey(), steps=2).loss


@torch.no_grad()
def test_block_outputs_are_read_at_the_subject_of_the_bare_prompt(tiny) -> None:
    workspace = make_workspace(tiny)
    found = block_outputs(workspace, requests(), [0, 3])
    for layer in (0, 3):
        expected = torch.stack([reference_block(workspace, r, layer) for r in requests()], dim=1)
        torch.testing.assert_close(found[layer].double(), expected, rtol=1e-5, atol=1e-5)
    assert hooks_left(workspace.model) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": "block", "constraint": NormMatched()}, "Norm-matched values need `site: mlp`"),
        ({"site": "attention"}, "site of values is 'mlp' or 'block', not 'attention'"),
        ({"lr_unit": "percent"}, "unit of lr is 'absolute' or 'relative', not 'percent'"),
        *(
            (setting, "need lr > 0, steps >= 1, kl_factor >= 0 and weight_decay >= 0")
            for setting in (
                {"lr": 0.0},
                {"lr": float("nan")},
                {"steps": 0},
                {"kl_factor": -0.1},
                {"weight_decay": -1e-9},
            )
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValueOptimizer(**settings)
    for factor in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clamp factor must be positive"):
            NormClamp(factor)
