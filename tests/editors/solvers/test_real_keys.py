"""Every solver against dense algebra written another way, on keys of tiny models: batches of 1 and of 10."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_tokenizer
from helpers.references import CONTEXTS, make_workspace, matrix_of, reference_keys
from helpers.runs import CORPUS, PowerCut, assert_same_weights, data, entries, quick_editor, trainer, write_corpus
from helpers.sites import Case, case_of, least_change, normal
from lightning.pytorch import Callback
from lit_edit.callbacks import EditCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_edit import LitEdit, load_model
from lit_edit.algebra.updates import Rotation
from lit_edit.editors.keys import MeanKey, compute_keys
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey, Solver
from lit_edit.module import CHECKPOINT_KEY
from lit_edit.requests import EditRequest
from lit_edit.statistics import KeyCollector, collect

SUBJECTS = ("France", "Maria", "Oslo", "Москва", "the old harbour", "Peru", "Kenya", "Rome", "Paris", "an owl")
LAYER = 1


def requests() -> list[EditRequest]:
    """Ten requests with subjects of their own, in the middle of their prompts."""
    return [EditRequest(str(i), f"Now {subject} is in", subject, "Lyon") for i, subject in enumerate(SUBJECTS)]


def exactly(case: Case, kept: Tensor) -> Tensor:
    """min ‖X K0‖² + ‖X M‖² subject to X K = R; both kinds of preserved keys stand in `kept`, in what follows too."""
    return least_change(kept @ kept.T, case.keys, case.residual)


def least_squares(case: Case, kept: Tensor) -> Tensor:
    """min ‖X K0‖² + ‖X M‖² + ‖X K − R‖², as one overdetermined system."""
    left = torch.cat([kept, case.keys], dim=1)
    right = torch.cat([torch.zeros(len(case.weight), kept.shape[1], dtype=torch.float64), case.residual], dim=1)
    return torch.linalg.lstsq(left.T, right.T, driver="gelsd").solution.T


def polar(m: Tensor) -> Tensor:
    """The orthogonal polar factor by Newton's iteration, without a singular value decomposition."""
    for _ in range(60):
        m = (m + torch.linalg.inv(m).T) / 2
    return m


def left_rotation(case: Case, kept: Tensor) -> Tensor:
    before = case.weight @ torch.cat([kept, case.keys], dim=1)
    after = torch.cat([case.weight @ kept, case.targets], dim=1)
    return polar(after @ before.T) @ case.weight - case.weight


def right_rotation(case: Case, kept: Tensor) -> Tensor:
    _, s, basis = torch.linalg.svd(case.weight)
    rank = int((s > 1e-10 * s[0]).sum())
    wanted = []
    for key, target in zip(case.keys.T, case.targets.T, strict=True):
        row = torch.linalg.lstsq(case.weight, target[:, None], driver="gelsd").solution[:, 0]
        null = basis[rank:].T @ (basis[rank:] @ key)
        left = key.norm() ** 2 - row.norm() ** 2
        reached = left >= 0 and null.norm() > 0
        wanted.append(row + null / null.norm() * left.sqrt() if reached else row / row.norm() * key.norm())
    before, after = torch.cat([kept, case.keys], dim=1), torch.cat([kept, torch.stack(wanted, dim=1)], dim=1)
    return case.weight @ polar(after @ before.T) - case.weight


def null_space(case: Case, kept: Tensor) -> Tensor:
    """AlphaEdit's system as printed, its projector from the singular vectors of the corpus's keys themselves."""
    corpus = kept[:, : kept.shape[1] - case.memory.shape[1]]
    basis, s, _ = torch.linalg.svd(corpus, full_matrices=False)
    shares = (s**2).flip(0).cumsum(0) / (s**2).sum()
    free = basis[:, len(s) - int((shares <= 0.05).sum()) :]
    projector = free @ free.T
    stored = torch.cat([case.keys, case.memory], dim=1)
    system = projector @ stored @ stored.T + torch.eye(len(projector), dtype=torch.float64)
    return torch.linalg.solve(system, projector @ case.keys @ case.residual.T).T


