from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lit_edit.callbacks import EveryNEdits, count_edits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# What Lightning says about runs as small as these, and what its own tree utilities call that torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


class Weight(EveryNEdits):
    """Reads off the weight of the `editor` fixture how many edits it has seen."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, float]] = []

    def measure(self, trainer, pl_module, edits):
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in pl_module.modules())
        value = pl_module.matrix[0, 0].item() - 1
        self.seen.append((edits, value))
        return {"weight": value}


def exactly(*counts: int) -> list[tuple[int, float]]:
    return [(count, float(count)) for count in counts]


@pytest.mark.parametrize(
    ("edits", "batch", "every_n", "counts"),
    [
        (6, 1, 2, (0, 2, 4, 6)),
        (5, 1, 2, (0, 2, 4, 5)),
        (100, 10, 25, (0, 30, 50, 80, 100)),
        (12, 5, 5, (0, 5, 10, 12)),
        (12, 6, 2, (0, 6, 12)),
        (3, 1, 25, (0, 3)),
        (3, 1, 1, (0, 1, 2, 3)),
        (6, 1, [1, 4], (0, 1, 4, 6)),
        (6, 1, [6], (0, 6)),
        (6, 1, [100], (0, 6)),
        (100, 10, [25, 100], (0, 30, 100)),
        (12, 6, [1, 2, 7], (0, 6, 12)),  # two counts crossed by one batch are measured once
    ],
)
def test_every_measurement_sees_exactly_the_edits_it_is_filed_under(
    editor, make_trainer, edit_loader, edits, batch, every_n, counts
):
    callback = Weight(every_n=every_n)
    make_trainer(callback).fit(editor, edit_loader(edits, batch))
    assert callback.seen == exactly(*counts)
    assert callback.latest == {"weight": counts[-1]}


@pytest.mark.parametrize(
    ("at_start", "at_end", "edits", "counts"),
    [
        (False, True, 5, (2, 4, 5)),
        (True, False, 5, (0, 2, 4)),
        (False, False, 5, (2, 4)),
        (False, False, 4, (2, 4)),  # due at the end, without being asked for the end
    ],
)
def test_start_and_end_can_be_left_out(editor, make_trainer, edit_loader, at_start, at_end, edits, counts):
    callback = Weight(every_n=2, at_start=at_start, at_end=at_end)
    make_trainer(callback).fit(editor, edit_loader(edits, 1))
    assert callback.seen == exactly(*counts)


def test_order_of_hooks(editor, make_trainer, edit_loader):
    order: list[str] = []

    class Recorder(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            order.append(f"callback starts batch {batch_idx}")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            order.append(f"callback ends batch {batch_idx}, {pl_module.edits_applied} edits")

        def on_train_end(self, trainer, pl_module):
            order.append("callback ends training")

    class Recording(Weight):
        def measure(self, trainer, pl_module, edits):
            order.append(f"measured at {edits}")
            return super().measure(trainer, pl_module, edits)

    apply = editor.on_train_batch_end

    def recorded(outputs, batch, batch_idx):
        apply(outputs, batch, batch_idx)
        order.append(f"module ends batch {batch_idx}, {editor.edits_applied} edits")

    editor.on_train_batch_end = recorded
    make_trainer(Recorder(), Recording(every_n=1)).fit(editor, edit_loader(2, 1))
    assert order == [
        "callback starts batch 0",
        "measured at 0",
        "callback ends batch 0, 0 edits",
        "module ends batch 0, 1 edits",
        "callback starts batch 1",
        "measured at 1",
        "callback ends batch 1, 1 edits",
        "module ends batch 1, 2 edits",
        "callback ends training",
        "measured at 2",
    ]


def test_counts_go_on_over_epochs(editor, make_trainer, edit_loader):
    callback = Weight(every_n=4)
    make_trainer(callback, max_epochs=3).fit(editor, edit_loader(3, 1))
    assert callback.seen == exactly(0, 4, 8, 9)


def test_a_list_of_counts_without_start_and_end(editor, make_trainer, edit_loader):
    callback = Weight(every_n=[2, 5], at_start=False, at_end=False)
    make_trainer(callback).fit(editor, edit_loader(6, 1))
    assert callback.seen == exactly(2, 5)


@pytest.mark.parametrize("saved_at", [1, 2, 3])
def test_resuming_goes_on_in_the_list(editor, make_trainer, edit_loader, tmp_path, saved_at):
    first = Weight(every_n=[2, 4], at_end=False)
    trainer = make_trainer(first, max_epochs=saved_at)
    trainer.fit(editor, edit_loader(1, 1))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    second, fresh = Weight(every_n=[2, 4]), type(editor)()
    make_trainer(second, max_epochs=6).fit(fresh, edit_loader(1, 1), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert first.seen + second.seen == exactly(0, 2, 4, 6)


@pytest.mark.parametrize("saved_at", [2, 3, 4])
def test_resuming_measures_no_count_twice_and_misses_none(editor, make_trainer, edit_loader, tmp_path, saved_at):
    first = Weight(every_n=2)
    trainer = make_trainer(first, max_epochs=saved_at)
    trainer.fit(editor, edit_loader(1, 1))
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    second, fresh = Weight(every_n=2), type(editor)()
    make_trainer(second, max_epochs=7).fit(fresh, edit_loader(1, 1), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert first.seen[-1] == (saved_at, saved_at)
    assert second.seen == exactly(*[count for count in (4, 6, 7) if count > saved_at])


def test_checkpoint_taken_before_the_due_measurement_measures_on_resume(
    regression, make_trainer, vector_loader, tmp_path
):
    """`ModelCheckpoint` saves at the end of step 4, before the measurement at 4 that the next batch would bring."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="four", every_n_train_steps=4, save_top_k=-1)
    make_trainer(Steps(every_n=4), saver, max_steps=4, enable_checkpointing=True).fit(regression, vector_loader())
    resumed = Steps(every_n=4)
    make_trainer(resumed, max_steps=8).fit(
        regression, vector_loader(), ckpt_path=tmp_path / "four.ckpt", weights_only=True
    )
    assert resumed.seen == [4, 8]


