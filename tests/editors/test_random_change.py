"""Random changes of a chosen size: what MOSE's Fig. 2 is about, in sequences of them."""

from __future__ import annotations

import pytest
import torch
from helpers.sessions import FACTS, contents, session, write
from helpers.sites import normal, site_of

from lit_edit.editors import RandomChange


@pytest.mark.parametrize("form", ["orthogonal", "additive"])
@pytest.mark.parametrize("size", [0.1, 1.0, 1.9])
@pytest.mark.parametrize("d", [16, 13])
def test_a_change_has_the_size_it_was_given(form: str, size: float, d: int) -> None:
    site = site_of(normal(d, 24))
    if d % 2 and size > 1.5 and form == "orthogonal":
        size = 1.5  # the direction that stays takes its part
    update = RandomChange([3], form, size).change(site)  # type: ignore[arg-type]
    assert float(update.delta(site.weight).norm()) == pytest.approx(size * float(site.original.norm()), rel=1e-9)


def test_rotations_keep_the_spectrum_and_additions_of_equal_size_do_not() -> None:
    """After 60 changes: norm and condition number."""
    original = normal(16, 24)
    before = torch.linalg.svdvals(original)
    after = {}
    for form, size in (("orthogonal", 0.2), ("orthogonal", None), ("additive", 0.2)):
        site, editor = site_of(original), RandomChange([3], form, size)  # type: ignore[arg-type]
        for _ in range(60):
            site.write(editor.change(site))
            site.count(1)
        after[form, size] = torch.linalg.svdvals(site.weight)
    torch.testing.assert_close(after["orthogonal", 0.2], before, rtol=1e-9, atol=0)
    torch.testing.assert_close(after["orthogonal", None], before, rtol=1e-9, atol=0)
    # Independent additions add up as squares: ‖W‖² (1 + n size²).
    assert float(after["additive", 0.2].norm()) == pytest.approx(float(before.norm()) * (1 + 60 * 0.04) ** 0.5, rel=0.1)


def test_a_matrix_without_a_size_is_any_orthogonal_one() -> None:
    site = site_of(normal(12, 20))
    drawn = [RandomChange([3], size=None, seed=seed).change(site).delta(torch.eye(12)) for seed in range(200)]
    turns = torch.stack(drawn) + torch.eye(12)
    torch.testing.assert_close(turns.mT @ turns, torch.eye(12).expand_as(turns).double(), atol=1e-9, rtol=0)
    assert float(turns.mean(dim=0).abs().max()) < 0.12  # no direction is preferred: 1 / √(12 · 200) = .02 each


def test_changes_repeat_by_seed_layer_and_count() -> None:
    def delta(layer: int = 3, edits: int = 0, seed: int = 0) -> torch.Tensor:
        site = site_of(normal(8, 10), layer=layer)
        site.count(edits)
        return RandomChange([3], seed=seed).change(site).delta(site.weight)

    assert torch.equal(delta(), delta())
    for other in (delta(layer=4), delta(edits=1), delta(seed=1)):
        assert not torch.allclose(delta(), other)


def test_a_session_changes_and_takes_back() -> None:
    opened = session(RandomChange([1, 2], size=0.3))
    start = contents(opened)
    write(opened, FACTS[:3], batch_size=2)
    assert [edit.layers for edit in opened.journal] == [[1, 2]] * 3
    assert [edit.change["1"] for edit in opened.journal] == pytest.approx([0.3] * 3, rel=1e-5)
    assert opened.editor.describe() == "random orthogonal change"
    opened.undo(to=0)
    for layer, weight in contents(opened).items():
        assert torch.equal(weight, start[layer])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "both"}, "orthogonal or additive, not 'both'"),
        ({"size": 0.0}, "above 0 and at most 1.9, not 0.0"),
        ({"layers": [1, 1]}, r"distinct layers and at least one, not \[1, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomChange(**{"layers": [1], **settings})  # type: ignore[arg-type]
