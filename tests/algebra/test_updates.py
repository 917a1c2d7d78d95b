"""What updates do, and how they are written: piece by piece, rounded once, whole or not at all."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.sites import normal, orthogonal
from safetensors.torch import load, save
from torch import Tensor, nn

from lit_edit.algebra.exact import no_remainder, widened
from lit_edit.algebra.updates import Additive, LowRank, Rotation, Update

D, P, N = 12, 30, 4
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
UPDATES: dict[str, Update] = {
    "low rank": LowRank(normal(D, N), normal(N, P, seed=1)),
    "additive": Additive(normal(D, P, seed=2)),
    "rotation": Rotation(orthogonal(D, D, seed=3)),
    "thin": Rotation(orthogonal(3, 3, seed=4), orthogonal(D, 3, seed=5)),
    "blocks": Rotation(orthogonal(3, 4, 4, seed=6)),
    "of keys": Rotation(orthogonal(P, P, seed=3), of_keys=True),
    "thin, of keys": Rotation(orthogonal(3, 3, seed=4), orthogonal(P, 3, seed=5), of_keys=True),
    "blocks, of keys": Rotation(orthogonal(5, 6, 6, seed=6), of_keys=True),
}
each_update = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
each_storage = pytest.mark.parametrize("transposed", [False, True])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as small as a large weight's are beside it."""
    monkeypatch.setattr("lit_edit.algebra.exact._ON_CPU", 5 * P)
    for name in ("_NARROW", "_WIDE"):
        monkeypatch.setattr(f"lit_edit.algebra.updates.{name}", 5)


def stored(dtype: torch.dtype = torch.float64, transposed: bool = False) -> Tensor:
    weight = normal(D, P, seed=9).to(dtype)
    return weight.T.contiguous().T if transposed else weight


def dense(rotation: Rotation) -> Tensor:
    """Q as it is defined for each form."""
    if rotation.basis is not None:
        n, k = rotation.basis.shape
        return torch.eye(n) + rotation.basis @ (rotation.turn - torch.eye(k)) @ rotation.basis.T
    return torch.block_diag(*rotation.turn) if rotation.turn.ndim == 3 else rotation.turn


@each_update
def test_what_an_update_does(update: Update) -> None:
    weight = stored()
    if isinstance(update, Rotation):
        q = dense(update)
        expected = (weight @ q if update.of_keys else q @ weight) - weight
        norm = float((q - torch.eye(len(q))).norm())
        values = torch.linalg.svdvals(weight + update.delta(weight))
        torch.testing.assert_close(values, torch.linalg.svdvals(weight), rtol=1e-12, atol=0)
    else:
        expected = update.left @ update.right if isinstance(update, LowRank) else update.change  # type: ignore[attr-defined]
        norm = float(expected.norm())
    delta = update.delta(weight)
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-13)
    assert update.norm == pytest.approx(norm, rel=1e-12)
    assert int(torch.linalg.matrix_rank(delta)) <= update.rank(weight) == (N if isinstance(update, LowRank) else D)


@each_update
@each_storage
@pytest.mark.parametrize("dtype", UNIT)
def test_it_is_added_rounded_once_and_can_be_taken_back(update: Update, transposed: bool, dtype: torch.dtype) -> None:
    weight = stored(dtype, transposed)
    before, delta = weight.clone(), update.delta(weight)
    applied = update.apply_(weight)
    wanted = before.double() + delta
    atol = 1e-7 if dtype == torch.float16 else 1e-14  # subnormal numbers; another order of a sum
    torch.testing.assert_close(weight.double(), wanted, rtol=1.01 * UNIT[dtype], atol=atol)
    assert applied.relative_change == pytest.approx(float(delta.norm() / before.double().norm()), rel=1e-12)
    lost = float((weight.double() - wanted).norm() / delta.norm())
    assert applied.rounding == pytest.approx(lost, rel=1e-6, abs=1e-14)
    update.inverse().apply_(weight)
    torch.testing.assert_close(weight.double(), before.double(), rtol=0, atol=max(64 * UNIT[dtype], 1e-13))


@each_update
@each_storage
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_a_remainder_it_goes_on_from_the_sum(update: Update, transposed: bool, dtype: torch.dtype) -> None:
    weight = stored(dtype, transposed)
    exact, remainder = weight.double(), no_remainder(weight)
    for _ in range(3):
        exact = exact + update.delta(exact)
        assert 0 < update.apply_(weight, remainder).rounding < 1
        torch.testing.assert_close(weight.double(), exact, rtol=UNIT[dtype] * 1.01, atol=1e-6)
        torch.testing.assert_close(widened(weight, remainder), exact, rtol=1e-6, atol=3e-6)
    for _ in range(3):
        update.inverse().apply_(weight, remainder)
    torch.testing.assert_close(widened(weight, remainder), stored(dtype).double(), rtol=0, atol=2e-5)


def test_it_writes_through_a_transposed_view_of_a_parameter() -> None:
    parameter = nn.Parameter(normal(P, D, seed=9))
    expected = parameter.detach().T + UPDATES["low rank"].delta(parameter.T)
    UPDATES["low rank"].apply_(parameter.T)
    torch.testing.assert_close(parameter.detach().T, expected)
    assert parameter.requires_grad
    assert parameter.grad_fn is None