class Steps(EveryNEdits):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[int] = []

    def measure(self, trainer, pl_module, edits):
        torch.rand(7)
        self.seen.append(edits)
        return {"edits_seen": edits}


def test_a_module_without_edits_is_counted_in_optimiser_steps(regression, make_trainer, vector_loader):
    callback = Steps(every_n=2)
    make_trainer(callback, accumulate_grad_batches=2).fit(regression, vector_loader(32))
    assert callback.seen == [0, 2, 4]


def test_a_second_fit_with_a_new_trainer_starts_afresh(regression, make_trainer, vector_loader):
    callback = Steps(every_n=4)
    make_trainer(callback, max_steps=4).fit(regression, vector_loader())
    make_trainer(callback, max_steps=4).fit(regression, vector_loader())
    assert callback.seen == [0, 4, 0, 4]


def test_a_second_fit_of_a_module_that_keeps_its_count_goes_on(editor, make_trainer, edit_loader):
    callback = Weight(every_n=2)
    make_trainer(callback).fit(editor, edit_loader(2, 1))
    make_trainer(callback).fit(editor, edit_loader(3, 1))
    assert callback.seen == exactly(0, 2, 4, 5)


def test_modes_of_all_submodules_are_restored(regression, make_trainer, vector_loader):
    regression.net[2].eval()  # a frozen part amid a training whole
    modes: list[tuple[bool, bool]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            modes.append((pl_module.net[0].training, pl_module.net[2].training))

    with pytest.warns(UserWarning, match="eval mode"):
        make_trainer(Steps(every_n=1), Watch(), max_steps=3).fit(regression, vector_loader())
    assert modes == [(True, False)] * 3


def test_modes_are_restored_when_a_measurement_fails(editor, make_trainer, edit_loader):
    class Fails(EveryNEdits):
        def measure(self, trainer, pl_module, edits):
            raise RuntimeError("no figure today")

    editor.train()
    with pytest.raises(RuntimeError, match="no figure today"):
        make_trainer(Fails()).fit(editor, edit_loader(1, 1))
    assert editor.dropout.training
    assert torch.is_grad_enabled()


def test_measuring_does_not_change_the_run(make_trainer, vector_loader, regression):
    """Dropout draws the same masks whether or not a measurement draws random numbers in between."""
    start = {name: value.clone() for name, value in regression.state_dict().items()}
    weights = []
    for callbacks in ([], [Steps(every_n=1)]):
        regression.load_state_dict(start)
        torch.manual_seed(1)
        make_trainer(*callbacks).fit(regression, vector_loader())
        weights.append(regression.net[0].weight.detach().clone())
    assert torch.equal(*weights)


def test_tensorboard_gets_the_edit_count_as_step(editor, make_trainer, edit_loader, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="0")
    make_trainer(Weight(every_n=25), logger=logger).fit(editor, edit_loader(60, 10))
    events = EventAccumulator(str(tmp_path / "run" / "0"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("weight")] == exactly(0, 30, 50, 60)


def test_figures_can_be_monitored(editor, make_trainer, edit_loader, tmp_path):
    """Early stopping reads the figure at the end of an epoch, here of one edit, when the one before it is known."""
    stopper = EarlyStopping("weight", mode="max", stopping_threshold=2.5, check_on_train_epoch_end=True, patience=9)
    callback = Weight(every_n=1)
    trainer = make_trainer(callback, stopper, max_epochs=20)
    trainer.fit(editor, edit_loader(1, 1))
    assert editor.edits_applied == 4
    assert trainer.callback_metrics["weight"] == 4
    assert callback.seen == exactly(0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "every_n", [0, -1, 2.5, True, "5", None, [], [0, 5], [5, 2], [2, 2], [2, 2.5], [True, 2], ["2"], (2, 5)]
)
def test_every_n_is_checked(every_n):
    with pytest.raises(ValueError, match="every_n should be a positive whole number"):
        Weight(every_n=every_n)


@pytest.mark.parametrize("count", ["three", 2.0, True, len, torch.tensor(1.5)])
def test_a_count_that_is_no_number_is_refused(editor, make_trainer, count):
    editor.__dict__["edits_applied"] = count
    with pytest.raises(TypeError, match="edits_applied should be an int"):
        count_edits(make_trainer(), editor)


def test_a_count_kept_in_a_tensor_is_read(editor, make_trainer):
    editor.__dict__["edits_applied"] = torch.tensor(3)
    assert count_edits(make_trainer(), editor) == 3


def test_the_folder_cannot_be_imported_under_its_own_name(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath)
    monkeypatch.delitem(sys.modules, "callbacks", raising=False)
    with pytest.raises(ImportError, match=r"Import 'lit_edit\.callbacks'"):
        import callbacks  # noqa: F401
