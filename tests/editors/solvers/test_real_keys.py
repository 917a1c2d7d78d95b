"""Every solver against dense algebra written another way, on keys of tiny models: batches of 1 and of 10."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_tokenizer
from helpers.references import CONTEXTS, make_workspace, matrix_of, reference_keys
from helpers.runs import (
    CORPUS,
    PowerCut,
    assert_same_weights,
    data,
    entries,
    quick_editor,
    trainer,
    write_corpus,
)
from lightning.pytorch import Callback
from lit_edit.callbacks import EditCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lit_edit import LitEdit, load_model
from lit_edit.algebra.linalg import orthogonality_error
from lit_edit.algebra.updates import ThinKeyRotation, ThinRotation
from lit_edit.editors import LocateThenEdit
from lit_edit.editors.keys import MeanKey, compute_keys
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey, Problem, Solver
from lit_edit.editors.solvers.mose_key import matched_keys
from lit_edit.module import CHECKPOINT_KEY
from lit_edit.requests import EditRequest
from lit_edit.statistics import collect_covariances

SUBJECTS = ("France", "Maria", "Oslo", "Москва", "the old harbour", "Peru", "Kenya", "Rome", "Paris", "an owl")
LAYER = 1


def requests() -> list[EditRequest]:
    """Ten requests with subjects of their own, in the middle of their prompts."""
    return [EditRequest(str(i), f"Now {subject} is in", subject, "Lyon") for i, subject in enumerate(SUBJECTS)]


def weighted(rows: Tensor, preservation: float) -> Tensor:
    """K0 (p, tokens) with K0 K0ᵀ = λ C, from keys as rows."""
    return rows.T * (preservation / len(rows)) ** 0.5


def bordered(problem: Problem, kept: Tensor) -> Tensor:
    """min ‖X K0‖² + ‖X M‖² subject to X K = R, from its optimality conditions."""
    p, n = problem.keys.shape
    system = torch.zeros(p + n, p + n, dtype=torch.float64)
    system[:p, :p], system[:p, p:], system[p:, :p] = kept @ kept.T, problem.keys, problem.keys.T
    right = torch.cat([torch.zeros(p, len(problem.residual), dtype=torch.float64), problem.residual.T])
    return torch.linalg.solve(system, right)[:p].T


def least_squares(problem: Problem, kept: Tensor) -> Tensor:
    """min ‖X K0‖² + ‖X M‖² + ‖X K − R‖², as one overdetermined system."""
    d = len(problem.residual)
    left = torch.cat([kept, problem.keys], dim=1)
    right = torch.cat([torch.zeros(d, kept.shape[1], dtype=torch.float64), problem.residual], dim=1)
    return torch.linalg.lstsq(left.T, right.T, driver="gelsd").solution.T


def polar(m: Tensor) -> Tensor:
    """The orthogonal polar factor by Newton's iteration, without a singular value decomposition."""
    for _ in range(60):
        m = (m + torch.linalg.inv(m).T) / 2
    return m


def left_rotation(problem: Problem, kept: Tensor) -> Tensor:
    before = problem.weight @ torch.cat([kept, problem.keys], dim=1)
    after = torch.cat([problem.weight @ kept, problem.targets], dim=1)
    return polar(after @ before.T) @ problem.weight - problem.weight


def right_rotation(problem: Problem, kept: Tensor) -> Tensor:
    _, s, basis = torch.linalg.svd(problem.weight)
    rank = int((s > 1e-10 * s[0]).sum())
    wanted = []
    for key, target in zip(problem.keys.T, problem.targets.T, strict=True):
        row = torch.linalg.lstsq(problem.weight, target[:, None], driver="gelsd").solution[:, 0]
        null = basis[rank:].T @ (basis[rank:] @ key)
        left = key.norm() ** 2 - row.norm() ** 2
        reached = left >= 0 and null.norm() > 0
        wanted.append(row + null / null.norm() * left.sqrt() if reached else row / row.norm() * key.norm())
    before = torch.cat([kept, problem.keys], dim=1)
    after = torch.cat([kept, torch.stack(wanted, dim=1)], dim=1)
    return problem.weight @ polar(after @ before.T) - problem.weight


