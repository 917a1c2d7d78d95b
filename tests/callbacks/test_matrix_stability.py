from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_edit.callbacks import MatrixStability, matrix_figures, relative_drift, spectrum_drift
from torch import nn

from lit_edit.runs.results import ResultsLogger

# What Lightning says about runs as small as these, and what its own tree utilities call that torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def expected(weight: torch.Tensor, start: torch.Tensor) -> dict[str, float]:
    """The definitions in other words than the code: through `torch.linalg.norm`, `cond` and the eigenvalues of W Wᵀ."""
    weight, start = weight.double(), start.double()
    return {
        "frobenius_norm": weight.square().sum().sqrt().item(),
        "l1_norm": torch.linalg.vector_norm(weight, ord=1).item(),
        "spectral_norm": torch.linalg.norm(weight, ord=2).item(),
        "smallest_singular_value": torch.linalg.norm(weight, ord=-2).item(),
        "condition_number": torch.linalg.cond(weight).item(),
        "relative_drift": torch.dist(weight, start).item() / start.norm().item(),
        "spectrum_drift": (torch.linalg.svd(weight).S - torch.linalg.svd(start).S).norm().item() / start.norm().item(),
    }


class Snapshots(Callback):
    """The weights after each optimiser step, taken independently of the callback under test."""

    def __init__(self) -> None:
        self.taken: dict[int, dict[str, torch.Tensor]] = {}

    def _take(self, trainer, pl_module) -> None:
        copy = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.taken.setdefault(trainer.global_step, copy)

    def on_fit_start(self, trainer, pl_module):
        self._take(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._take(trainer, pl_module)  # automatic optimisation has stepped by now


def test_ordinary_fine_tuning_is_measured(regression, make_trainer, vector_loader, tmp_path):
    """The reuse promise: nothing here knows about editing."""
    snapshots, logger = Snapshots(), ResultsLogger(tmp_path)
    make_trainer(MatrixStability(every_n=3), snapshots, logger=logger).fit(regression, vector_loader(32))

    assert [record["edits"] for record in logger.records] == [0, 3, 6, 8]
    for record in logger.records:
        weights = snapshots.taken[record["edits"]]
        by_name = {name: expected(weights[name], snapshots.taken[0][name]) for name in ("net.0.weight", "net.3.weight")}
        flat = {f"stability/{n}/{figure}": value for n, figures in by_name.items() for figure, value in figures.items()}
        for figure in ("condition_number", "spectrum_drift"):
            flat[f"stability/worst_{figure}"] = max(f[figure] for f in by_name.values())
        for figure in ("frobenius_norm", "relative_drift"):
            flat[f"stability/mean_{figure}"] = sum(f[figure] for f in by_name.values()) / 2
        assert record == pytest.approx({"edits": record["edits"], **flat}, rel=1e-9, abs=1e-12)
    drift = [record["stability/mean_relative_drift"] for record in logger.records]
    assert drift[0] == 0
    assert drift[-1] > 0


def test_an_editing_module_says_what_it_edits(editor, make_trainer, edit_loader, tmp_path):
    editor.other = nn.Linear(3, 3)
    logger = ResultsLogger(tmp_path)
    make_trainer(MatrixStability(every_n=2), logger=logger).fit(editor, edit_loader(4, 1))
    drift = {record["edits"]: record["stability/matrix/relative_drift"] for record in logger.records}
    assert drift == {0: 0, 2: pytest.approx(2), 4: pytest.approx(4)}
    assert not any("other" in key for record in logger.records for key in record)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["net.0.weight"], {"net.0.weight"}),
        (["*.weight"], {"net.0.weight", "net.3.weight"}),
        (["n*3.w*"], {"net.3.weight"}),
        (["net.0.*"], {"net.0.weight"}),  # and not its bias
    ],
)
def test_patterns(regression, make_trainer, vector_loader, patterns, names):
    callback = MatrixStability(parameters=patterns)
    make_trainer(callback, max_steps=1).fit(regression, vector_loader())
    assert {key.split("/")[1] for key in callback.latest if key.count("/") == 2} == names


