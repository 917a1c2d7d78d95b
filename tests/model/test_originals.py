"""The weights before the first edit: one copy, made at the first write, found again on resuming, in no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import make_workspace, matrix_of
from helpers.runs import PowerCut, assert_same_weights, data, quick_editor, trainer, write_corpus
from lightning.pytorch import Callback, LightningModule, Trainer
from lit_edit.callbacks import EditCheckpoint, EveryNEdits, ExportModel, MatrixStability
from lit_edit.editors.writing import all_or_nothing
from lit_edit.model.originals import Originals
from torch import nn

from lit_edit import LitEdit, load_model
from lit_edit.algebra.updates import Additive
from lit_edit.editors import Editor, FineTune, LocateThenEdit
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.restraints import PRUNE, OEditPlus
from lit_edit.editors.solvers import ROME
from lit_edit.editors.values import OEdit, ValueOptimizer
from lit_edit.files import save_checkpoint
from lit_edit.module import CHECKPOINT_KEY
from lit_edit.runs.delta import load_delta

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]

Folder = Callable[[str], Path]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, dtype=torch.bfloat16), nn.Linear(4, 2)).requires_grad_(False)


# The store


def test_a_weight_is_copied_once_when_it_is_first_written(net: Any) -> None:
    store, before = Originals(net), net[0].weight.clone()
    store.keep()
    assert store.get("0.weight").data_ptr() == net[0].weight.data_ptr()  # its own original
    assert store.copies == {}
    for first in (True, False):
        assert store.before_write("0.weight") is first
        net[0].weight.mul_(2)
    copy = store.get("0.weight")
    assert (copy.device.type, copy.dtype) == ("cpu", torch.bfloat16)
    assert torch.equal(copy, before)
    assert set(store.copies) == {"0.weight"}
    assert [name for name, _ in net.named_parameters() if store.changed(name)] == ["0.weight"]


def test_nothing_is_kept_where_nobody_asks(net: Any) -> None:
    store = Originals(net)
    assert store.before_write("0.weight")
    net[0].weight.mul_(2)
    assert store.get("0.weight") is None
    assert store.get("1.weight") is None
    assert store.copies == {}
    assert store.changed("0.weight")
    with pytest.raises(ValueError, match=r"1 weights were written before anybody asked .*'0\.weight'"):
        store.keep()


def test_a_weight_that_was_changed_in_secret_is_found_out(net: Any) -> None:
    store = Originals(net)
    store.keep()
    net[0].weight.detach()[0, 0] += 1
    assert store.changed("0.weight")
    for ask in (store.get, store.before_write, store.former):
        with pytest.raises(ValueError, match=r"'0\.weight' was changed past the editor.*all_or_nothing"):
            ask("0.weight")
    assert store.get("1.weight") is not None
    with pytest.raises(AttributeError, match="nothing"):
        store.get("nothing")


@pytest.mark.parametrize("kept", [True, False])
def test_a_write_that_was_taken_back_never_was(net: Any, kept: bool) -> None:
    store, before = Originals(net), net[0].weight.clone()
    if kept:
        store.keep()
    former = store.former("0.weight")
    if kept:
        assert former.weight.data_ptr() == store.get("0.weight").data_ptr()  # not cloned twice
    net[0].weight.mul_(2)
    later = store.former("0.weight")
    net[0].weight.mul_(2)
    store.take_back("0.weight", later)
    assert torch.equal(net[0].weight, 2 * before)
    assert store.changed("0.weight")
    store.take_back("0.weight", former)
    assert torch.equal(net[0].weight, before)
    assert not store.changed("0.weight")
    assert store.copies == {}
    store.keep()
    assert torch.equal(store.get("0.weight"), before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_or_nothing_tells_of_every_write(family: str) -> None:
    workspace = make_workspace(tiny_model(family))
    workspace.originals.keep()
    before = matrix_of(workspace.model, 1)
    part = workspace.architecture[1]

    def write(error: bool) -> None:
        with all_or_nothing(workspace) as into:
            into(1, Additive(torch.ones_like(before)))
            into(1, Additive(torch.ones_like(before)))
            if error:
                raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        write(True)
    assert workspace.originals.copies == {}
    write(False)
    with pytest.raises(KeyError, match="stop"):
        write(True)
    assert set(workspace.originals.copies) == {part.name}
    assert torch.equal(workspace.original(1), before)  # (d, p), whichever way it is stored
    assert torch.equal(part.weight, before + 2)
    assert workspace.original(2).data_ptr() == workspace.architecture[2].weight.data_ptr()


# In runs


class Choosing(FixedLayers):
    """May edit all layers of a tiny model, and edits one of them a request."""

    def __init__(self, *layers: int) -> None:
        super().__init__([0, 1, 2, 3])
        self.chosen, self.asked = layers, 0

    def choose(self, workspace: Any, requests: Any, *more: Any) -> Any:
        self.layers = [self.chosen[0] if requests[0].case_id in ("c0", "c1") else self.chosen[1]]
        found = super().choose(workspace, requests, *more)
        self.layers = [0, 1, 2, 3]
        return found


def restrained(kind: str) -> Editor:
    """Edits layers 1 and 3 of all; O-Edit and PRUNE as restraints and as a penalty."""
    restraints: list[Any] = {"prune": [PRUNE(form="linear", every_n=2)], "o-edit+": [OEditPlus(0.0)]}.get(kind, [])
    penalties = [OEdit(5.0, 0.0, 0.0)] if kind == "o-edit" else None
    lr = 3.0 if kind == "prune" else 0.3
    values = ValueOptimizer("mlp", lr=lr, lr_unit="relative", steps=3, stop_loss=0.0, penalties=penalties)
    return LocateThenEdit(Choosing(1, 3), values, ROME(covariance=False), contexts=0, restraints=restraints)


def module_of(editor: Editor, tiny_folder: Folder, tmp_path: Path) -> LitEdit:
    return LitEdit(editor, str(tiny_folder("gpt2")), corpus=str(write_corpus(tmp_path)))


def fit(module: LitEdit, root: Path, *callbacks: Callback, count: int = 4, ckpt_path: Path | None = None) -> None:
    try:
        trainer(root, *callbacks).fit(module, datamodule=data(root, count), ckpt_path=ckpt_path, weights_only=True)
    except RuntimeError as error:
        assert str(error) == "power cut"  # noqa: PT017 - not raised in every call


@pytest.mark.parametrize("kind", ["prune", "o-edit+", "o-edit"])
@pytest.mark.parametrize("cut", [1, 3])
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
            first = module_of(restrained(kind), tiny_folder, root)
            fit(first, root, MatrixStability(every_n=100), EditCheckpoint(str(root), every_n=1), PowerCut(cut))
            path = root / "edits.ckpt"
            saved = torch.load(path, weights_only=True)
            assert len(saved["state_dict"]) == (1 if cut == 1 else 2)
        modules.append(module_of(restrained(kind), tiny_folder, root))
        fit(modules[-1], root, *ends, ckpt_path=path)
        drifts.append(ends[0].latest)
        deltas.append((root / "delta.safetensors").read_bytes())
    assert_same_weights(modules[0].model, modules[1].model)
    assert drifts[0] == drifts[1]
    assert drifts[0]["stability/mean_relative_drift"] > 0
    assert deltas[0] == deltas[1]
    unedited = load_model(str(tiny_folder("gpt2")))[0]
    whole = {name: weight.clone() for name, weight in unedited.named_parameters()}
    stores = [module.session.workspace.originals for module in modules]  # type: ignore[union-attr]
    for store in stores:
        assert set(store.copies) == {f"transformer.h.{layer}.mlp.c_proj.weight" for layer in (1, 3)}
        assert all(torch.equal(copy, whole[name]) for name, copy in store.copies.items())
    load_delta(unedited, tmp_path / "True" / "delta.safetensors")
    assert_same_weights(unedited, modules[0].model)


def test_a_checkpoint_holds_neither_originals_nor_layers_that_were_not_edited(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    module = module_of(restrained("none"), tiny_folder, tmp_path)
    fit(module, tmp_path, MatrixStability(), EditCheckpoint(str(tmp_path)), count=2)
    saved = torch.load(tmp_path / "edits.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {"model.transformer.h.1.mlp.c_proj.weight"}
    assert set(saved[CHECKPOINT_KEY]["editable"]) == {f"model.transformer.h.{i}.mlp.c_proj.weight" for i in range(4)}
    (stability,) = (state for key, state in saved["callbacks"].items() if key.startswith("MatrixStability"))
    assert stability["reference"] == {}


class Asking(Callback):
    """Which originals are in memory at the end."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.copies = pl_module.session.workspace.originals.copies  # type: ignore[union-attr]