def null_space(problem: Problem, kept: Tensor, memory: Tensor, energy: float, ridge: float) -> Tensor:
    """AlphaEdit's system as printed, its projector from the singular vectors of the corpus's keys themselves."""
    basis, s, _ = torch.linalg.svd(kept, full_matrices=True)
    shares = (s**2).flip(0).cumsum(0) / (s**2).sum()
    free = basis[:, len(s) - int((shares <= energy).sum()) :]
    projector = free @ free.T
    stored = torch.cat([problem.keys, memory], dim=1)
    system = projector @ stored @ stored.T + ridge * torch.eye(len(projector), dtype=torch.float64)
    return torch.linalg.solve(system, projector @ problem.keys @ problem.residual.T).T


# The solver, the weight of the corpus, and the reference for a problem, its preserved keys and the memory among them.
CASES: dict[str, tuple[Solver, float, Callable[[Problem, Tensor, Tensor], Tensor]]] = {
    "rome": (ROME(memory=True, preservation=30.0), 30.0, lambda p, k, m: bordered(p, torch.cat([k, m], 1))),
    "emmet": (EMMET(memory=True, preservation=30.0), 30.0, lambda p, k, m: bordered(p, torch.cat([k, m], 1))),
    "memit": (MEMIT(memory=True, preservation=30.0), 30.0, lambda p, k, m: least_squares(p, torch.cat([k, m], 1))),
    "alphaedit": (
        AlphaEdit(threshold=None, energy=0.05, ridge=1.0),
        1.0,
        lambda p, k, m: null_space(p, k, m, energy=0.05, ridge=1.0),
    ),
    "mose": (MOSE(memory=True, preservation=30.0), 30.0, lambda p, k, m: left_rotation(p, torch.cat([k, m], 1))),
    "mose-key": (
        MOSEKey(memory=True, preservation=30.0),
        30.0,
        lambda p, k, m: right_rotation(p, torch.cat([k, m], 1)),
    ),
}


Real = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def real(request: pytest.FixtureRequest, tiny_folder) -> Real:
    """Weight (d, p), ten keys (p, 10), three keys of past edits, keys of a corpus as rows, and their covariance."""
    return real_problem(tiny_folder(request.param))


def real_problem(folder: Path) -> Real:
    """What `real` gives, of a model in a folder."""
    workspace = make_workspace(load_model(str(folder)))
    part = workspace.architecture[LAYER]
    rows: list[Tensor] = []
    hook = part.projection.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][0].double()))
    for text in CORPUS.splitlines():
        with torch.no_grad():
            workspace.model(input_ids=torch.tensor([workspace.tokenizer(text)["input_ids"]]))
    hook.remove()
    model, tokenizer, modules = workspace.model, workspace.tokenizer, {part.name: part.projection}
    covariance = collect_covariances(model, tokenizer, CORPUS.splitlines(), modules, sequence_length=100)[part.name]
    keys = compute_keys(workspace, requests(), [LAYER], MeanKey())[LAYER].double()
    by_hand = torch.stack([reference_keys(workspace, r, LAYER).mean(0) for r in requests()], dim=1).double()
    torch.testing.assert_close(keys, by_hand, rtol=1e-4, atol=1e-5)
    past = [EditRequest("p", f"{s} sings", s, "Oslo") for s in ("A king", "Lima", "The sea")]
    memory = compute_keys(workspace, past, [LAYER], MeanKey())[LAYER].double()
    assert len(workspace.contexts) == len(CONTEXTS) > 1
    return matrix_of(workspace.model, LAYER).double(), keys, memory, torch.cat(rows), covariance