def test_frozen_matrices_are_watched_only_by_name(regression, make_trainer, vector_loader):
    regression.net[0].requires_grad_(False)
    callback = MatrixStability()
    make_trainer(callback, max_steps=1).fit(regression, vector_loader())
    assert not any("net.0" in key for key in callback.latest)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["*.down_proj.weight"], r"no parameter of Regression matches '\*\.down_proj\.weight'.*net\.0\.weight, net\.3"),
        (["net.0.bias"], r"'net\.0\.bias' has the shape \(6,\)"),
    ],
)
def test_bad_patterns_stop_the_run_before_it_starts(regression, make_trainer, vector_loader, patterns, message):
    trainer = make_trainer(MatrixStability(parameters=patterns, at_start=False, every_n=1000))
    with pytest.raises(ValueError, match=message):
        trainer.fit(regression, vector_loader())
    assert trainer.global_step == 0


def test_a_module_without_a_matrix_is_refused(regression, make_trainer, vector_loader):
    regression.requires_grad_(False)
    regression.scale = nn.Parameter(torch.ones(1))
    regression.training_step = lambda batch, batch_idx: (regression.scale * batch).mean()
    with pytest.raises(ValueError, match="has no edited or trainable matrix"):
        make_trainer(MatrixStability()).fit(regression, vector_loader())


@pytest.mark.parametrize(
    ("parameters", "message"), [([], "empty list"), ("net.0.weight", "should be a list of patterns")]
)
def test_arguments_are_checked(parameters, message):
    with pytest.raises(ValueError, match=message):
        MatrixStability(parameters=parameters)
    with pytest.raises(ValueError, match="every_n"):
        MatrixStability(every_n=0)


def test_a_resumed_run_gives_the_figures_of_an_unbroken_one(regression, make_trainer, vector_loader, tmp_path):
    start = {name: value.clone() for name, value in regression.state_dict().items()}
    regression.net[2].p = 0.0
    unbroken = ResultsLogger(tmp_path / "unbroken")
    make_trainer(MatrixStability(every_n=2), logger=unbroken, max_epochs=2).fit(regression, vector_loader(12))

    regression.load_state_dict(start)
    saver = ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="half", save_on_train_epoch_end=True)
    broken = ResultsLogger(tmp_path / "broken")
    make_trainer(MatrixStability(every_n=2), saver, logger=broken, enable_checkpointing=True).fit(
        regression, vector_loader(12)
    )

    # A new process would build the module anew, with other starting weights than the checkpoint's run had.
    torch.manual_seed(99)
    resumed = type(regression)()
    resumed.net[2].p = 0.0
    continued = ResultsLogger(tmp_path / "broken")
    make_trainer(MatrixStability(every_n=2), logger=continued, max_epochs=2).fit(
        resumed, vector_loader(12), ckpt_path=tmp_path / "checkpoints" / "half.ckpt", weights_only=True
    )
    assert [record["edits"] for record in unbroken.records] == [0, 2, 4, 6]
    assert [record["edits"] for record in continued.records] == [0, 2, 3, 4, 6]  # 3 was the end of the first part
    by_count = {record["edits"]: record for record in continued.records}
    for record in unbroken.records:
        assert by_count[record["edits"]] == pytest.approx(record, rel=1e-6)


