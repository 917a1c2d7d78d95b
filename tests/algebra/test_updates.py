import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from lit_edit.algebra.updates import Additive, BlockKeyRotation, KeyRotation, LowRank, Rotation, Update, _Change

D, P, N, BLOCKS = 12, 30, 4, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates() -> list[Update]:
    return [
        LowRank(normal(D, N), normal(N, P, seed=1)),
        Additive(normal(D, P, seed=2)),
        Rotation(torch.linalg.qr(normal(D, D, seed=3)).Q),
        KeyRotation(torch.linalg.qr(normal(P, P, seed=4)).Q),
        BlockKeyRotation(torch.linalg.qr(normal(BLOCKS, P // BLOCKS, P // BLOCKS, seed=5)).Q),
    ]


each_update = pytest.mark.parametrize("update", updates(), ids=lambda u: type(u).__name__)


def test_what_each_update_does() -> None:
    weight, (low_rank, additive, rotation, key_rotation, _) = normal(D, P, seed=9), updates()
    torch.testing.assert_close(low_rank.delta(weight), low_rank.left @ low_rank.right)
    torch.testing.assert_close(additive.delta(weight), additive.change)
    torch.testing.assert_close(weight + rotation.delta(weight), rotation.q @ weight)
    torch.testing.assert_close(weight + key_rotation.delta(weight), weight @ key_rotation.key_q)


def test_rotations_on_either_side_keep_the_spectrum() -> None:
    before = normal(D, P, seed=9)
    for update in updates()[2:]:
        weight = before.clone()
        update.apply_(weight)
        assert float((weight - before).norm()) > 1
        torch.testing.assert_close(torch.linalg.svdvals(weight), torch.linalg.svdvals(before), rtol=1e-12, atol=0)


def test_a_rotation_of_keys_is_one_of_outputs_of_the_transposed_weight() -> None:
    weight, q = normal(D, P, seed=9), torch.linalg.qr(normal(P, P, seed=4)).Q
    torch.testing.assert_close(KeyRotation(q).delta(weight), Rotation(q.T).delta(weight.T).T)
    assert KeyRotation(q).norm == Rotation(q).norm


@each_update
def test_apply_adds_delta_and_undo_takes_it_back(update: Update) -> None:
    before = normal(D, P, seed=9)
    weight, delta = before.clone(), update.delta(before)
    update.apply_(weight)
    torch.testing.assert_close(weight, before + delta, rtol=0, atol=0)
    update.undo_(weight)
    torch.testing.assert_close(weight, before, rtol=0, atol=1e-13)


@each_update
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.1), (torch.float16, 1e-2)])
def test_storage_in_low_precision_is_rounded_once(update: Update, dtype: torch.dtype, tolerance: float) -> None:
    before = normal(D, P, seed=9).to(dtype)
    weight = before.clone()
    update.apply_(weight)
    torch.testing.assert_close(weight, (before.double() + update.delta(before)).to(dtype), rtol=0, atol=0)
    update.undo_(weight)
    torch.testing.assert_close(weight.double(), before.double(), rtol=0, atol=tolerance)


@each_update
def test_apply_writes_through_a_transposed_view_of_a_parameter(update: Update) -> None:
    parameter = nn.Parameter(normal(P, D, seed=9))
    expected = parameter.detach().T + update.delta(parameter.detach().T)
    update.apply_(parameter.T)
    torch.testing.assert_close(parameter.detach().T, expected)
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_an_update_is_a_copy() -> None:
    change = torch.ones(2, 3, dtype=torch.float64)
    update = Additive(change.T)
    change.zero_()
    assert (update.change == 1).all()
    assert update.change.is_contiguous()


@each_update
def test_state_survives_safetensors(update: Update) -> None:
    state = load(save(update.state_dict()))
    for kind in (Update, type(update)):
        copy = kind.from_state_dict(state)
        assert type(copy) is type(update)
        weight = normal(D, P, seed=9)
        torch.testing.assert_close(copy.delta(weight), update.delta(weight), rtol=0, atol=0)


