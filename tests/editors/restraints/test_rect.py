import pytest
import torch
from torch import Tensor

from lit_edit.algebra.updates import Additive, LowRank, Update
from lit_edit.editors.restraints import RECT, Ground


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def restrain(change: Tensor, weight: Tensor, keep: float) -> Tensor:
    return RECT(keep).restrain(Additive(change), Ground(weight)).delta(weight)


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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("d", "p"), [(6, 9), (16, 48), (30, 20)])
@pytest.mark.parametrize("keep", [0.01, 0.2, 0.4, 0.5, 0.999])
def test_the_largest_relative_changes_are_kept(d: int, p: int, keep: float, seed: int) -> None:
    change, weight = normal(d, p, seed=seed), normal(d, p, seed=seed + 50)
    found = restrain(change, weight, keep)
    assert int((found != 0).sum()) == round(keep * d * p)
    torch.testing.assert_close(found, by_sorting(change, weight, keep), rtol=0, atol=0)
    relative, kept = (change / weight).abs(), found != 0
    if kept.any() and not kept.all():
        assert relative[kept].min() >= relative[~kept].max()


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.35, 0.6, 0.9])
def test_ties_zeros_and_exact_counts(keep: float) -> None:
    # Few distinct values: ties everywhere, in the ratio and in the change; zeros on both sides.
    generator = torch.Generator().manual_seed(2)
    change = torch.randint(-2, 3, (12, 15), generator=generator).double()
    weight = torch.randint(-2, 3, (12, 15), generator=generator).double()
    torch.testing.assert_close(restrain(change, weight, keep), by_sorting(change, weight, keep), rtol=0, atol=0)


def test_a_change_where_the_weight_is_zero_comes_first() -> None:
    weight = torch.tensor([[0.0, 1e-9, 0.0, 1.0, 0.0]], dtype=torch.float64)
    change = torch.tensor([[1e-6, 5.0, 2.0, 9.0, 0.0]], dtype=torch.float64)
    for count, kept in [(1, [2]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])]:
        found = restrain(change, weight, count / 5)
        assert found.nonzero()[:, 1].tolist() == kept


@pytest.mark.parametrize("update", [Additive(normal(6, 9)), LowRank(normal(6, 2), normal(2, 9))])
def test_keeping_everything_changes_nothing(update: Update) -> None:
    assert RECT(keep=1.0).restrain(update, Ground(normal(6, 9, seed=3))) is update


def test_the_weight_before_the_update_counts_and_stays() -> None:
    weight = normal(6, 9, seed=3)
    before, update = weight.clone(), LowRank(normal(6, 2), normal(2, 9))
    found = RECT(0.3).restrain(update, Ground(weight, original=normal(6, 9, seed=4)))
    torch.testing.assert_close(weight, before, rtol=0, atol=0)
    torch.testing.assert_close(found.delta(weight), by_sorting(update.delta(weight), weight, 0.3), rtol=0, atol=0)


def test_weights_in_low_precision_and_transposed_storage() -> None:
    stored = normal(9, 6, seed=3).to(torch.bfloat16)
    change = normal(6, 9)
    found = restrain(change, stored.T, 0.4)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, by_sorting(change, stored.T.double(), 0.4), rtol=0, atol=0)


def test_it_has_no_part_in_the_sum_of_updates() -> None:
    assert RECT(0.2).total(Ground(normal(6, 9), normal(6, 9, seed=1), edits=10, batch=1), last=True) is None
    assert not RECT().needs_original
    assert not RECT().needs_gradient
    assert RECT().keep == 0.2


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1, not"):
        RECT(keep)
