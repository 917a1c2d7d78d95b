"""The weights before the first edit along a run: found again on resuming, in no checkpoint, never mistaken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import PowerCut, assert_same_weights, data, quick_editor, trainer, write_corpus
from lightning.pytorch import Callback
from lit_edit.callbacks import EditCheckpoint, ExportModel, MatrixStability

from lit_edit import LitEdit, load_model
from lit_edit.editors import Editor, FineTune, LocateThenEdit
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.restraints import PRUNE, OEditPlus
from lit_edit.editors.solvers import ROME
from lit_edit.editors.values import OEdit, ValueOptimizer
from lit_edit.module import CHECKPOINT_KEY
from lit_edit.runs.delta import load_delta

pytestmark = [
    pytest.mark.filterwarnings("ignore:. of the facts are in the weights already"),
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]

Folder = Callable[[str], Path]
NAME = "transformer.h.{}.mlp.c_proj.weight"


class Choosing(FixedLayers):
    """May edit all layers of a tiny model, and edits one of them a request: 1 twice, then 3."""

    def __init__(self) -> None:
        super().__init__([0, 1, 2, 3])

    def choose(self, workspace: Any, requests: Any, *more: Any) -> Any:
        self.layers = [1 if requests[0].case_id in ("c0", "c1") else 3]
        found = super().choose(workspace, requests, *more)
        self.layers = [0, 1, 2, 3]
        return found


def editor(kind: str = "none") -> Editor:
    """With O-Edit and PRUNE as restraints and as a penalty."""
    restraints: list[Any] = {"prune": [PRUNE(form="linear", every_n=2)], "o-edit+": [OEditPlus(0.0)]}.get(kind, [])
    penalties = [OEdit(5.0, 0.0, 0.0)] if kind == "o-edit" else None
    lr = 3.0 if kind == "prune" else 0.3
    values = ValueOptimizer("mlp", lr=lr, lr_unit="relative", steps=3, stop_loss=0.0, penalties=penalties)
    return LocateThenEdit(Choosing(), values, ROME(covariance=False), contexts=0, restraints=restraints)


def module_of(editor: Editor, tiny_folder: Folder, tmp_path: Path, family: str = "gpt2") -> LitEdit:
    return LitEdit(editor, str(tiny_folder(family)), corpus=str(write_corpus(tmp_path)))


def fit(module: LitEdit, root: Path, *callbacks: Callback, count: int = 4, ckpt_path: Path | None = None) -> None:
    try:
        trainer(root, *callbacks).fit(module, datamodule=data(root, count), ckpt_path=ckpt_path, weights_only=True)
    except RuntimeError as error:
        assert str(error) == "power cut"  # noqa: PT017 - not raised in every call


def edited(module: LitEdit) -> dict[str, torch.Tensor]:
    """The originals of the layers that were edited."""
    assert module.session is not None
    return {site.name: site.original_stored for site in module.session.sites if site.edited}


def stored(path: Path) -> dict[int, torch.Tensor]:
    """The weights in a checkpoint, by layer."""
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"] == {}
    for key, state in saved["callbacks"].items():
        assert not key.startswith("MatrixStability") or state["reference"] == {}
    return {layer: state["stored"] for layer, state in saved[CHECKPOINT_KEY]["sites"].items() if "stored" in state}


@pytest.mark.parametrize(("kind", "cut"), [("prune", 1), ("prune", 3), ("o-edit+", 3), ("o-edit", 3)])
def test_a_resumed_run_has_the_originals_of_an_uninterrupted_one(
    tiny_folder: Folder, tmp_path: Path, kind: str, cut: int
) -> None:
    """Drift, the delta, and what is computed from the originals; before and after the second layer's first edit."""
    drifts, deltas, modules = [], [], []
    for resumed in (False, True):
        root = tmp_path / str(resumed)
        root.mkdir()
        ends = (MatrixStability(every_n=100), ExportModel(model=False, delta=True))
        path = None
        if resumed:
            first = module_of(editor(kind), tiny_folder, root)
            fit(first, root, MatrixStability(every_n=100), EditCheckpoint(str(root), every_n=1), PowerCut(cut))
            path = root / "edits.ckpt"
            assert set(stored(path)) == ({1} if cut == 1 else {1, 3})
        modules.append(module_of(editor(kind), tiny_folder, root))
        fit(modules[-1], root, *ends, ckpt_path=path)
        drifts.append(ends[0].latest)
        deltas.append((root / "delta.safetensors").read_bytes())
    assert_same_weights(modules[0].model, modules[1].model)
    assert drifts[0] == drifts[1]
    assert drifts[0]["stability/mean_relative_drift"] > 0
    assert deltas[0] == deltas[1]
    unedited = load_model(str(tiny_folder("gpt2")))[0]
    whole = dict(unedited.named_parameters())
    for module in modules:
        assert set(edited(module)) == {NAME.format(layer) for layer in (1, 3)}
        assert all(torch.equal(copy, whole[name]) for name, copy in edited(module).items())
    load_delta(unedited, tmp_path / "True" / "delta.safetensors")
    assert_same_weights(unedited, modules[0].model)