def test_copies_are_made_only_where_somebody_asks_and_once_for_all(tiny_folder: Folder, tmp_path: Path) -> None:
    asked = []
    for callbacks in ([], [MatrixStability(every_n=100)]):
        end = Asking()
        module = module_of(restrained("none"), tiny_folder, tmp_path)
        fit(module, tmp_path, *callbacks, end, count=2)
        asked.append(set(end.copies))
    assert asked == [set(), {"transformer.h.1.mlp.c_proj.weight"}]
    name = "transformer.h.1.mlp.c_proj.weight"
    store = module.session.workspace.originals  # type: ignore[union-attr]
    one, other = (module.original_parameter(called) for called in (name, f"model.{name}"))
    assert one is other is store.copies[name]
    assert module.session.workspace.original(1).data_ptr() == one.data_ptr()  # type: ignore[union-attr]
    assert callbacks[0]._reference == {}
    with pytest.raises(AttributeError):
        module.original_parameter("transformer.nothing")


def test_a_callback_that_comes_too_late_keeps_what_it_finds(tiny_folder: Folder, tmp_path: Path) -> None:
    module = module_of(restrained("none"), tiny_folder, tmp_path)
    fit(module, tmp_path, count=1)
    late = MatrixStability(every_n=100)
    with pytest.warns(UserWarning, match="drift is measured from the resumed weights"):
        fit(module, tmp_path, late, count=2)
    assert set(late._reference) == set(module.edited_parameters())


