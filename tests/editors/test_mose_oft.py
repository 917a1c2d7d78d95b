"""MOSE-OFT against a plain loop with explicit inverses on a copied model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.references import changed, hooks_left, make_workspace, matrix_of, projection_of, requests, tokens, weights
from helpers.runs import asked
from torch import Tensor

from lit_edit.editors import MoseOFT
from lit_edit.editors.mose_oft import cayley
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

families = pytest.mark.parametrize("family", ["gpt2", "llama"], indirect=True)


def reference_matrix(workspace: Workspace, batch: Sequence[EditRequest], layer: int, editor: MoseOFT) -> Tensor:
    """The turned matrix (d, p): the copy's projection reads its input through ``B``, written out block by block."""
    model = copy.deepcopy(workspace.model)
    projection, old = projection_of(model, layer), matrix_of(model, layer)
    p, n = old.shape[1], editor.blocks
    b = p // n
    blocks = [torch.zeros(b, b, dtype=old.dtype, requires_grad=True) for _ in range(n)]
    eye = torch.eye(b, dtype=old.dtype)

    def dense() -> Tensor:
        whole = torch.zeros(p, p, dtype=old.dtype)
        for i, x in enumerate(blocks):
            a = 0.5 * (x - x.T)
            whole[i * b : (i + 1) * b, i * b : (i + 1) * b] = (eye - a) @ torch.linalg.inv(eye + a)
        return whole

    projection.forward = lambda x: (
        x @ dense().T @ old.T + (0 if getattr(projection, "bias", None) is None else projection.bias)
    )
    adam = torch.optim.Adam(blocks, lr=editor.lr)
    for _ in range(editor.steps):
        adam.zero_grad()
        loss = torch.zeros((), dtype=old.dtype)
        for request in batch:
            ids, start, _ = tokens(workspace.tokenizer, "", request)
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            picked = torch.stack([log_p[t - 1, ids[t]] for t in range(start, len(ids))])
            loss = loss - picked.mean() / len(batch)
        loss.backward()
        adam.step()
        if editor.radius is not None:
            with torch.no_grad():
                for x in blocks:
                    limit = editor.radius * b * b / n**0.5
                    if x.norm() > limit:
                        x *= limit / x.norm()
    return (old @ dense()).detach()


def oft(layers: Sequence[int] = (2,), **settings: Any) -> MoseOFT:
    return MoseOFT(list(layers), **{"lr": 0.02, "steps": 4, "radius": None, **settings})


@families
@pytest.mark.parametrize("size", [1, 10])
@pytest.mark.parametrize("settings", [{}, {"radius": 2e-3}, {"blocks": 1}])
def test_it_turns_weights_as_a_plain_loop_does(tiny, size: int, settings: dict[str, Any]) -> None:
    workspace, editor, batch = make_workspace(tiny), oft(**settings), [*requests(), *asked(6)][-size:]
    wanted, old = reference_matrix(workspace, batch, 2, editor), matrix_of(workspace.model, 2)
    editor.apply(workspace, editor.plan(workspace, batch))
    assert float((wanted - old).norm() / old.norm()) > 0.01
    torch.testing.assert_close(matrix_of(workspace.model, 2), wanted, rtol=0, atol=1e-8)


@families
def test_edits_one_after_another_keep_singular_values_and_stay_within_their_blocks(tiny) -> None:
    workspace, editor = make_workspace(tiny, dtype=torch.float32), oft([1, 3], lr=0.05)
    spectra = {layer: torch.linalg.svdvals(matrix_of(workspace.model, layer).double()) for layer in editor.layers}
    before, turned = weights(workspace.model), 0.0
    for request in requests() * 3:
        plan = editor.plan(workspace, [request])
        for item in editor.apply(workspace, plan):
            q = item.update.state_dict()["turn"]
            b = workspace.architecture[item.layer].weight.shape[1] // 4
            assert q.shape == (4, b, b)
            torch.testing.assert_close(q.mT @ q, torch.eye(b, dtype=q.dtype).expand_as(q), rtol=0, atol=1e-12)
            assert (torch.linalg.slogdet(q).sign == 1).all()
            turned += item.relative_change
    assert turned > 1  # not for want of rotation
    assert changed(before, workspace.model) == {workspace.architecture[layer].name for layer in (1, 3)}
    for layer, spectrum in spectra.items():
        found = torch.linalg.svdvals(matrix_of(workspace.model, layer).double())
        torch.testing.assert_close(found, spectrum, rtol=0, atol=2e-6 * float(spectrum[0]))


@families
def test_the_plan_says_what_the_edited_model_then_does_and_changes_nothing(tiny) -> None:
    workspace, editor = make_workspace(tiny), oft([1, 2])
    workspace.model.requires_grad_(True)
    before = weights(workspace.model)
    plan = editor.plan(workspace, requests())
    assert changed(before, workspace.model) == set()
    assert hooks_left(workspace.model) == 0
    assert all(p.grad is None for p in workspace.model.parameters())
    untouched = oft([1, 2], lr=1e-12, steps=1).plan(workspace, requests())
    assert sum(plan.loss) < sum(untouched.loss)
    editor.apply(workspace, plan)
    after = oft([1, 2], lr=1e-12, steps=1).plan(workspace, requests())  # as good as not trained at all
    assert after.loss == pytest.approx(plan.loss, rel=1e-6)
    assert after.probability == pytest.approx(plan.probability, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_the_cayley_map(size: int) -> None:
    x = torch.randn(3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    q, eye = cayley(x), torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(q.mT @ q, eye.expand(3, -1, -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(q), torch.ones(3, dtype=torch.float64))
    assert torch.equal(cayley(torch.zeros(size, size)), torch.eye(size))
    torch.testing.assert_close(cayley(x.mT), q.mT)  # a skew matrix of the other sign turns back
    torch.testing.assert_close(cayley(2 * x + x.mT), q)  # a symmetric part is idle: here x + xᵀ is added
    a = (x - x.mT) / 2
    torch.testing.assert_close(torch.linalg.solve(eye + q, eye - q), a)  # its own inverse


def test_nothing_trained_is_the_identity(tiny) -> None:
    workspace, before = make_workspace(tiny), weights(tiny[0])
    editor = oft(radius=1e-300)  # shortened to nothing after every step
    plan = editor.plan(workspace, requests())
    (applied,) = editor.apply(workspace, plan)
    assert applied.relative_change == 0
    assert changed(before, workspace.model) == set()


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_blocks_that_do_not_divide_the_input_are_refused(tiny) -> None:
    workspace = make_workspace(tiny)
    with pytest.raises(ValueError, match="5 blocks do not divide the 32 inputs of layer 2's down-projection"):
        oft(blocks=5).editable_layers(workspace)
    assert oft(blocks=8).editable_layers(workspace) == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": []}, r"at least one, not \[\]"),
        ({"layers": [2, 2]}, "distinct"),
        ({"blocks": 0}, "blocks >= 1"),
        ({"lr": -1.0}, "lr > 0"),
        ({"steps": 0}, "steps >= 1"),
        ({"radius": 0.0}, "radius must be positive, not 0.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoseOFT(**{"layers": [2], **settings})
