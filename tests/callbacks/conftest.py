from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader


class Editor(LightningModule):
    """Does what an editing module does: no optimiser, and the update is written in its own `on_train_batch_end`.

    Every edit adds one to the weight, so that the weight says how many edits it has seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.matrix = nn.Parameter(torch.eye(2))
        self.dropout = nn.Dropout(0.5)
        self.edits_applied = 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        return None

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: torch.Tensor, batch_idx: int) -> None:
        self.matrix += len(batch) * torch.eye(2)
        self.edits_applied += len(batch)

    def configure_optimizers(self) -> None:
        return None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["edits_applied"] = self.edits_applied

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.edits_applied = checkpoint["edits_applied"]

    def edited_parameters(self) -> dict[str, torch.Tensor]:
        return {"matrix": self.matrix}


class Regression(LightningModule):
    """Ordinary fine-tuning that has nothing to do with editing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.net(batch) - batch[:, :3]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def edits(count: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(torch.arange(count, dtype=torch.float32), batch_size=batch_size)  # type: ignore[arg-type]


def vectors(count: int = 32) -> DataLoader[Any]:
    data = torch.randn(count, 4, generator=torch.Generator().manual_seed(3))
    return DataLoader(data, batch_size=4)  # type: ignore[arg-type]


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., Trainer]:
    def make(*callbacks: Callback, **kwargs: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})

    return make


@pytest.fixture
def editor() -> Editor:
    return Editor()


@pytest.fixture
def regression() -> Regression:
    torch.manual_seed(0)
    return Regression()


@pytest.fixture
def edit_loader() -> Callable[[int, int], DataLoader[Any]]:
    return edits


@pytest.fixture
def vector_loader() -> Callable[..., DataLoader[Any]]:
    return vectors