def older(path: Path, module: LitEdit) -> Path:
    """A checkpoint as it was made before: all editable weights, no names, and the callback's own copy."""
    saved = torch.load(path, weights_only=True)
    del saved[CHECKPOINT_KEY]["editable"]
    saved["state_dict"] = {f"model.{name}": weight for name, weight in module.edited_parameters().items()}
    (key,) = (key for key in saved["callbacks"] if key.startswith("MatrixStability"))
    saved["callbacks"][key]["reference"] = {
        name: module.original_parameter(name).clone()  # type: ignore[union-attr]
        for name in module.edited_parameters()
    }
    save_checkpoint(path.parent / "older.ckpt", saved)
    return path.parent / "older.ckpt"


def test_an_older_checkpoint_goes_on_as_a_new_one(tiny_folder: Folder, tmp_path: Path) -> None:
    first = module_of(restrained("prune"), tiny_folder, tmp_path)
    fit(first, tmp_path, MatrixStability(every_n=100), EditCheckpoint(str(tmp_path)), count=2)
    found = []
    for path in (tmp_path / "edits.ckpt", older(tmp_path / "edits.ckpt", first)):
        module, stability = module_of(restrained("prune"), tiny_folder, tmp_path), MatrixStability(every_n=100)
        again = EditCheckpoint(str(path.parent / path.stem))
        fit(module, tmp_path, stability, again, ckpt_path=path)
        saved = torch.load(path.parent / path.stem / "edits.ckpt", weights_only=True)
        found.append((stability.latest, dict(module.model.state_dict()), set(saved["state_dict"])))
        assert stability._reference == {}
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)
    assert found[0][2] == found[1][2] == {f"model.transformer.h.{i}.mlp.c_proj.weight" for i in (1, 3)}


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 1, 2, 3, 3]])
def test_a_checkpoint_of_other_editable_layers_is_refused_although_it_lacks_them(
    tiny_folder: Folder, tmp_path: Path, layers: list[int]
) -> None:
    fit(module_of(restrained("none"), tiny_folder, tmp_path), tmp_path, EditCheckpoint(str(tmp_path)), count=1)
    path = tmp_path / "edits.ckpt"
    if len(layers) == 5:  # the same layers, and a weight that none of them has
        saved = torch.load(path, weights_only=True)
        saved["state_dict"]["model.lm_head.weight"] = torch.ones(2, 2)
        save_checkpoint(path, saved)
    other = module_of(FineTune(sorted(set(layers)), steps=1), tiny_folder, tmp_path)
    with pytest.raises(ValueError, match=r"holds the weights model\.(lm_head|transformer).*resume with the model and"):
        fit(other, tmp_path, ckpt_path=path)