Reference = Callable[[Case, Tensor], Tensor]
CASES: dict[str, tuple[Solver, Reference]] = {
    "rome": (ROME(memory=True, preservation=30.0), exactly),
    "emmet": (EMMET(memory=True, preservation=30.0), exactly),
    "memit": (MEMIT(memory=True, preservation=30.0), least_squares),
    "alphaedit": (AlphaEdit(threshold=None, energy=0.05, ridge=1.0), null_space),
    "mose": (MOSE(memory=True, preservation=30.0), left_rotation),
    "mose-key": (MOSEKey(memory=True, preservation=30.0), right_rotation),
}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def real(request: pytest.FixtureRequest, tiny_folder: Any) -> tuple[Case, Tensor]:
    """A layer with ten keys, the keys of three past edits and the covariance of a corpus, and its keys as rows."""
    workspace = make_workspace(load_model(str(tiny_folder(request.param))))
    part = workspace.architecture[LAYER]
    rows: list[Tensor] = []
    hook = part.projection.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][0].double()))
    for text in CORPUS.splitlines():
        with torch.no_grad():
            workspace.model(input_ids=torch.tensor([workspace.tokenizer(text)["input_ids"]]))
    hook.remove()
    model, tokenizer, modules = workspace.model, workspace.tokenizer, {part.name: part.projection}
    texts = CORPUS.splitlines()
    found, _ = collect(KeyCollector(modules), model, tokenizer, texts, max_tokens=10**6, sequence_length=100)
    covariance = found[part.name]
    keys = compute_keys(workspace, requests(), [LAYER], MeanKey())[LAYER].double()
    by_hand = torch.stack([reference_keys(workspace, r, LAYER).mean(0) for r in requests()], dim=1).double()
    torch.testing.assert_close(keys, by_hand, rtol=1e-4, atol=1e-5)
    past = [EditRequest("p", f"{s} sings", s, "Oslo") for s in ("A king", "Lima", "The sea")]
    memory = compute_keys(workspace, past, [LAYER], MeanKey())[LAYER]
    assert len(workspace.contexts) == len(CONTEXTS) > 1
    weight = matrix_of(workspace.model, LAYER).double()
    return case_of(weight, keys, (weight @ keys).roll(1, 0), covariance, memory), torch.cat(rows)


def first(case: Case, n: int, **changes: Any) -> Case:
    return case.fresh(**({"keys": case.keys[:, :n], "targets": case.targets[:, :n]} | changes))


@pytest.mark.parametrize(("name", "n"), [(name, n) for name in CASES for n in (1, 10) if (name, n) != ("rome", 10)])
@pytest.mark.parametrize("reach", [0.5, 1.0, 4.0])  # length of the targets against that of the present outputs
def test_solver_agrees_with_its_reference(real: tuple[Case, Tensor], name: str, n: int, reach: float) -> None:
    (case, rows), (solver, reference) = real, CASES[name]
    directions, outputs = normal(len(case.weight), n, seed=n), case.weight @ case.keys[:, :n]
    case = first(case, n, targets=reach * directions / directions.norm(dim=0) * outputs.norm(dim=0))
    delta = case.delta(solver)
    kept = rows.T * (getattr(solver, "preservation", 1.0) / len(rows)) ** 0.5  # K0 (p, tokens) with K0 K0ᵀ = λ C
    expected = reference(case, torch.cat([kept, case.memory], dim=1))
    assert float((delta - expected).norm() / expected.norm()) < 1e-6
    if name in ("rome", "emmet"):
        torch.testing.assert_close((case.weight + delta) @ case.keys, case.targets, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("exact", "n"), [(ROME(), 1), (EMMET(), 1), (EMMET(), 10)])
def test_memit_becomes_exact_as_preservation_vanishes(real: tuple[Case, Tensor], exact: Solver, n: int) -> None:
    case = first(real[0], n)
    expected = case.delta(exact)
    errors = [float((case.delta(MEMIT(x)) - expected).norm() / expected.norm()) for x in (1e-2, 1e-4, 1e-6)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("memory", [False, True])
def test_alphaedit_with_all_directions_free_is_memit_with_an_isotropic_covariance(
    real: tuple[Case, Tensor], n: int, memory: bool
) -> None:
    case, ridge = first(real[0], n), 3.0
    alpha = case.delta(AlphaEdit(threshold=1e9, ridge=ridge, memory=memory))
    isotropic = case.fresh(covariance=ridge * torch.eye(len(case.keys), dtype=torch.float64))
    torch.testing.assert_close(alpha, isotropic.delta(MEMIT(1.0, memory)), rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")
@pytest.mark.parametrize("method", ["mose", "mose-key"])
def test_a_resumed_run_of_thin_rotations_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """On a model wide enough for them."""
    tokenizer = tiny_tokenizer(bos=True)
    sizes = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**sizes, **ids, max_position_embeddings=128, initializer_range=0.1)
        )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    taken: list[bool] = []
    solve = Solver.solve

    def watched(self: Solver, *args: Any) -> Any:
        update = solve(self, *args)
        taken.append(isinstance(update, Rotation) and update.basis is not None)
        return update

    monkeypatch.setattr(Solver, "solve", watched)

    def fit(*more: Callback, ckpt_path: Path | None = None) -> LitEdit:
        module = LitEdit(quick_editor(method), str(tmp_path / "model"), corpus=str(write_corpus(tmp_path)))
        callbacks = [EditCheckpoint(str(tmp_path), every_n=3), *more]
        run = trainer(tmp_path, *callbacks)
        run.fit(module, datamodule=data(tmp_path, 5), ckpt_path=ckpt_path, weights_only=True)
        return module

    straight = fit()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(PowerCut(4))
    saved = torch.load(tmp_path / "edits.ckpt", weights_only=True)[CHECKPOINT_KEY]
    assert len(saved["journal"]["edits"]) == 4  # a run that ends in an error saves what it has
    resumed = fit(ckpt_path=tmp_path / "edits.ckpt")
    assert all(taken)
    assert len(taken) >= 5 + 4 + 1
    assert_same_weights(resumed.model, straight.model)
    assert entries(resumed.journal) == entries(straight.journal)
