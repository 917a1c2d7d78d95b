"""What is seen of the update of every batch: in ordinary training, and in editing runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import data, quick_editor, trainer, write_corpus
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lit_edit.callbacks import ActivationScore, Spectrum, UpdateOrthogonality, matrix_figures
from lit_edit.callbacks.update_orthogonality import cosine, leading
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lit_edit import LitEdit
from lit_edit.runs.results import ResultsLogger, read_results

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
]

Folder = Callable[[str], Path]
NAMES = ("net.0.weight", "net.3.weight")


class Steps(Callback):
    """The weights before and after each optimiser step, and the inputs of each matrix, taken independently."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.inputs: list[dict[str, Tensor]] = []
        self._seen: dict[str, list[Tensor]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._copy(pl_module)
        for name in NAMES:
            module = pl_module.get_submodule(name.removesuffix(".weight"))
            module.register_forward_hook(
                lambda _, args, output, name=name: self._seen.setdefault(name, []).append(args[0].detach().clone())
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._copy(pl_module)
        self.inputs.append({name: torch.cat(rows).double() for name, rows in self._seen.items()})
        self._seen = {}

    def _copy(self, pl_module: Any) -> None:
        self.weights.append({name: pl_module.get_parameter(name).detach().double().clone() for name in NAMES})

    def updates(self, name: str) -> list[Tensor]:
        taken = [step[name] for step in self.weights]
        return [after - before for before, after in pairwise(taken)]


def picture(folder: Path, name: str) -> dict[str, Any]:
    for ending in ("svg", "png"):
        assert (folder / "pictures" / f"{name}.{ending}").stat().st_size > 1000
    found: dict[str, Any] = json.loads((folder / "pictures" / f"{name}.json").read_text())
    return found


def test_cosines_between_the_steps_of_ordinary_training(regression, make_trainer, vector_loader, tmp_path):
    steps, logger = Steps(), ResultsLogger(tmp_path)
    callback = UpdateOrthogonality(every_n=4)
    make_trainer(callback, steps, logger=logger, max_epochs=1).fit(regression, vector_loader(32))
    means = []
    for name in NAMES:
        left = [torch.linalg.svd(update).U[:, 0] for update in steps.updates(name)]
        expected = torch.stack([torch.stack([abs(a @ b) for b in left]) for a in left])
        torch.testing.assert_close(callback.cosines(name), expected, atol=1e-4, rtol=0)
        shown = torch.tensor(
            [
                [math.nan if v is None else v for v in row]
                for row in picture(tmp_path, f"orthogonality-{name}")["matrix"]
            ]
        )
        assert bool(shown.diagonal().isnan().all())
        off = ~torch.eye(8, dtype=torch.bool)
        torch.testing.assert_close(shown[off].double(), expected[off], atol=2e-3, rtol=0)
        means.append(expected[off].mean())
    assert read_results(tmp_path).records[-1]["orthogonality/mean_cosine"] == pytest.approx(
        float(sum(means)) / 2, abs=1e-4
    )


def test_scores_of_ordinary_training_are_the_papers(regression, make_trainer, vector_loader, tmp_path):
    steps, logger = Steps(), ResultsLogger(tmp_path)
    callback = ActivationScore(every_n=4)
    make_trainer(callback, steps, logger=logger).fit(regression, vector_loader(32))
    unrelated, own = [], []
    for name in NAMES:
        updates = steps.updates(name)
        for i, update in enumerate(updates):
            key = steps.inputs[i][name].mean(dim=0)
            own.append(float((update @ key).norm()))
            unrelated.append(float((sum(updates) - update).mv(key).norm()))  # type: ignore[union-attr]
    last = read_results(tmp_path).records[-1]
    assert last["activation/own"] == pytest.approx(sum(own) / len(own), rel=1e-3)
    assert last["activation/unrelated"] == pytest.approx(sum(unrelated) / len(unrelated), rel=1e-3)
    shown = picture(tmp_path, "activation-unrelated")["series"]
    assert [x for x, _ in shown[NAMES[0]]] == list(range(1, 9))
    assert [y for name in NAMES for _, y in shown[name]] == pytest.approx(unrelated, rel=1e-3)


def test_a_step_of_several_batches_is_one_update(regression, make_trainer, vector_loader):
    callback = UpdateOrthogonality()
    make_trainer(callback, accumulate_grad_batches=3).fit(regression, vector_loader(36))
    assert list(callback.kept) == [1, 2, 3]


def test_a_sample_is_of_the_whole_run_and_repeats(regression, make_trainer, vector_loader):
    callback = UpdateOrthogonality(n_updates=3, every_n=100)
    make_trainer(callback).fit(regression, vector_loader(40))
    kept: list[int] = []
    for number in range(1, 11):
        place = callback._place(number)
        if place is not None and len(kept) == 3:
            del kept[place]
        kept += [number] if place is not None else []
    assert sorted(callback.kept) == kept
    assert kept != [1, 2, 3]
    samples = [[UpdateOrthogonality(n_updates=4, seed=s)._place(n) for n in range(5, 2000)] for s in (5, 5, 6)]
    assert samples[0] == samples[1] != samples[2]
    for sample in samples:  # every batch with the same chance: 4 / n
        assert {place for place in sample if place is not None} == {0, 1, 2, 3}
        assert 10 < sum(place is not None for place in sample) < 40  # 4 ln(2000 / 4) = 25 expected


def test_column_spaces_of_several_directions() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    assert cosine(eye[:, :2], eye[:, :2]) == pytest.approx(1)
    assert cosine(eye[:, :2], eye[:, 2:4]) == 0
    assert cosine(eye[:, :2], eye[:, 1:3]) == pytest.approx(0.5**0.5)
    assert cosine(eye[:, :1], eye[:, :3]) == pytest.approx(1)  # one within the other
    change = eye[:, :1] @ eye[:1] * 3 + eye[:, 1:2] @ eye[1:2] + 1e-6 * eye[:, 2:3] @ eye[2:3]
    assert leading(change, 1).shape == (6, 1)
    assert leading(change, 5).shape == (6, 2)  # what is left is rounding
    with pytest.raises(ValueError, match="at least one direction"):
        UpdateOrthogonality(rank=0)
    with pytest.raises(ValueError, match="at least 2"):
        UpdateOrthogonality(n_updates=1)


@pytest.mark.parametrize("family", ["gpt2"])
def test_edits_have_their_own_keys_and_are_resumed(family: str, tiny_folder: Folder, tmp_path: Path) -> None:
    """O-Edit+ makes updates orthogonal; what the scores say of an edit is what its update does to its key."""
    editor = quick_editor("o-edit-plus-memit", contexts=False)
    module = LitEdit(editor, str(tiny_folder(family)), corpus=str(write_corpus(tmp_path)))
    orthogonality, scores = UpdateOrthogonality(), ActivationScore()
    board = TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, orthogonality, scores, logger=[board, ResultsLogger(tmp_path)]).fit(
        module, datamodule=data(tmp_path, 4)
    )
    session = module.session
    assert session is not None
    steps = [session.updates.steps(write) for write in session.updates.writes]
    for site in session.sites:
        cosines = orthogonality.cosines(site.name)
        assert len(cosines) == 4
        assert float((cosines - torch.eye(4)).abs().max()) < 1e-2
        updates = [step.update.delta(site.weight) for edit in steps for step in edit if step.layer == site.layer]
        found = scores.scores(module, site.name)
        assert list(found) == [1, 2, 3, 4]
        for update, key, (unrelated, own) in zip(updates, site.keys.double().T, found.values(), strict=True):
            assert float(own) == pytest.approx(float((update @ key).norm()), rel=1e-3)
            others = torch.stack(updates).sum(dim=0) - update
            assert float(unrelated) == pytest.approx(float((others @ key).norm()), rel=1e-2)
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["images"]
    assert {tag.split("-")[0] for tag in tags} == {"pictures/orthogonality", "pictures/activation"}
    state = scores.state_dict()
    again = ActivationScore()
    again.load_state_dict(state)
    assert again.scores(module, module.session.sites[0].name).keys() == {1, 2, 3, 4}


def test_an_editor_without_keys_is_told(tiny_folder: Folder, tmp_path: Path) -> None:
    module = LitEdit(quick_editor("ft"), str(tiny_folder("llama")))
    with pytest.warns(UserWarning, match="nothing to show for editors without keys"):
        trainer(tmp_path, ActivationScore()).fit(module, datamodule=data(tmp_path, 2))
    assert not (tmp_path / "pictures").exists()


def test_the_picture_of_spectra_is_what_the_matrices_have(regression, make_trainer, vector_loader, tmp_path):
    start = {name: regression.get_parameter(name).detach().clone() for name in NAMES}
    logger = ResultsLogger(tmp_path)
    make_trainer(Spectrum(every_n=5), logger=logger).fit(regression, vector_loader(32))
    for name in NAMES:
        now = regression.get_parameter(name).detach()
        shown = picture(tmp_path, f"spectrum-{name}")
        for side, weight in (("before", start[name]), ("after", now)):
            values = torch.linalg.svdvals(weight.double()).tolist()
            assert shown["series"][side] == [[i + 1, pytest.approx(v, rel=1e-3)] for i, v in enumerate(values)]
        expected = matrix_figures(now)
        last = read_results(tmp_path).records[-1]
        assert {f: last[f"spectrum/{name}/{f}"] for f in ("spectral_norm", "l1_norm")} == pytest.approx(
            {f: expected[f] for f in ("spectral_norm", "l1_norm")}
        )
        moved = float(torch.linalg.matrix_norm((now - start[name]).double(), 2))
        assert last[f"spectrum/{name}/update_spectral_norm"] == pytest.approx(moved, rel=1e-4)
        assert read_results(tmp_path).records[0][f"spectrum/{name}/update_spectral_norm"] == 0
    assert [record["edits"] for record in read_results(tmp_path).records] == [0, 5, 8]