def test_a_callback_that_comes_later_measures_from_before_the_first_edit(tiny_folder: Folder, tmp_path: Path) -> None:
    """Here MOSE, which may edit every layer and edits few: the others are not copied."""
    module = module_of(quick_editor("mose"), tiny_folder, tmp_path, "llama")
    fit(module, tmp_path, count=1)
    late = MatrixStability(every_n=100)
    fit(module, tmp_path, late, count=2)
    assert late._reference == {}
    unedited = load_model(str(tiny_folder("llama")))[0].state_dict()
    assert set(edited(module)) == {f"model.layers.{i}.mlp.down_proj.weight" for e in module.journal for i in e.layers}
    for name, weight in module.edited_parameters().items():
        drift = float((weight.double() - unedited[name].double()).norm() / unedited[name].double().norm())
        assert (drift > 0) == (name in edited(module))
        assert late.latest[f"stability/{name}/relative_drift"] == pytest.approx(drift, rel=1e-6)
        copy, same = (module.original_parameter(called) for called in (name, f"model.{name}"))
        assert torch.equal(copy, unedited[name])
        assert copy.data_ptr() == same.data_ptr()
        assert (copy.data_ptr() == weight.data_ptr()) == (drift == 0)
    with pytest.raises(AttributeError):
        module.original_parameter("transformer.nothing")


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 1]])
def test_a_checkpoint_of_other_editable_layers_is_refused_although_it_lacks_their_weights(
    tiny_folder: Folder, tmp_path: Path, layers: list[int]
) -> None:
    fit(module_of(editor(), tiny_folder, tmp_path), tmp_path, EditCheckpoint(str(tmp_path)), count=1)
    assert set(stored(tmp_path / "edits.ckpt")) == {1}
    other = module_of(FineTune(layers, steps=1), tiny_folder, tmp_path)
    with pytest.raises(ValueError, match=r"holds the layers 0, 1, 2, 3, this run edits 0, 1.*resume with the method"):
        fit(other, tmp_path, ckpt_path=tmp_path / "edits.ckpt")


def test_a_checkpoint_takes_back_what_was_edited_since(tiny_folder: Folder, tmp_path: Path) -> None:
    """The second layer's first edit comes after it."""
    module, saving = module_of(editor(), tiny_folder, tmp_path), EditCheckpoint(str(tmp_path), every_n=[2])
    saving.at_end = False
    fit(module, tmp_path, saving)
    path, expected = tmp_path / "edits.ckpt", {n: w.clone() for n, w in module.model.state_dict().items()}
    seen: list[set[str]] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(set(edited(pl_module)))

    fit(module, tmp_path, Look(), ckpt_path=path)
    assert seen == [{NAME.format(1)}]
    torch.testing.assert_close(dict(module.model.state_dict()), expected, rtol=0, atol=0)


def test_an_editor_that_writes_in_secret_is_found_out(tiny_folder: Folder, tmp_path: Path) -> None:
    """Its weight would be in no checkpoint and no delta, and be taken for its own original."""

    class Secret(FineTune):
        def apply(self, workspace: Any, plan: Any) -> Any:
            workspace.architecture[0].weight.add_(1.0)
            return super().apply(workspace, plan)

        def editable_layers(self, workspace: Any) -> list[int]:
            return [0, 1]

    module = module_of(Secret([1], steps=1), tiny_folder, tmp_path)
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_proj\.weight' was changed by other means"):
        fit(module, tmp_path, count=1)
