"""`LitEdit` under a real Trainer: the order of hooks, resuming, checkpoints, logging."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.runs import PowerCut, assert_same_weights, data, entries, quick_editor, trainer, write_corpus, write_facts
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lit_edit.callbacks import EditCheckpoint, EditProgressBar, EveryNEdits, MatrixStability, Retention, progress
from lit_edit.datamodules import EditLoader, FactsDataModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_edit import LitEdit, edit, load_model
from lit_edit.editors import Editor, FineTune, LocateThenEdit
from lit_edit.editors.layers import ActivationSelection, FixedLayers
from lit_edit.editors.restraints import PRUNE, Restraint
from lit_edit.editors.solvers import ROME
from lit_edit.editors.values import ValueOptimizer
from lit_edit.files import save_checkpoint
from lit_edit.module import CHECKPOINT_KEY
from lit_edit.requests import EditRequest, RequestError
from lit_edit.runs.results import ResultsLogger, read_results

# A frozen model is in evaluation mode from the start; Lightning takes that for an oversight.
pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")

Folder = Callable[[str], Path]
Make = Callable[..., LitEdit]


@pytest.fixture
def make(tiny_folder: Folder, tmp_path: Path) -> Make:
    """Makes a module for a method on a tiny model."""

    def module(method: str = "memit", family: str = "llama", kind: type[LitEdit] = LitEdit, **settings: Any) -> LitEdit:
        corpus = str(write_corpus(tmp_path))
        return kind(quick_editor(method), str(tiny_folder(family)), **({"corpus": corpus} | settings))

    return module


class SaveBetweenTheHalves(Callback):
    """A callback's hook comes after the module's training step and before its `on_train_batch_end`."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path, weights_only=False)


# The order of hooks