@pytest.mark.parametrize("kept", [True, False])
def test_a_checkpoint_takes_back_what_was_edited_since(tiny_folder: Folder, tmp_path: Path, kept: bool) -> None:
    """The second layer's first edit comes after it."""
    module, callbacks = module_of(restrained("none"), tiny_folder, tmp_path), [MatrixStability()] if kept else []
    saving = EditCheckpoint(str(tmp_path), every_n=[2])
    saving.at_end = False
    fit(module, tmp_path, *callbacks, saving)
    path, expected = tmp_path / "edits.ckpt", {n: w.clone() for n, w in module.model.state_dict().items()}
    if not kept:
        with pytest.raises(ValueError, match=r"'transformer\.h\.3\.mlp\.c_proj\.weight' is unedited in the checkpoint"):
            fit(module, tmp_path, ckpt_path=path)
        return
    seen: list[bool] = []

    class Look(EveryNEdits):
        def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
            now = dict(pl_module.edited_parameters())  # type: ignore[operator]
            name = "transformer.h.3.mlp.c_proj.weight"
            seen.append(torch.equal(now[name], pl_module.original_parameter(name)))  # type: ignore[operator]
            return {}

    fit(module, tmp_path, MatrixStability(), Look(every_n=100), ckpt_path=path)
    assert seen == [True, False]
    torch.testing.assert_close(dict(module.model.state_dict()), expected, rtol=0, atol=0)


def test_an_editor_that_writes_in_secret_loses_no_weight(tiny_folder: Folder, tmp_path: Path) -> None:
    """Its layers are in the checkpoint; who asks for their originals is told that they are lost."""

    class Secret(FineTune):
        def apply(self, workspace: Any, plan: Any) -> Any:
            workspace.architecture[0].weight.add_(1.0)
            return super().apply(workspace, plan)

        def editable_layers(self, workspace: Any) -> list[int]:
            return [0, 1]

    module = module_of(Secret([1], steps=1), tiny_folder, tmp_path)
    fit(module, tmp_path, EditCheckpoint(str(tmp_path)), count=1)
    saved = torch.load(tmp_path / "edits.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(saved, {f"model.{n}": w for n, w in module.edited_parameters().items()})
    for asking in (MatrixStability(), ExportModel(model=False, delta=True)):
        module = module_of(Secret([1], steps=1), tiny_folder, tmp_path)
        with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_proj\.weight' was changed past the editor"):
            fit(module, tmp_path, asking, count=1)


def test_quick_methods_share_the_store(tiny_folder: Folder, tmp_path: Path) -> None:
    """MOSE may edit every layer and edits few."""
    module = LitEdit(quick_editor("mose"), str(tiny_folder("llama")), corpus=str(write_corpus(tmp_path)))
    stability = MatrixStability(every_n=100)
    fit(module, tmp_path, stability, count=1)
    edited = {f"model.layers.{i}.mlp.down_proj.weight" for i in module.journal[0].layers}
    assert set(module.session.workspace.originals.copies) == edited  # type: ignore[union-attr]
    still = set(module.edited_parameters()) - edited
    assert still
    for name in still:
        assert stability.latest[f"stability/{name}/relative_drift"] == 0
