"""O-Edit's controls: updates made smaller without regard to what they should not disturb."""

from __future__ import annotations

import pytest
import torch
from helpers.sites import edited_site, normal

from lit_edit.algebra.updates import Additive, LowRank, Update
from lit_edit.editors.restraints import OEditPlus, RandomDeletion, RandomSubspace, Restraint, Scaling, UpdateKind

D, P = 16, 24


def updates() -> list[Update]:
    return [LowRank(normal(D, 2, seed=5), normal(2, P, seed=6)), Additive(normal(D, P, seed=7))]


@pytest.mark.parametrize("update", updates(), ids=["low rank", "dense"])
def test_scaling_is_a_multiple(update: Update) -> None:
    site = edited_site()
    restrained = Scaling(0.25).restrain(update, site)
    torch.testing.assert_close(restrained.delta(site.weight), 0.25 * update.delta(site.weight))
    assert isinstance(restrained, type(update))


@pytest.mark.parametrize("update", updates(), ids=["low rank", "dense"])
def test_deletion_keeps_so_many_entries_as_they_are(update: Update) -> None:
    site = edited_site()
    change, kept = update.delta(site.weight), RandomDeletion(0.3).restrain(update, site).delta(site.weight)
    left = kept != 0
    assert int(left.sum()) == round(0.3 * D * P)
    assert torch.equal(kept[left], change[left])
    assert RandomDeletion(1.0).restrain(update, site) is update
    again = RandomDeletion(0.3).restrain(update, edited_site()).delta(site.weight)
    assert torch.equal(again, kept)
    for other in (
        RandomDeletion(0.3, seed=1).restrain(update, site),
        RandomDeletion(0.3).restrain(update, edited_site(4)),
    ):
        assert not torch.equal(other.delta(site.weight) != 0, left)  # another seed, the next edit


@pytest.mark.parametrize("update", updates(), ids=["low rank", "dense"])
def test_a_random_subspace_is_left_out_and_grows(update: Update) -> None:
    site, restraint = edited_site(edits=2, pending=1), RandomSubspace(share=2.0)
    basis = restraint.basis(site)
    assert basis.shape == (D, 6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    change = restraint.restrain(update, site).delta(site.weight)
    torch.testing.assert_close(basis.T @ change, torch.zeros(6, P, dtype=torch.float64), atol=1e-12, rtol=0)
    expected = update.delta(site.weight)
    torch.testing.assert_close(change, expected - basis @ (basis.T @ expected))
    later = RandomSubspace(share=2.0).basis(edited_site(edits=5))
    assert torch.equal(later[:, :6], basis)
    assert later.shape == (D, 12)
    assert RandomSubspace(2.0, max_directions=3).basis(site).shape == (D, 3)
    assert not torch.allclose(RandomSubspace(seed=1).basis(site), basis)


def test_no_room_is_said() -> None:
    with pytest.raises(ValueError, match=r"16 of 16 directions are taken. Lower share \(4\)"):
        RandomSubspace(4.0).restrain(updates()[0], edited_site(edits=9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scaling(1.0), "above 0 and below 1, not 1.0"),
        (lambda: RandomDeletion(0.0), "above 0 and at most 1, not 0.0"),
        (lambda: RandomSubspace(0.0), "share of directions per edit above 0"),
        (lambda: RandomSubspace(1.0, 0), "cannot be 0: give 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_deletion_undoes_what_o_edit_plus_does() -> None:
    last: list[Restraint] = [RandomDeletion(0.5)]
    with pytest.raises(ValueError, match="RandomDeletion after O-Edit"):
        OEditPlus().check(UpdateKind("MEMIT"), [], last)