def test_added_on_resume_it_says_where_drift_starts(regression, make_trainer, vector_loader, tmp_path):
    trainer = make_trainer(max_steps=3)
    trainer.fit(regression, vector_loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    callback = MatrixStability(every_n=3)
    with pytest.warns(UserWarning, match=r"No starting weights of net\.0\.weight, net\.3\.weight were saved"):
        make_trainer(callback, max_steps=6, max_epochs=2).fit(
            regression, vector_loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=True
        )
    assert callback.latest["stability/mean_relative_drift"] > 0


def test_two_of_them_in_one_run_keep_their_own_state(regression, make_trainer, vector_loader, tmp_path):
    trainer = make_trainer(
        MatrixStability(["net.0.weight"], every_n=2), MatrixStability(["net.3.weight"], every_n=5), max_steps=6
    )
    trainer.fit(regression, vector_loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    states = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]
    kept = [list(state["reference"]) for key, state in states.items() if key.startswith("MatrixStability")]
    assert kept == [["net.0.weight"], ["net.3.weight"]]


class TestFigures:
    def test_against_other_definitions(self):
        weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
        start = weight + 0.1
        drift = {"relative_drift": relative_drift(weight, start), "spectrum_drift": spectrum_drift(weight, start)}
        figures = {**matrix_figures(weight), **drift}
        assert figures == pytest.approx(expected(weight, start), rel=1e-10)

    def test_orientation_does_not_matter(self):
        weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
        assert matrix_figures(weight.T) == pytest.approx(matrix_figures(weight), rel=1e-12)

    def test_half_precision_is_summed_in_double(self):
        weight = torch.full((300, 300), 1.0, dtype=torch.bfloat16)
        figures = matrix_figures(weight)
        assert figures["l1_norm"] == 90_000
        assert figures["frobenius_norm"] == pytest.approx(300, rel=1e-14)

    def test_a_singular_matrix_has_no_condition(self):
        assert matrix_figures(torch.zeros(2, 3))["condition_number"] == math.inf

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_diverged_weights_give_nan(self, value):
        weight = torch.eye(3)
        weight[0, 1] = value
        assert all(math.isnan(figure) for figure in matrix_figures(weight).values())

    def test_a_diverged_matrix_shows_among_healthy_ones(self, regression, make_trainer):
        callback = MatrixStability()
        callback.on_train_start(make_trainer(), regression)
        with torch.no_grad():
            regression.net[3].weight[0, 0] = math.nan
        figures = callback.measure(make_trainer(), regression, 0)
        assert math.isnan(figures["stability/worst_condition_number"])
        assert math.isnan(figures["stability/mean_relative_drift"])
        assert math.isnan(figures["stability/worst_spectrum_drift"])
        assert math.isfinite(figures["stability/net.0.weight/condition_number"])

    @pytest.mark.parametrize("shape", [(3,), (2, 2, 2), (0, 4)])
    def test_only_matrices(self, shape):
        with pytest.raises(ValueError, match="matrix with at least one entry"):
            matrix_figures(torch.ones(shape))

    def test_drift_from_zero(self):
        assert relative_drift(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
        assert relative_drift(torch.ones(2, 2), torch.zeros(2, 2)) == math.inf

    def test_the_spectrum_of_a_turned_matrix_drifts_by_rounding_only(self):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(24, 40, generator=generator)
        q = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
        for dtype, unit in (
            (torch.float64, 1e-16),
            (torch.float32, 6e-8),
            (torch.float16, 5e-4),
            (torch.bfloat16, 4e-3),
        ):
            start = weight.to(dtype)
            turned = (q @ start.double()).to(dtype)
            assert relative_drift(turned, start) > 1
            assert spectrum_drift(turned, start) < 10 * unit
            if dtype != torch.float64:
                assert spectrum_drift(turned, start) > unit / 100

    def test_no_spectrum_drifts_farther_than_its_matrix(self):
        generator = torch.Generator().manual_seed(1)
        for size in (1e-3, 1.0, 1e3):
            weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
            moved = weight + size * torch.randn(6, 9, generator=generator, dtype=torch.float64)
            assert 0 < spectrum_drift(moved, weight) <= relative_drift(moved, weight) * (1 + 1e-12)
        assert spectrum_drift(3 * weight, weight) == pytest.approx(2, rel=1e-12)

    def test_drift_from_a_reference_that_is_not_finite(self):
        assert math.isnan(spectrum_drift(torch.eye(2), torch.full((2, 2), math.inf)))
        assert math.isnan(relative_drift(torch.eye(2), torch.full((2, 2), math.nan)))

    def test_drift_needs_one_shape(self):
        with pytest.raises(ValueError, match="shapes differ"):
            relative_drift(torch.ones(2, 2), torch.ones(2, 3))
        with pytest.raises(ValueError, match="matrices of one shape"):
            spectrum_drift(torch.ones(2, 2), torch.ones(2, 3))