@pytest.mark.parametrize(("name", "n"), [(name, n) for name in CASES for n in (1, 10) if (name, n) != ("rome", 10)])
@pytest.mark.parametrize("reach", [0.5, 1.0, 4.0])  # length of the targets against that of the present outputs
def test_solver_agrees_with_its_reference(real, name: str, n: int, reach: float) -> None:
    weight, keys, memory, rows, covariance = real
    solver, preservation, reference = CASES[name]
    keys = keys[:, :n]
    directions = torch.randn(len(weight), n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    targets = reach * directions / directions.norm(dim=0) * (weight @ keys).norm(dim=0)
    problem = Problem(weight, keys, targets, covariance, memory, layer="real")
    delta = solver.solve(problem).delta(weight)
    expected = reference(problem, weighted(rows, preservation), memory)
    assert float((delta - expected).norm() / expected.norm()) < 1e-6
    if name in ("rome", "emmet"):
        torch.testing.assert_close((weight + delta) @ keys, targets, rtol=1e-7, atol=1e-7)
    # Order of the requests and of the memory.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    shuffled = Problem(weight, keys[:, order], targets[:, order], covariance, memory.flip(1), layer="real")
    other = solver.solve(shuffled).delta(weight)
    assert float((other - delta).norm() / delta.norm()) < 1e-7


def test_memit_becomes_rome_as_preservation_vanishes(real) -> None:
    weight, keys, _, _, covariance = real
    targets = (weight @ keys[:, :1]).roll(1, 0)
    problem = Problem(weight, keys[:, :1], targets, covariance)
    rome = ROME().solve(problem).delta(weight)
    errors = [
        float((MEMIT(preservation).solve(problem).delta(weight) - rome).norm() / rome.norm())
        for preservation in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("n", [1, 10])
def test_memit_becomes_emmet_as_preservation_vanishes(real, n: int) -> None:
    weight, keys, _, _, covariance = real
    problem = Problem(weight, keys[:, :n], (weight @ keys[:, :n]).roll(1, 0), covariance)
    emmet = EMMET().solve(problem).delta(weight)
    memit = MEMIT(1e-6).solve(problem).delta(weight)
    assert float((memit - emmet).norm() / emmet.norm()) < 1e-3


@pytest.mark.parametrize("n", [1, 10])
def test_alphaedit_with_all_directions_free_is_memit_with_an_isotropic_covariance(real, n: int) -> None:
    weight, keys, memory, _, covariance = real
    targets = (weight @ keys[:, :n]).roll(1, 0)
    ridge, identity = 3.0, torch.eye(len(keys), dtype=torch.float64)
    for past in (False, True):
        alpha = AlphaEdit(threshold=1e9, ridge=ridge, memory=past).solve(
            Problem(weight, keys[:, :n], targets, covariance, memory)
        )
        memit = MEMIT(1.0, memory=past).solve(Problem(weight, keys[:, :n], targets, ridge * identity, memory))
        torch.testing.assert_close(alpha.delta(weight), memit.delta(weight), rtol=1e-8, atol=1e-10)


# Rotations without a dense decomposition. The models above are too narrow for them: where a batch's Krylov space would
# fill the whole one, MOSE takes the dense one.

WIDTH, INNER = 192, 224


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a random model of three layers that is wide enough for batches of two, and gives its folder."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family in made:
            return made[family]
        tokenizer = tiny_tokenizer(bos=family == "llama")
        ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = (
            GPT2Config(n_embd=WIDTH, n_inner=INNER, n_layer=3, n_head=4, n_positions=128, initializer_range=0.2, **ids)
            if family == "gpt2"
            else LlamaConfig(**sizes, max_position_embeddings=128, initializer_range=0.1, **ids)
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
        made[family] = tmp_path_factory.mktemp(f"wide-{family}")
        model.save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def wide(request: pytest.FixtureRequest, wide_folder: Callable[[str], Path]) -> Real:
    return real_problem(wide_folder(request.param))


def left_part(solver: MOSE | MOSEKey, problem: Problem) -> Tensor:
    """The matrix whose orthogonal polar factor is wanted, summed up as printed."""
    weight, keys = problem.weight, problem.keys
    kept = solver.preservation * problem.covariance + problem.memory @ problem.memory.T  # type: ignore[operator]
    if isinstance(solver, MOSE):
        return weight @ kept @ weight.T + problem.targets @ (weight @ keys).T
    return kept + matched_keys(weight, keys, problem.targets) @ keys.T


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("make", [MOSE, MOSEKey])
def test_rotations_in_a_krylov_space_are_as_good_as_the_dense_ones(
    wide: Real, make: type[MOSE] | type[MOSEKey], n: int
) -> None:
    weight, keys, memory, _, covariance = wide
    assert weight.shape == (WIDTH, INNER)
    spectrum = torch.linalg.svdvals(weight)
    generator, thin = torch.Generator().manual_seed(n), make(preservation=10.0)
    for start in range(0, 3 * n, n):
        now = keys[:, start : start + n]
        targets = torch.randn(WIDTH, n, generator=generator, dtype=torch.float64)
        targets *= (weight @ now).norm(dim=0) / targets.norm(dim=0)
        problem = Problem(weight, now, targets, covariance, memory, layer="wide")
        update = thin.solve(problem)
        assert isinstance(update, (ThinRotation, ThinKeyRotation))
        identity = torch.eye(WIDTH if make is MOSE else INNER, dtype=torch.float64)
        q = identity + update.delta(identity)
        assert orthogonality_error(q) < 1e-12
        # tr(Qᵀ M) is at most the sum of M's singular values, reached by its polar factor, which the SVD gives.
        m = left_part(thin, problem)
        most = float(torch.linalg.svdvals(m).sum())
        dense = identity + make(preservation=10.0, method="svd").solve(problem).delta(identity)
        assert float((dense * m).sum()) == pytest.approx(most, rel=1e-12)
        assert most - float((q * m).sum()) <= 1e-9 * most
        assert most - float(m.trace()) > 1e-6 * most  # there was something to do
        weight, memory = weight + update.delta(weight), torch.cat([memory, now], dim=1)
    torch.testing.assert_close(torch.linalg.svdvals(weight), spectrum, rtol=1e-10, atol=0)


@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")
@pytest.mark.parametrize(("method", "family"), [("mose", "gpt2"), ("mose", "llama"), ("mose-key", "llama")])
def test_a_resumed_run_of_krylov_rotations_equals_an_uninterrupted_one(
    wide_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    family: str,
) -> None:
    taken: list[str] = []
    for kind in (MOSE, MOSEKey):
        solve = kind.solve

        def watched(self: Solver, problem: Problem, solve=solve) -> object:
            taken.append(type(update := solve(self, problem)).__name__)
            return update

        monkeypatch.setattr(kind, "solve", watched)

    def make() -> LitEdit:
        editor = quick_editor(method)
        assert isinstance(editor, LocateThenEdit)
        return LitEdit(editor, str(wide_folder(family)), corpus=str(write_corpus(tmp_path)))

    straight, first, resumed = make(), make(), make()

    def fit(module: LitEdit, *more: Callback, ckpt_path: Path | None = None) -> None:
        callbacks = [EditCheckpoint(str(tmp_path), every_n=3), *more]
        trainer(tmp_path, *callbacks).fit(module, datamodule=data(tmp_path, 5), ckpt_path=ckpt_path, weights_only=True)

    fit(straight)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(first, PowerCut(4))
    assert len(torch.load(tmp_path / "edits.ckpt", weights_only=True)[CHECKPOINT_KEY]["journal"]) == 3
    fit(resumed, ckpt_path=tmp_path / "edits.ckpt")
    assert set(taken) <= {"ThinRotation", "ThinKeyRotation"}
    assert len(taken) >= 5 + 4 + 2
    assert_same_weights(resumed.model, straight.model)
    assert entries(resumed.journal) == entries(straight.journal)
