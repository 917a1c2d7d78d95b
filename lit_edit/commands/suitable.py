"""Settings that go together: what the Trainer may be told, and what was made for another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lit_edit.configs.find import config_folder, find_config, read_config, values_of
from lit_edit.model.loading import EMBEDDED
from lit_edit.program import program

_PRECISIONS = (None, 32, "32", "32-true")
_HALF = {"bf16": "bfloat16", "16": "float16"}
# What Lightning would take and what has no effect on edits, or not the one that is meant.
_INSTEAD = {
    "max_epochs": (1, "every fact is written once; --data.n_edits says how many"),
    "max_steps": (-1, "edits are no optimiser steps; --data.n_edits says how many"),
    "gradient_clip_val": (None, "no gradient reaches the weights; --model.editor.values.constraint bounds a change"),
    "accumulate_grad_batches": (1, "no gradients are added up; --data.batch_size says how many facts go together"),
}


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuses settings of the Trainer that editing cannot honour.

    Args:
        settings: Those of ``trainer`` in a configuration.

    Raises:
        ValueError: Naming the setting to use instead.
    """
    precision = settings.get("precision")
    if precision not in _PRECISIONS:
        half = next((dtype for start, dtype in _HALF.items() if str(precision).startswith(start)), "float32")
        raise ValueError(
            f"--trainer.precision={precision}: edits are computed in float32 and float64 in any case; the precision of "
            f"the model's weights is --model.dtype={half}."
        )
    for name, (only, instead) in _INSTEAD.items():
        if settings.get(name, only) not in (only, None):
            raise ValueError(f"--trainer.{name}={settings[name]}: {instead}.")


def check_processes(trainer: Trainer) -> None:
    """Refuses several processes.

    Raises:
        ValueError: Naming what can run at the same time.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"{trainer.world_size} processes: edits follow from one another and are made by one, --trainer.devices=1. "
            "`compare --jobs 2` makes two runs at the same time."
        )


def check_strangers(config: Mapping[str, Any], args: Sequence[str]) -> str:
    """What a model of the user's own takes over from the embedded one, in one line; nothing for the embedded one.

    Args:
        config: Settings of ``fit``.
        args: The command line they come from.

    Raises:
        ValueError: If these are the facts: they are about a world that only the embedded model knows.
    """
    model, data = config["model"], config.get("data") or {}
    name = model["model"]
    if name == EMBEDDED:
        return ""
    kind, settings = str(data.get("class_path")), data.get("init_args") or {}
    if kind.startswith("lit_edit.datamodules.") and settings.get("path") is None:
        raise ValueError(
            f"{name!r} would be edited with facts of the embedded model's invented world, of which it knows nothing: "
            "name others with --data=FactsDataModule --data.path=facts.csv (or another file that --data reads), or "
            f"these with --data.path={EMBEDDED}."
        )
    editor = model.get("editor") or {}
    taken = []
    if model.get("corpus") == EMBEDDED:
        taken.append("the text for key covariances (--model.corpus)")
    tasks = config.get("downstream") or {}
    named = tasks.get("tasks") is not None or tasks.get("path") not in (None, EMBEDDED)
    if not named and tasks.get("n_items") != 0:
        taken.append("the tasks of general abilities (--downstream.tasks; --downstream=null leaves them out)")
    layers, look = (editor.get("init_args") or {}).get("layers"), ""
    if layers is not None and not names_layers(args):
        look = f" Layers of its own are found by: {program()} locate --model {name}"
        settings = layers.get("init_args") or {} if isinstance(layers, Mapping) else {"layers": layers}
        found = settings.get("layers")
        taken.append(f"layers {found} (--model.editor.layers.layers)" if found else "the choice of layers")
    if not taken:
        return ""
    listed = ", ".join(taken[:-1]) + (" and " if taken[:-1] else "") + taken[-1]
    return f"Note: {name!r} takes over what was made for the embedded model: {listed}.{look}"


def names_layers(args: Sequence[str]) -> bool:
    """Whether a command line says itself which layers to edit, rather than a method as it comes along."""
    for name in values_of(args, "--config", "-c"):
        editor = (read_config(name).get("model") or {}).get("editor") or {}
        if "layers" in (editor.get("init_args") or {}) and Path(find_config(name)).parent != config_folder():
            return True
    options = [arg.split("=", 1)[0].split(".") for arg in args if arg.startswith("--model.editor.")]
    return any("layers" in parts for parts in options)
