"""A run that is interrupted edits every fact exactly once, whenever the checkpoint was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.records import fact
from lightning.pytorch import Callback, LightningModule, Trainer
from lit_edit.datamodules import EditBatch, EditLoader, FactsDataModule
from torch.utils.data import DataLoader

from lit_edit.requests import EditRequest

# Lightning's own use of torch's tree functions, which newer versions of torch deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Recorder(LightningModule):
    """Edits nothing; remembers, and saves, which requests it was given."""

    def __init__(self, fail_at: str | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)
        self.fail_at = fail_at
        self.seen: list[str] = []
        self.batch_numbers: list[int] = []
        self.types: set[type] = set()

    def training_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        if any(request.case_id == self.fail_at for request in batch):
            raise RuntimeError("power cut")
        self.types.add(type(batch))
        self.batch_numbers.append(batch_idx)
        self.seen += [request.case_id for request in batch]

    def configure_optimizers(self) -> list[Any]:
        return []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = list(checkpoint["seen"])


class SaveDuring(Callback):
    """Saves a checkpoint in one hook of one batch."""

    def __init__(self, hook: str, batch_idx: int, path: Path) -> None:
        def save(trainer: Trainer, *args: Any) -> None:
            if args[-1] == batch_idx:
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


class SaveOnFailure(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


class SaveAfterValidation(Callback):
    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == self.batches:
            trainer.save_checkpoint(self.path)


class Validated(Recorder):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        assert isinstance(batch, torch.Tensor)


def trainer(root: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
    }
    return Trainer(**(settings | arguments))


@pytest.fixture
def path(facts_file: Callable[[int], str]) -> str:
    return facts_file(13)


def data(path: str, **arguments: Any) -> FactsDataModule:
    return FactsDataModule(path, **({"batch_size": 2, "seed": 3} | arguments))


def uninterrupted(path: str, root: Path, **arguments: Any) -> list[str]:
    module = Recorder()
    trainer(root).fit(module, datamodule=data(path, **arguments))
    assert module.types == {list}
    assert len(module.seen) == len(set(module.seen)) == 13
    return module.seen


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("batch_idx", [0, 3, 6])
def test_resume_after_a_checkpoint_in_a_hook(path: str, tmp_path: Path, hook: str, batch_idx: int) -> None:
    expected = uninterrupted(path, tmp_path)
    saved = tmp_path / "mid.ckpt"
    trainer(tmp_path, SaveDuring(hook, batch_idx, saved)).fit(Recorder(), datamodule=data(path))
    done = batch_idx + (hook == "on_train_batch_end")

    checkpoint = torch.load(saved, weights_only=True)
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (state["batches_done"], state["batch_size"]) == (done, 2)
    assert checkpoint["seen"] == expected[: 2 * done]

    module = Recorder()
    trainer(tmp_path).fit(module, datamodule=data(path), ckpt_path=saved, weights_only=True)
    assert module.seen == expected
    assert module.batch_numbers == list(range(done, 7))


def test_resume_after_a_failure(path: str, tmp_path: Path) -> None:
    """The batch that failed is edited again: it is handed out, but not done."""
    expected = uninterrupted(path, tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path, SaveOnFailure(tmp_path / "failed.ckpt")).fit(Recorder(expected[7]), datamodule=data(path))
    for _ in range(2):
        module = Recorder()
        trainer(tmp_path).fit(module, datamodule=data(path), ckpt_path=tmp_path / "failed.ckpt", weights_only=True)
        assert module.seen == expected
        assert module.batch_numbers == [3, 4, 5, 6]


def test_a_resumed_run_can_be_interrupted_again(path: str, tmp_path: Path) -> None:
    expected = uninterrupted(path, tmp_path)
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    trainer(tmp_path, SaveDuring("on_train_batch_end", 1, first)).fit(Recorder(), datamodule=data(path))
    again = SaveDuring("on_train_batch_start", 4, second)
    trainer(tmp_path, again).fit(Recorder(), datamodule=data(path), ckpt_path=first, weights_only=True)
    module = Recorder()
    trainer(tmp_path).fit(module, datamodule=data(path), ckpt_path=second, weights_only=True)
    assert module.seen == expected


def test_resume_after_a_checkpoint_between_validations(path: str, tmp_path: Path) -> None:
    """Validation data of other kinds still goes where Lightning would put it."""
    expected = uninterrupted(path, tmp_path)
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}

    class WithValidation(FactsDataModule):
        def val_dataloader(self) -> DataLoader:
            return DataLoader(torch.zeros(2, 1), num_workers=0)  # type: ignore[arg-type]

    def fit(module: LightningModule, *callbacks: Callback, **arguments: Any) -> None:
        trainer(tmp_path, *callbacks, **settings).fit(
            module, datamodule=WithValidation(path, batch_size=2, seed=3), **arguments
        )

    saved = tmp_path / "mid.ckpt"
    fit(Validated(), SaveAfterValidation(saved, 4))
    module = Validated()
    fit(module, ckpt_path=saved, weights_only=True)
    assert module.seen == expected
    assert module.batch_numbers == [4, 5, 6]


def test_a_finished_epoch_is_not_run_again(path: str, tmp_path: Path) -> None:
    expected = uninterrupted(path, tmp_path)
    saved = tmp_path / "end.ckpt"
    first = trainer(tmp_path)
    first.fit(Recorder(), datamodule=data(path))
    first.save_checkpoint(saved)
    module = Recorder()
    trainer(tmp_path).fit(module, datamodule=data(path), ckpt_path=saved, weights_only=True)
    assert (module.seen, module.batch_numbers) == (expected, [])


def test_resume_with_more_edits(path: str, tmp_path: Path) -> None:
    expected = uninterrupted(path, tmp_path)
    saved = tmp_path / "mid.ckpt"
    trainer(tmp_path, SaveDuring("on_train_batch_end", 2, saved)).fit(Recorder(), datamodule=data(path, n_edits=8))
    module = Recorder()
    trainer(tmp_path).fit(module, datamodule=data(path), ckpt_path=saved, weights_only=True)
    assert module.seen == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 4}, "made after 3 batches of other edit requests"),
        ({"offset": 1}, "made after 3 batches of other edit requests"),
        ({"n_edits": 4}, "made after 3 batches of other edit requests"),
        ({"batch_size": 3}, "made with batch_size 2, the data now has batch_size 3"),
    ],
)
def test_resume_with_other_data_is_refused(path: str, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    saved = tmp_path / "mid.ckpt"
    trainer(tmp_path, SaveDuring("on_train_batch_end", 2, saved)).fit(Recorder(), datamodule=data(path))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(Recorder(), datamodule=data(path, **arguments), ckpt_path=saved, weights_only=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_batches_pass_through_every_precision(path: str, tmp_path: Path, precision: str) -> None:
    module = Recorder()
    trainer(tmp_path, precision=precision).fit(module, datamodule=data(path))
    assert (len(module.seen), module.types) == (13, {list})


def test_the_loader_needs_no_data_module(path: str, tmp_path: Path) -> None:
    requests = data(path)
    requests.setup("fit")
    module = Recorder()
    trainer(tmp_path).fit(module, train_dataloaders=EditLoader(requests.requests, 2))
    assert (len(module.seen), module.types) == (13, {EditBatch})


def requests(count: int) -> list[EditRequest]:
    return [EditRequest(case_id=str(number), **fact(number)) for number in range(count)]


def test_loader_state_by_itself() -> None:
    loader = EditLoader(requests(5), 2)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    assert set(state) == {"batches_done", "batch_size", "digest"}
    other = EditLoader(requests(5), 2)
    other.load_state_dict(state)
    assert len(other) == 3
    assert other.state_dict() == state
    assert [request.case_id for batch in other for request in batch] == ["2", "3", "4"]
    assert [request.case_id for batch in other for request in batch] == ["0", "1", "2", "3", "4"]


def test_a_state_at_the_end_begins_anew() -> None:
    loader = EditLoader(requests(4), 2)
    list(loader)
    other = EditLoader(requests(4), 2)
    other.load_state_dict(loader.state_dict())
    assert len(list(other)) == 2


def test_a_batch_is_used_like_a_list() -> None:
    some = requests(3)
    batch = EditBatch(some)
    assert (len(batch), batch[0], batch[-2:]) == (3, some[0], tuple(some[1:]))
    assert batch == some
    assert batch == EditBatch(some)
    assert batch != some[:2]
    assert batch != 3
    assert hash(batch) == hash(EditBatch(some))
    assert repr(batch) == "EditBatch(0, 1, 2)"


def test_loader_refuses_batch_size_zero() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        EditLoader(requests(1), 0)