def test_the_whole_order_of_hooks(make: Make, tmp_path: Path) -> None:
    events: list[tuple[Any, ...]] = []
    seen: list[str] = []

    def state(module: LightningModule) -> int:
        """Which of the weights seen so far these are: 0 for the untouched model."""
        print_ = str([w.double().sum().item() for w in module.edited_parameters().values()])  # type: ignore[operator]
        if print_ not in seen:
            seen.append(print_)
        return seen.index(print_)

    class Watched(LitEdit):
        def training_step(self, batch: list[EditRequest], batch_idx: int) -> None:
            before = state(self)
            super().training_step(batch, batch_idx)
            events.append(("step", before, state(self)))

        def on_train_batch_end(self, outputs: Any, batch: list[EditRequest], batch_idx: int) -> None:
            before = state(self)
            super().on_train_batch_end(outputs, batch, batch_idx)
            events.append(("update", before, state(self), [r.case_id for r in self.edited_requests]))

    class Measure(EveryNEdits):
        def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
            events.append(("measure", edits, state(pl_module)))
            return {}

    class BatchEnd(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            events.append(("callback's batch end", pl_module.edits_applied, state(pl_module)))

    module = make(kind=Watched)
    trainer(tmp_path, Measure(every_n=2), BatchEnd()).fit(module, datamodule=data(tmp_path, 3))
    assert events == [
        ("measure", 0, 0),
        ("step", 0, 0),
        ("callback's batch end", 0, 0),
        ("update", 0, 1, ["c0"]),
        ("step", 1, 1),
        ("callback's batch end", 1, 1),
        ("update", 1, 2, ["c0", "c1"]),
        ("measure", 2, 2),
        ("step", 2, 2),
        ("callback's batch end", 2, 2),
        ("update", 2, 3, ["c0", "c1", "c2"]),
        ("measure", 3, 3),
    ]


def test_nothing_but_the_edited_weights_changes(make: Make, tmp_path: Path, tiny_folder: Folder) -> None:
    module = make("memit")
    untouched = load_model(str(tiny_folder("llama")))[0].state_dict()
    trainer(tmp_path).fit(module, datamodule=data(tmp_path, 2))
    edited = set(module.edited_parameters())
    assert edited == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    changed = {n for n, w in module.model.state_dict().items() if not torch.equal(w, untouched[n])}
    assert changed == edited
    assert not any(p.requires_grad or p.grad is not None for p in module.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.model.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dropout_is_off_while_editing(make: Make, tmp_path: Path, tiny_folder: Folder, family: str) -> None:
    """Also where somebody put the model into training mode; GPT-2 has dropout of 0.1."""
    modes: list[bool] = []

    class Modes(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.train()

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            modes.extend(m.training for m in pl_module.model.modules())

    module = make("memit", family)
    module.train()
    trainer(tmp_path, Modes()).fit(module, datamodule=data(tmp_path, 2))
    assert modes
    assert not any(modes)
    model, tokenizer = load_model(str(tiny_folder(family)))
    requests = data(tmp_path, 2)
    requests.setup()
    edit(model, tokenizer, requests.requests, quick_editor("memit"), corpus=str(tmp_path / "corpus.txt"))
    assert_same_weights(module.model, model)


# The same edits without a Trainer


@pytest.mark.parametrize("method", ["mose", "memit", "alphaedit"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_edit_without_a_trainer_is_the_same(
    make: Make, tmp_path: Path, tiny_folder: Folder, method: str, batch_size: int
) -> None:
    module, facts = make(method), data(tmp_path, 4, batch_size)
    trainer(tmp_path).fit(module, datamodule=facts)
    model, tokenizer = load_model(str(tiny_folder("llama")))
    same, journal = edit(
        model,
        tokenizer,
        facts.requests,
        quick_editor(method),
        batch_size=batch_size,
        corpus=str(tmp_path / "corpus.txt"),
    )
    assert same is model
    assert_same_weights(module.model, model)
    assert entries(journal) == entries(module.journal)
    assert [e.number for e in journal] == [1, 2, 3, 4]


def test_a_batch_is_edited_together(make: Make, tmp_path: Path) -> None:
    """Batches of three are not three batches of one."""
    together, apart = make("memit"), make("memit")
    trainer(tmp_path).fit(together, datamodule=data(tmp_path, 3, 3))
    trainer(tmp_path).fit(apart, datamodule=data(tmp_path, 3, 1))
    assert len({json.dumps(e.change) for e in together.journal}) == 1
    assert len({json.dumps(e.change) for e in apart.journal}) == 3


# Resuming


def sites(module: LitEdit) -> dict[int, dict[str, torch.Tensor]]:
    """What a checkpoint holds of every layer."""
    assert module.session is not None
    return {site.layer: site.state_dict() for site in module.session.sites}


def run(
    module: LitEdit, folder: Path, *more: Callback, ckpt_path: Path | None = None, count: int = 6, batch_size: int = 1
) -> list[dict[str, Any]]:
    """Fits with all the callbacks; the records of ``results.json``."""
    callbacks = [Retention(every_n=2), MatrixStability(every_n=2), EditCheckpoint(every_n=3), *more]
    fitting = trainer(folder, *callbacks, logger=ResultsLogger(folder / "log"))
    facts = data(folder, count, batch_size)
    try:
        fitting.fit(module, datamodule=facts, ckpt_path=ckpt_path, weights_only=True)
    except RuntimeError as error:
        assert str(error) == "power cut"  # noqa: PT017 - not raised in every call
    return read_results(folder / "log").records


@pytest.mark.parametrize(("method", "dtype"), [("mose", "float32"), ("mose", "bfloat16"), ("memit", "bfloat16")])
@pytest.mark.filterwarnings("ignore:Edit . rounding to bfloat16 took:UserWarning")
def test_a_resumed_run_equals_an_uninterrupted_one(make: Make, tmp_path: Path, method: str, dtype: str) -> None:
    straight, first, resumed = (make(method, dtype=dtype) for _ in range(3))
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    expected = run(straight, tmp_path / "straight")
    partial = run(first, tmp_path / "resumed", PowerCut(4))
    assert [r["edits"] for r in partial] == [0, 2, 4]
    checkpoint = tmp_path / "resumed" / "log" / "checkpoints" / "edits.ckpt"
    saved = torch.load(checkpoint, weights_only=True)[CHECKPOINT_KEY]
    assert len(saved["journal"]["edits"]) == 4  # saved by the error
    assert any("remainder" in site for site in saved["sites"].values()) == (dtype == "bfloat16")

    records = run(resumed, tmp_path / "resumed", ckpt_path=checkpoint)
    assert_same_weights(resumed.model, straight.model)
    torch.testing.assert_close(sites(resumed), sites(straight), rtol=0, atol=0)
    assert entries(resumed.journal) == entries(straight.journal)
    assert [e.case_id for e in resumed.journal] == [f"c{i}" for i in range(6)]
    assert resumed.edited_requests == straight.edited_requests
    assert records == expected
    assert [r["edits"] for r in records] == [0, 2, 4, 6]
    assert {"reliability", "generalization", "locality", "stability/mean_relative_drift"} <= set(records[-1])


def test_a_checkpoint_between_the_halves_loses_no_edit_and_brings_its_contexts(make: Make, tmp_path: Path) -> None:
    """Contexts are part of what an edit is: they are those of the run, and another seed is refused."""
    straight, saving, resumed, other = make(), make(), make(), make(seed=7)
    trainer(tmp_path).fit(straight, datamodule=data(tmp_path, 4))
    path = tmp_path / "between.ckpt"
    trainer(tmp_path, SaveBetweenTheHalves(path, 1)).fit(saving, datamodule=data(tmp_path, 4))
    assert len(torch.load(path, weights_only=True)[CHECKPOINT_KEY]["journal"]["edits"]) == 2
    trainer(tmp_path).fit(resumed, datamodule=data(tmp_path, 4), ckpt_path=path, weights_only=True)
    for module in (saving, resumed):
        assert_same_weights(module.model, straight.model)
        assert entries(module.journal) == entries(straight.journal)
    with pytest.raises(ValueError, match=r"made with other settings: seed is 0 there and 7 here"):
        trainer(tmp_path).fit(other, datamodule=data(tmp_path, 4), ckpt_path=path, weights_only=True)
    contexts = [m.session.workspace.contexts for m in (straight, resumed, other)]  # type: ignore[union-attr]
    assert contexts[1] == contexts[0] != contexts[2]


class SaveAtTheEpochsEnd(Callback):
    """Lightning calls this before the module's own hook, and counts the epoch as done already."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)


class Totals(EveryNEdits):
    """The norm of all updates together, at every measurement."""

    def __init__(self, every_n: int = 100) -> None:
        super().__init__(every_n)
        self.seen: dict[int, float] = {}

    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        session: Any = pl_module.session
        self.seen[edits] = sum(float((site.weight - site.original).norm()) for site in session.sites)
        return {"total": self.seen[edits]}


def pruned(every_n: int | None = None, fine_tuned: bool = False) -> Editor:
    """An editor whose updates outgrow the weight, and PRUNE."""
    restraints: list[Restraint] = [PRUNE(form="linear", every_n=every_n)]
    if fine_tuned:
        return FineTune([1, 2], lr=0.1, steps=3, stop_loss=0.0, restraints=restraints)
    values = ValueOptimizer("mlp", lr=3.0, lr_unit="relative", steps=3, stop_loss=0.0, weight_decay=0.0)
    return LocateThenEdit(FixedLayers([1, 2]), values, ROME(covariance=False), contexts=0, restraints=restraints)


@pytest.mark.parametrize(
    ("when", "fine_tuned"), [("batch 1", False), ("batch 2", True), ("last batch", False), ("epoch end", True)]
)
def test_a_run_resumed_from_anywhere_is_finished_at_its_end(
    tmp_path: Path, tiny_folder: Folder, when: str, fine_tuned: bool
) -> None:
    path = tmp_path / "saved.ckpt"
    batch = {"batch 1": 0, "batch 2": 1, "last batch": 3}.get(when)
    saving = SaveAtTheEpochsEnd(path) if batch is None else SaveBetweenTheHalves(path, batch)
    found, modules = [], []
    for callback, ckpt_path in ((None, None), (saving, None), (None, path)):
        totals = Totals()
        modules.append(LitEdit(pruned(fine_tuned=fine_tuned), str(tiny_folder("llama"))))
        fitting = trainer(tmp_path, totals, *([callback] if callback else []))
        fitting.fit(modules[-1], datamodule=data(tmp_path, 4), ckpt_path=ckpt_path, weights_only=True)
        found.append(totals.seen)
    straight, first, resumed = modules
    for other in (first, resumed):
        assert_same_weights(other.model, straight.model)
        assert entries(other.journal) == entries(straight.journal)
        torch.testing.assert_close(sites(other), sites(straight), rtol=0, atol=0)
    # What is measured at the end of a run is what was pruned.
    assert found[1] == found[0]
    assert found[2] == {4: found[0][4]}
    if when == "epoch end":
        saved = torch.load(path, weights_only=True)[CHECKPOINT_KEY]["sites"]
        torch.testing.assert_close(saved, sites(straight), rtol=0, atol=0)
    unpruned = LitEdit(pruned(every_n=100, fine_tuned=fine_tuned), str(tiny_folder("llama")))
    totals = Totals()
    trainer(tmp_path, totals).fit(unpruned, datamodule=data(tmp_path, 4))
    assert found[0][4] < 0.95 * totals.seen[4]  # not for want of something to prune


def test_a_run_resumed_with_more_requests_after_its_last_batch_is_not_finished_before_them(
    tmp_path: Path, tiny_folder: Folder
) -> None:
    path, modules = tmp_path / "saved.ckpt", []
    for count, callbacks, ckpt_path in ((6, [], None), (4, [SaveBetweenTheHalves(path, 3)], None), (6, [], path)):
        modules.append(LitEdit(pruned(), str(tiny_folder("llama"))))
        trainer(tmp_path, *callbacks).fit(
            modules[-1], datamodule=data(tmp_path, count), ckpt_path=ckpt_path, weights_only=True
        )
    assert len(modules[2].journal) == 6
    assert_same_weights(modules[2].model, modules[0].model)


def test_a_checkpoint_holds_the_edited_layers_only(tmp_path: Path, tiny_folder: Folder) -> None:
    """Of all that may be edited: neither weights that were not, nor any weight as it was before."""
    values = ValueOptimizer("mlp", steps=2)
    policy = ActivationSelection([1, 2], neighbours=0, steps=1)
    editor = LocateThenEdit(policy, values, ROME(covariance=False), contexts=1)
    module = LitEdit(editor, str(tiny_folder("gpt2")))
    trainer(tmp_path, EditCheckpoint(str(tmp_path / "here"))).fit(module, datamodule=data(tmp_path, 1))
    path = tmp_path / "here" / "edits.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"] == {}
    (edited,) = module.journal[0].layers
    assert set(saved[CHECKPOINT_KEY]["sites"]) == {1, 2}
    assert [layer for layer, site in saved[CHECKPOINT_KEY]["sites"].items() if "stored" in site] == [edited]
    stored = module.edited_parameters()[f"transformer.h.{edited}.mlp.c_proj.weight"]
    assert torch.equal(saved[CHECKPOINT_KEY]["sites"][edited]["stored"], stored)
    assert saved[CHECKPOINT_KEY]["contexts"] == module.session.workspace.contexts  # type: ignore[union-attr]
    weight = stored.numel() * stored.element_size()
    assert weight < path.stat().st_size < 2.5 * weight + 10_000  # and a few keys, the journal, the loops


def test_a_resumed_run_goes_on_with_complete_passes_where_others_were_found_not_to_do(
    make: Make, tmp_path: Path
) -> None:
    modules = [make("memit", "llama") for _ in range(2)]
    trainer(tmp_path, EditCheckpoint(str(tmp_path / "here"))).fit(modules[0], datamodule=data(tmp_path, 2))
    path = tmp_path / "here" / "edits.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved[CHECKPOINT_KEY]["cuttable"] is True
    saved[CHECKPOINT_KEY]["cuttable"] = False
    save_checkpoint(path, saved)
    keeping = EditCheckpoint(str(tmp_path / "there"))
    trainer(tmp_path, keeping).fit(modules[1], datamodule=data(tmp_path, 3), ckpt_path=path, weights_only=True)
    assert modules[1].session is not None
    assert not modules[1].session.workspace.cuts.cuttable


def test_resuming_with_another_model_or_under_another_methods_layers_is_refused(make: Make, tmp_path: Path) -> None:
    trainer(tmp_path, EditCheckpoint(str(tmp_path))).fit(make(), datamodule=data(tmp_path, 2))
    another, layers = "was made from another model", "holds the layers 1, 2, this run edits {}: resume with the method"
    for other, message in (
        (make("memit", "gpt2"), another),
        (make("memit", "llama", dtype="bfloat16"), another),
        (make("mose"), layers.format("0, 1, 2, 3")),
        (make("rome"), layers.format("2")),
    ):
        before = copy.deepcopy(other.model.state_dict())
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).fit(
                other, datamodule=data(tmp_path, 2), ckpt_path=tmp_path / "edits.ckpt", weights_only=True
            )
        torch.testing.assert_close(dict(other.model.state_dict()), dict(before), rtol=0, atol=0)
        assert other.edits_applied == 0


def test_a_foreign_checkpoint_is_refused(make: Make, tmp_path: Path) -> None:
    trainer(tmp_path, EditCheckpoint(str(tmp_path))).fit(make(), datamodule=data(tmp_path, 1))
    content = torch.load(tmp_path / "edits.ckpt", weights_only=True)
    del content[CHECKPOINT_KEY]
    save_checkpoint(tmp_path / "foreign.ckpt", content)
    with pytest.raises(ValueError, match="not made by LitEdit"):
        trainer(tmp_path).fit(
            make(), datamodule=data(tmp_path, 1), ckpt_path=tmp_path / "foreign.ckpt", weights_only=True
        )


def test_a_second_fit_goes_on(make: Make, tmp_path: Path) -> None:
    """The same module with further requests: the count and the journal go on, and contexts stay."""
    module = make()
    trainer(tmp_path).fit(module, datamodule=data(tmp_path, 2))
    contexts = list(module.session.workspace.contexts)  # type: ignore[union-attr]
    more = FactsDataModule(str(write_facts(tmp_path, 4)), offset=2)
    trainer(tmp_path).fit(module, datamodule=more)
    assert [(e.number, e.case_id) for e in module.journal] == [(i + 1, f"c{i}") for i in range(4)]
    assert module.session.workspace.contexts == contexts  # type: ignore[union-attr]


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_goes_on_with_more_requests(make: Make, tmp_path: Path, finished: bool) -> None:
    """Also after it was finished; what locality is judged by is still the unedited model."""
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight, first, resumed = make(), make(), make()
    expected = run(straight, tmp_path / "straight", count=6)
    run(first, tmp_path / "resumed", *([] if finished else [PowerCut(3)]), count=4)
    assert len(first.journal) == (4 if finished else 3)
    checkpoint = tmp_path / "resumed" / "log" / "checkpoints" / "edits.ckpt"
    records = run(resumed, tmp_path / "resumed", ckpt_path=checkpoint, count=6)
    assert_same_weights(resumed.model, straight.model)
    assert entries(resumed.journal) == entries(straight.journal)
    # The baseline is another: it was taken over the requests that were there.
    assert records[1:] == expected[1:]


def test_a_finished_run_is_not_edited_again(make: Make, tmp_path: Path) -> None:
    first, again = make(), make()
    run(first, tmp_path, count=3)
    run(again, tmp_path, ckpt_path=tmp_path / "log" / "checkpoints" / "edits.ckpt", count=3)
    assert_same_weights(again.model, first.model)
    assert entries(again.journal) == entries(first.journal)


# Logging


def test_scalars_have_the_edit_count_as_step_and_the_names_of_the_results(make: Make, tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="board", version="0")
    results = ResultsLogger(tmp_path)
    callbacks = [Retention(every_n=2), MatrixStability(every_n=2)]
    module = make()
    trainer(tmp_path, *callbacks, logger=[board, results]).fit(module, datamodule=data(tmp_path, 3))
    events = EventAccumulator(board.log_dir)
    events.Reload()
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}

    for tag, figure in {
        "train/loss": lambda e: e.loss,
        "train/p_value": lambda e: e.p_value,
        "train/p_target": lambda e: e.p_target,
        "train/relative_change": lambda e: max(e.change.values()),
    }.items():
        assert scalars[tag] == pytest.approx({e.number: figure(e) for e in module.journal})
    records = read_results(tmp_path).records
    assert [r["edits"] for r in records] == [0, 2, 3]
    evaluated = {tag: steps for tag, steps in scalars.items() if not tag.startswith("train/") and tag != "hp_metric"}
    assert {tag for r in records for tag in r if tag != "edits"} == set(evaluated)
    for tag, steps in evaluated.items():
        assert steps == pytest.approx({r["edits"]: r[tag] for r in records if tag in r}), tag


def test_train_figures_are_means_over_the_batch(make: Make, tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="board", version="0")
    module = make()
    trainer(tmp_path, logger=board).fit(module, datamodule=data(tmp_path, 5, batch_size=3))
    events = EventAccumulator(board.log_dir)
    events.Reload()
    targets = [e.p_target for e in module.journal]
    assert {e.step: e.value for e in events.Scalars("train/p_target")} == pytest.approx(
        {3: sum(targets[:3]) / 3, 5: sum(targets[3:]) / 2}
    )


def test_what_the_progress_bar_shows(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = EditProgressBar()
    shown: list[dict[str, Any]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            shown.append(dict(bar.get_metrics(trainer, pl_module)))

    module = make()
    retention, stability = Retention(every_n=2), MatrixStability(every_n=2)
    fitting = trainer(tmp_path, bar, retention, stability, Look(), enable_progress_bar=True)
    fitting.fit(module, datamodule=data(tmp_path, 3))
    shown.append(dict(bar.get_metrics(fitting, module)))
    assert [m.get("p") for m in shown] == [None, *(f"{e.p_target:.2f}" for e in module.journal)]
    assert shown[-1]["rel"] == f"{retention.latest['reliability']:.3g}"
    assert shown[-1]["cond"] == f"{stability.latest['stability/worst_condition_number']:.3g}"
    assert all({"rel", "loc", "cond"} <= set(m) for m in shown)
    said = capsys.readouterr().out
    assert said.index("preparing: 00:0") < said.index("edits 3/3 |")
    assert "?" not in said.split("edits 3/3", 1)[1].split("\r")[0]


def test_the_bar_at_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all its figures there is room for the count, a bar, and the times."""
    bar = EditProgressBar().init_train_tqdm()
    bar.bar_format, bar.total, bar.ncols, bar.dynamic_ncols = progress._FORMAT, 1000, 80, None
    bar.set_description_str("edits", refresh=False)
    bar.set_postfix({"p": "0.98", "rel": "0.493", "loc": "0.693", "cond": "1.2e+03"}, refresh=False)
    shown = bar.format_meter(**{**bar.format_dict, "n": 990, "elapsed": 3000, "ncols": 80})
    bar.close()
    assert len(shown) <= 80
    assert shown.startswith("edits 990/1000 |")
    assert "50:00<00:30" in shown
    assert shown.endswith("cond=1.2e+03")


def test_after_resuming_the_time_that_is_left_follows_from_the_edits_made_since(make: Make, tmp_path: Path) -> None:
    class Look(EditProgressBar):
        seen: ClassVar[list[tuple[int, int]]] = []

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            self.seen.append((self.train_progress_bar.initial, self.train_progress_bar.n))

    trainer(tmp_path, EditCheckpoint(str(tmp_path / "kept"), every_n=2), limit_train_batches=2).fit(
        make(), datamodule=data(tmp_path, 4)
    )
    fitting = trainer(tmp_path, Look(), EditCheckpoint(str(tmp_path / "kept")), enable_progress_bar=True)
    fitting.fit(make(), datamodule=data(tmp_path, 4), ckpt_path=str(tmp_path / "kept" / "edits.ckpt"))
    assert Look.seen == [(2, 3), (2, 4)]


# What is refused


def test_a_loaded_model_needs_its_tokenizer(tiny_folder: Folder) -> None:
    model, tokenizer = load_model(str(tiny_folder("llama")))
    with pytest.raises(ValueError, match="needs its tokenizer"):
        LitEdit(quick_editor("memit"), model)
    module = LitEdit(quick_editor("memit"), model, tokenizer)
    assert (module.model, module.model_name) == (model, "LlamaForCausalLM")
    assert (module.edits_applied, module.edited_requests) == (0, [])


def test_outside_a_fit_there_is_nothing_to_edit_with(make: Make) -> None:
    module = make()
    with pytest.raises(RuntimeError, match="known once a fit has been set up"):
        module.edited_parameters()
    with pytest.raises(RuntimeError, match=r"outside it, use lit_edit\.edit"):
        module.training_step([], 0)
    with pytest.raises(AttributeError, match="never loaded strictly"):
        module.strict_loading = True


def test_every_request_is_checked_before_the_first_edit(make: Make, tmp_path: Path) -> None:
    """The last one is too long for the model: nothing is edited, nothing is optimised."""
    module, facts = make(), data(tmp_path, 3)
    facts.setup()
    facts.requests[-1] = EditRequest("long", "so " * 200 + "Peru is", "Peru", "far", source="facts.json, record 3")
    before = copy.deepcopy(module.model.state_dict())
    with pytest.raises(RequestError, match=r"facts\.json, record 3, field 'prompt': \d+ tokens"):
        trainer(tmp_path).fit(module, datamodule=facts)
    torch.testing.assert_close(dict(module.model.state_dict()), dict(before), rtol=0, atol=0)


def test_alphaedit_without_a_null_space_fails_before_the_first_edit(make: Make, tmp_path: Path) -> None:
    module = make("alphaedit")
    module.editor.solver.energy = 1e-12  # type: ignore[attr-defined]
    planned: list[int] = []
    module.editor.plan = lambda *_: planned.append(1)  # type: ignore[method-assign, assignment, func-returns-value]
    with pytest.raises(ValueError, match=r"no null space in layer 'model\.layers\.1\.mlp\.down_proj\.weight'"):
        trainer(tmp_path).fit(module, datamodule=data(tmp_path, 2))
    assert not planned


def test_batches_of_requests_need_no_data_module(make: Make, tmp_path: Path) -> None:
    """Then they are checked batch by batch; the solver's own conditions are still asked before."""
    facts = data(tmp_path, 2)
    facts.setup()
    module = make()
    trainer(tmp_path).fit(module, train_dataloaders=EditLoader(facts.requests))
    assert [e.case_id for e in module.journal] == ["c0", "c1"]