class Interrupted(Additive):
    """Ctrl-C while the last piece is computed."""

    def _change(self, weight: Tensor):
        change = super()._change(weight)

        def of(piece: Tensor, place: slice) -> Tensor:
            if place.stop == weight.shape[change.along]:
                raise KeyboardInterrupt
            return change.of(piece, place)

        return change._replace(of=of)


@each_storage
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_is_written_where_a_part_of_it_cannot_be(transposed: bool, dtype: torch.dtype) -> None:
    weight = stored(dtype, transposed)
    remainder = no_remainder(weight) if dtype == torch.float16 else None
    Additive(normal(D, P)).apply_(weight, remainder)
    before, carried = weight.clone(), None if remainder is None else remainder.clone()
    large = torch.ones(D, P, dtype=torch.float64)
    large[-1, -1] = 1e39
    message = r"Additive of norm 1e\+39 takes the weight of shape \(12, 30\) out of the range of torch.float"
    for update, error, said in ((Additive(large), ValueError, message), (Interrupted(large), KeyboardInterrupt, None)):
        with pytest.raises(error, match=said):
            update.apply_(weight, remainder)
        assert torch.equal(weight, before)
        assert remainder is None or torch.equal(remainder, carried)
    with pytest.raises(ValueError, match=r"remainder of shape \(30, 12\) is none of a weight of shape \(12, 30\)"):
        Additive(large).apply_(weight, torch.zeros(P, D).half())
    weight[-1, -1] = math.nan
    with pytest.raises(ValueError, match="out of the range"):
        Additive(torch.ones(D, P)).apply_(weight)
    assert torch.equal(weight[:-1], before[:-1])


def test_figures_of_a_weight_of_zeros() -> None:
    assert Additive(torch.ones(2, 3)).apply_(torch.zeros(2, 3)) == (math.inf, 0.0)
    assert Additive(torch.zeros(2, 3)).apply_(torch.zeros(2, 3)) == (0.0, 0.0)


def test_an_update_is_a_copy() -> None:
    change = torch.ones(2, 3, dtype=torch.float64)
    update = Additive(change.T)
    change.zero_()
    assert (update.change == 1).all()
    assert update.change.is_contiguous()


@each_update
def test_state_survives_safetensors(update: Update) -> None:
    copy = Update.from_state_dict(load(save(update.state_dict())))
    assert type(copy) is type(update)
    torch.testing.assert_close(copy.delta(stored()), update.delta(stored()), rtol=0, atol=0)


@pytest.mark.parametrize("names", [("left", "middle"), ("turn",), ("basis", "of_keys"), ()])
def test_a_state_of_no_kind_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"No update has the tensors .*left and right \(LowRank\)"):
        Update.from_state_dict({name: torch.ones(1, 1) for name in names})


def test_norm_of_low_rank_keeps_its_digits_where_terms_cancel() -> None:
    column, row, tiny = normal(D, 1), normal(1, P), 1e-9 * normal(D, 1, seed=4)
    update = LowRank(torch.cat([column + tiny, -column], 1), torch.cat([row, row], 0))
    assert update.norm == pytest.approx(float((tiny @ row).norm()), rel=1e-5)
    wide = LowRank(normal(3, 9), normal(9, 5))
    assert wide.norm == pytest.approx(float((wide.left @ wide.right).norm()), rel=1e-12)
    assert wide.rank(torch.zeros(3, 5)) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(torch.ones(3, 2), torch.ones(4, 5)), r"left \(3, 2\), right \(4, 5\)"),
        (lambda: LowRank(torch.ones(3), torch.ones(4, 5)), r"left \(3,\), right \(4, 5\)"),
        (lambda: Additive(torch.ones(3, 1, 1)), r"change must be a matrix, got shape \(3, 1, 1\)"),
        (lambda: Additive(torch.full((2, 2), math.inf)), r"change of shape \(2, 2\) holds values that are not finite"),
        (lambda: Rotation(torch.ones(2, 3)), r"square, or a stack of square blocks, got shape \(2, 3\)"),
        (lambda: Rotation(torch.ones(4, 2, 3)), r"got shape \(4, 2, 3\)"),
        (lambda: Rotation(torch.full((1, 2, 2), math.nan)), "holds values that are not finite"),
        (lambda: Rotation(1.001 * torch.eye(2)), r"turn of a rotation, of shape \(2, 2\), is not orthog.* by 2.0e-03"),
        (
            lambda: Rotation(torch.stack([torch.eye(2), 1.001 * torch.eye(2), torch.eye(2)])),
            r"not orthogonal \(block 1 of 3\).* by 2.0e-03",
        ),
        (lambda: Rotation(torch.eye(2), torch.ones(5, 3)), r"basis of shape \(5, 3\) does not fit a turn .* \(2, 2\)"),
        (lambda: Rotation(torch.eye(2), torch.ones(5, 2)), r"basis of a rotation, of shape \(5, 2\), is not orthog"),
    ],
)
def test_bad_updates_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@each_update
def test_a_weight_of_another_shape_is_refused(update: Update) -> None:
    for act in (update.delta, update.apply_):
        with pytest.raises(ValueError, match=r"(12, 30|size 12|size 30).* does not fit a weight of shape \(30, 12\)"):
            act(torch.zeros(P, D))
