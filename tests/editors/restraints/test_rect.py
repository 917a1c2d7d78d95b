import pytest
import torch
from helpers.sites import normal, site_of
from torch import Tensor

from lit_edit.algebra.updates import Additive, LowRank, Update
from lit_edit.editors.restraints import RECT


def restrain(change: Tensor, weight: Tensor, keep: float, transposed: bool = False) -> Tensor:
    return RECT(keep).restrain(Additive(change), site_of(weight, transposed=transposed)).delta(weight)


def by_sorting(change: Tensor, weight: Tensor, keep: float) -> Tensor:
    """The entries one by one: largest relative change first, then the largest change, then the first."""
    entries = []
    for i, (c, w) in enumerate(zip(change.flatten().tolist(), weight.flatten().tolist(), strict=True)):
        relative = 0.0 if c == 0 else float("inf") if w == 0 else abs(c / w)
        entries.append((-relative, -abs(c), i))
    kept = [i for _, _, i in sorted(entries)[: round(keep * len(entries))]]
    result = torch.zeros_like(change).flatten()
    result[kept] = change.flatten()[kept]
    return result.reshape(change.shape)


@pytest.mark.parametrize(("d", "p"), [(6, 9), (16, 48), (30, 20)])
@pytest.mark.parametrize("keep", [0.01, 0.2, 0.4, 0.5, 0.999])
def test_the_largest_relative_changes_are_kept(d: int, p: int, keep: float) -> None:
    change, weight = normal(d, p), normal(d, p, seed=50)
    found = restrain(change, weight, keep)
    assert int((found != 0).sum()) == round(keep * d * p)
    torch.testing.assert_close(found, by_sorting(change, weight, keep), rtol=0, atol=0)


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.35, 0.6, 0.9])
def test_ties_zeros_and_exact_counts(keep: float) -> None:
    # Few distinct values: ties everywhere, in the ratio and in the change; zeros on both sides.
    change, weight = (normal(12, 15, seed=seed).mul(1.5).round().clamp(-2, 2) for seed in (2, 3))
    torch.testing.assert_close(restrain(change, weight, keep), by_sorting(change, weight, keep), rtol=0, atol=0)


def test_a_change_where_the_weight_is_zero_comes_first() -> None:
    weight = torch.tensor([[0.0, 1e-9, 0.0, 1.0, 0.0]], dtype=torch.float64)
    change = torch.tensor([[1e-6, 5.0, 2.0, 9.0, 0.0]], dtype=torch.float64)
    for count, kept in [(1, [2]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])]:
        found = restrain(change, weight, count / 5)
        assert found.nonzero()[:, 1].tolist() == kept


@pytest.mark.parametrize("update", [Additive(normal(6, 9)), LowRank(normal(6, 2), normal(2, 9))])
def test_the_weight_before_the_update_counts_and_stays(update: Update) -> None:
    weight = normal(6, 9, seed=3)
    site = site_of(weight, original=normal(6, 9, seed=4))
    found = RECT(0.3).restrain(update, site).delta(weight)
    torch.testing.assert_close(site.weight, weight, rtol=0, atol=0)
    torch.testing.assert_close(found, by_sorting(update.delta(weight), weight, 0.3), rtol=0, atol=0)
    assert RECT(keep=1.0).restrain(update, site) is update
    assert RECT().total(site, 0, 10) is RECT().finish(site) is None


def test_weights_in_low_precision_and_transposed_storage() -> None:
    weight, change = normal(6, 9, seed=3).to(torch.bfloat16), normal(6, 9)
    found = restrain(change, weight, 0.4, transposed=True)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, by_sorting(change, weight.double(), 0.4), rtol=0, atol=0)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1, not"):
        RECT(keep)