def test_from_state_dict_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"No update has the tensors left, middle. .*LowRank: left, right"):
        Update.from_state_dict({"left": torch.ones(1, 1), "middle": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"No update has the tensors left, right. Known are Rotation: q\."):
        Rotation.from_state_dict(updates()[0].state_dict())


def test_norms() -> None:
    low_rank, additive, rotation, key_rotation, _ = updates()
    weight = torch.zeros(D, P)
    assert low_rank.norm == pytest.approx(float(low_rank.delta(weight).norm()), rel=1e-12)
    assert additive.norm == pytest.approx(float(additive.change.norm()), rel=1e-12)
    assert rotation.norm == pytest.approx(float((rotation.q - torch.eye(D)).norm()), rel=1e-12)
    assert key_rotation.norm == pytest.approx(float((key_rotation.key_q - torch.eye(P)).norm()), rel=1e-12)
    assert Rotation(-torch.eye(D)).norm == pytest.approx(2 * math.sqrt(D))


def test_norm_of_low_rank_keeps_its_digits_where_terms_cancel() -> None:
    column, row = normal(D, 1), normal(1, P)
    tiny = 1e-9 * normal(D, 1, seed=4)
    update = LowRank(torch.cat([column + tiny, -column], 1), torch.cat([row, row], 0))
    assert update.norm == pytest.approx(float((tiny @ row).norm()), rel=1e-5)


def test_more_columns_than_keys() -> None:
    update = LowRank(normal(3, 9), normal(9, 5))
    assert update.norm == pytest.approx(float(update.delta(torch.zeros(3, 5)).norm()), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(torch.ones(3, 2), torch.ones(4, 5)), r"left \(3, 2\), right \(4, 5\)"),
        (lambda: LowRank(torch.ones(3), torch.ones(4, 5)), r"left factor must be a matrix, got shape \(3,\)"),
        (lambda: Additive(torch.ones(3, 1, 1)), r"change must be a matrix, got shape \(3, 1, 1\)"),
        (lambda: Additive(torch.full((2, 2), math.inf)), r"change of shape \(2, 2\) holds values that are not finite"),
        (lambda: Rotation(torch.ones(2, 3)), r"square, got shape \(2, 3\)"),
        (lambda: Rotation(1.001 * torch.eye(2)), r"2x2 matrix of a rotation is not orthogonal.* by 2.0e-03"),
        (lambda: KeyRotation(torch.ones(2, 3)), r"A key rotation must be square, got shape \(2, 3\)"),
        (lambda: KeyRotation(1.001 * torch.eye(2)), r"2x2 matrix of a key rotation is not orthogonal.* by 2.0e-03"),
        (lambda: BlockKeyRotation(torch.eye(2)), r"blocks of a key rotation must be a stack of matrices.* \(2, 2\)"),
        (lambda: BlockKeyRotation(torch.ones(4, 2, 3)), r"must be square, got shape \(4, 2, 3\)"),
        (lambda: BlockKeyRotation(torch.full((1, 2, 2), math.nan)), "holds values that are not finite"),
        (
            lambda: BlockKeyRotation(torch.stack([torch.eye(2), 1.001 * torch.eye(2), torch.eye(2)])),
            r"Block 1 of 3 of a key rotation is not orthogonal.* by 2.0e-03",
        ),
    ],
)
def test_bad_updates_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@each_update
@pytest.mark.parametrize("method", ["delta", "apply_", "write_", "undo_"])
def test_a_weight_of_another_shape_is_refused(update: Update, method: str) -> None:
    with pytest.raises(ValueError, match=r"(12, 30|size 12|size 30).* does not fit a weight of shape \(30, 12\)"):
        getattr(update, method)(torch.zeros(P, D))


def test_blocks_are_the_rotation_they_stand_for() -> None:
    blocks = updates()[-1]
    assert isinstance(blocks, BlockKeyRotation)
    dense, weight = KeyRotation(torch.block_diag(*blocks.key_blocks)), normal(D, P, seed=9)
    torch.testing.assert_close(blocks.delta(weight), dense.delta(weight), rtol=0, atol=1e-13)
    assert blocks.norm == pytest.approx(dense.norm, rel=1e-12)
    assert sum(tensor.numel() for tensor in blocks.state_dict().values()) == P * P // BLOCKS
    one = BlockKeyRotation(torch.linalg.qr(normal(1, P, P, seed=4)).Q)
    torch.testing.assert_close(one.delta(weight), KeyRotation(one.key_blocks[0]).delta(weight))


def test_a_rotation_by_a_multiple_of_its_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size 30, in 5 blocks, does not fit a weight of shape \(12, 36\)"):
        updates()[-1].delta(torch.zeros(D, P + 6))


@each_update
def test_writing_says_how_large_the_change_is_and_computes_it_once(
    update: Update, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = normal(D, P, seed=9).to(torch.float32)
    delta, weight, other = update.delta(before), before.clone(), before.clone()
    computed: list[int] = []
    real = type(update)._change

    def counted(self: Update, weight: Tensor, inverse: bool) -> _Change:
        change = real(self, weight, inverse)

        def of(piece: Tensor, place: slice) -> Tensor:
            computed.append(piece.shape[change.along])
            return change.of(piece, place)

        return change._replace(of=of)

    monkeypatch.setattr(type(update), "_change", counted)
    relative, rounding = update.write_(weight)
    assert computed in ([D], [P])
    assert relative == pytest.approx(float(delta.norm() / before.double().norm()), rel=1e-12)
    assert rounding == update.apply_(other) > 0
    assert torch.equal(weight, other)


def test_writing_to_a_weight_of_zeros() -> None:
    assert Additive(torch.ones(2, 3)).write_(torch.zeros(2, 3)) == (math.inf, 0.0)
    assert Additive(torch.zeros(2, 3)).write_(torch.zeros(2, 3)) == (0.0, 0.0)


def test_the_rank_is_never_below_the_changes_own() -> None:
    weight = normal(D, P, seed=9)
    for update in updates():
        assert int(torch.linalg.matrix_rank(update.delta(weight))) <= update.rank(weight) <= D
    assert [update.rank(weight) for update in updates()] == [N, D, D, D, D]
    assert LowRank(normal(3, 9), normal(9, 5)).rank(torch.zeros(3, 5)) == 3


def test_overflow_leaves_the_weight_alone() -> None:
    weight = torch.ones(2, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"Additive of norm .* out of the range of torch.float16"):
        Additive(torch.full((2, 2), 1e6)).apply_(weight)
    assert (weight == 1).all()
