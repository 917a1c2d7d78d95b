"""Where representations go: in ordinary training and in editing runs, against plain forward passes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import data, quick_editor, taught, trainer, write_corpus
from lit_edit.callbacks import RepresentationDrift
from lit_edit.callbacks.representation_drift import flattened
from torch import Tensor

from lit_edit import LitEdit
from lit_edit.runs.results import ResultsLogger, read_results

pytest.importorskip("sklearn", reason="scikit-learn draws these pictures")
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
]


def distance(before: Tensor, now: Tensor) -> float:
    return float(((now - before).norm(dim=1) / before.norm(dim=1)).mean())


def test_ordinary_training_moves_values_and_not_its_inputs(
    regression, make_trainer, vector_loader, tmp_path, monkeypatch
):
    monkeypatch.setattr(type(regression), "forward", lambda self, batch: self.net(batch), raising=False)
    batch = next(iter(vector_loader(32)))
    regression.eval()
    before = regression.net[0](batch).detach(), regression.net(batch).detach()
    regression.train()
    callback = RepresentationDrift(["net.0.weight"], every_n=100)
    make_trainer(callback, logger=ResultsLogger(tmp_path)).fit(regression, vector_loader(32))
    regression.eval()
    now = regression.net[0](batch).detach(), regression.net(batch).detach()
    last = read_results(tmp_path).records[-1]
    assert last["representation/keys"] == 0
    assert last["representation/values"] == pytest.approx(distance(before[0], now[0]), rel=1e-5)
    assert last["representation/hidden"] == pytest.approx(distance(before[1], now[1]), rel=1e-5)
    names = {path.stem for path in (tmp_path / "pictures").glob("*.png")}
    assert names == {f"representation-{k}-{m}" for k in ("keys", "values", "hidden") for m in ("pca", "tsne")}
    shown = json.loads((tmp_path / "pictures" / "representation-values-pca.json").read_text())["series"]
    points = torch.cat(list(before[:1]) + list(now[:1])).double()
    found = torch.tensor([*shown["before"], *shown["now"]], dtype=torch.float64)
    centred = points - points.mean(dim=0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(found.abs(), (u * s)[:, :2].abs(), rtol=1e-2, atol=1e-3)


def test_edits_are_compared_with_right_after_them(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model, tokenizer = taught(tiny_folder("llama"), steps=5)
    module = LitEdit(quick_editor("rome", contexts=False), model, tokenizer, corpus=str(write_corpus(tmp_path)))
    requests = data(tmp_path, 4)
    callback = RepresentationDrift(methods=["pca"])
    trainer(tmp_path, callback, logger=ResultsLogger(tmp_path / "run")).fit(module, datamodule=requests)
    last = read_results(tmp_path / "run").records[-1]
    assert last["representation/values"] > last["representation/keys"] == 0  # nothing below the layer was edited
    session = module.session
    assert session is not None
    (name,) = (place.removeprefix("values ") for place in callback._now if place.startswith("values "))
    site = session.sites[0]
    assert name == site.name
    for state, weight in ((callback._before, site.original), (callback._now, site.weight)):
        keys = state[f"keys {name}"]
        torch.testing.assert_close(state[f"values {name}"], keys @ weight.T, rtol=1e-4, atol=1e-4)
    _, now = callback._since_edit(f"values {name}")
    own = callback._own[f"values {name}"]
    assert list(own) == [0, 1, 2, 3]
    torch.testing.assert_close(own[3], now[3])  # nothing came after the last edit
    assert not torch.allclose(own[0], now[0])
    for i, request in enumerate(requests.requests):
        ids = tokenizer(request.prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(callback._now["hidden"][i], hidden, rtol=1e-4, atol=1e-4)
    shown = json.loads((tmp_path / "run" / "pictures" / "representation-hidden-pca.json").read_text())
    assert {label: len(points) for label, points in shown["series"].items()} == {
        "before": 4, "right after its edit": 4, "now": 4,
    }  # fmt: skip
    again = RepresentationDrift()
    again.load_state_dict(callback.state_dict())
    assert again._own.keys() == callback._own.keys()


def test_other_prompts_can_be_followed(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    texts = ["The king of Peru", "A river", "Nobody knows what it is", "The old tree"]
    module = LitEdit(quick_editor("ft"), str(tiny_folder("gpt2")))
    callback = RepresentationDrift(prompts=texts, n_inputs=3, methods=["pca"])
    trainer(tmp_path, callback).fit(module, datamodule=data(tmp_path, 1))
    assert {len(rows) for rows in callback._now.values()} == {3}
    assert not callback._own
    assert callback.latest.keys() == {f"representation/{kind}" for kind in ("keys", "values", "hidden")}


def test_what_cannot_be_followed_is_said(regression, make_trainer, vector_loader, tiny_folder, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"Regression\.predict_step, by default `forward`, which is not there"):
        make_trainer(RepresentationDrift()).fit(regression, vector_loader(8))
    module = LitEdit(quick_editor("ft"), str(tiny_folder("llama")))
    with pytest.raises(ValueError, match="has 2 edit prompts"):
        trainer(tmp_path, RepresentationDrift()).fit(module, datamodule=data(tmp_path, 2))
    with pytest.raises(ValueError, match="Methods are pca and tsne"):
        RepresentationDrift(methods=["umap"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least 3"):
        RepresentationDrift(n_inputs=2)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-edit\[analysis\]'"):
        RepresentationDrift()


def test_two_dimensions_of_odd_points() -> None:
    same = torch.ones(5, 4)
    assert flattened(same, "tsne").abs().max() < 1e-6
    assert flattened(torch.arange(4.0)[:, None], "pca").shape == (4, 2)
    broken: Any = flattened(torch.full((4, 3), float("nan")), "tsne")
    assert bool(broken.isnan().all())
    two = torch.cat([torch.zeros(10, 6), torch.full((10, 6), 50.0)]) + torch.randn(
        20, 6, generator=torch.Generator().manual_seed(0)
    )
    found = flattened(two, "tsne")
    torch.testing.assert_close(found, flattened(two, "tsne"))
    apart = (found[:10].mean(dim=0) - found[10:].mean(dim=0)).norm()
    assert apart > 2 * found[:10].std(dim=0).norm()
