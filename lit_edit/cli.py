"""The command line: LightningCLI with editing's defaults, configurations found by name, errors in one line.

``fit`` is Lightning's own, for one run; ``compare`` is `lit_edit.commands.compare`, which calls ``fit`` for many;
``export``, ``ask`` and ``report`` are `lit_edit.commands`, for what a run has made.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.console import Console

from lit_edit.callbacks import (
    DownstreamEval,
    EditCheckpoint,
    EditLog,
    EditProgressBar,
    ExportModel,
    LMEval,
    MatrixStability,
    Report,
    ResultsTable,
    Retention,
    StopOnSignal,
)
from lit_edit.commands import ask, compare, dry_run, export, locate, report, single, statistics, undo
from lit_edit.commands.edited_run import CHECKPOINT, find_run
from lit_edit.commands.messages import one_line, readable
from lit_edit.commands.options import call, made, summary
from lit_edit.commands.review import review, review_line
from lit_edit.commands.suitable import check_processes, check_strangers, check_trainer
from lit_edit.configs.find import check_order, find_config, is_overlay, read_config, values_of
from lit_edit.datamodules import EditDataModule, FactsDataModule
from lit_edit.editors import Editor, FailedEditError
from lit_edit.files import check_checkpoint, load_checkpoint
from lit_edit.model.families import Architecture
from lit_edit.model.loading import EMBEDDED
from lit_edit.model.prompts import check_requests
from lit_edit.module import CHECKPOINT_KEY, LitEdit
from lit_edit.program import TRACEBACK, program
from lit_edit.runs.board import EditBoard
from lit_edit.runs.interrupts import Interrupted
from lit_edit.runs.results import FILE_NAME, ResultsLogger, headlines, machine
from lit_edit.threads import threads_for, threads_line
from lit_edit.trust import check_classes, enforce, refusal
from lit_edit.units import counted

TRUST = "--trust"
RESUME = "--resume"


@dataclass(frozen=True)
class _Command:
    """A command beside ``fit``: what runs it, a line for the list of commands, and how it is called."""

    main: Callable[[Sequence[str]], int]
    summary: str
    example: str


_COMMANDS = {
    "compare": _Command(
        lambda args: call(partial(compare.compare, check=_check), "compare", args, compare.EXAMPLES),
        summary(compare.compare),
        "compare --configs mose rome",
    ),
    "export": _Command(export.main, export.SUMMARY, "export --run runs/mose/version_0 --out edited-model"),
    "ask": _Command(ask.main, ask.SUMMARY, 'ask --run runs/mose/version_0 "The capital of France is"'),
    "undo": _Command(
        lambda args: call(partial(undo.undo, open_run=_opened), "undo", args, undo.UNDO_EXAMPLES),
        summary(undo.undo),
        "undo --run runs/mose/version_0 --last 3",
    ),
    "replay": _Command(
        lambda args: call(partial(undo.replay, open_run=_opened), "replay", args, undo.REPLAY_EXAMPLES),
        summary(undo.replay),
        "replay --run runs/mose/version_0",
    ),
    "locate": _Command(locate.main, locate.SUMMARY, "locate --model gpt2-xl"),
    "report": _Command(
        lambda args: call(report.report, "report", args, report.EXAMPLES),
        summary(report.report),
        "report runs/mose/version_0 runs/memit/version_0",
    ),
    "single": _Command(lambda args: single.main(args, _prepared), single.SUMMARY, "single --config rome.yaml"),
    "statistics": _Command(
        lambda args: statistics.main(args, _ready), statistics.SUMMARY, "statistics --config memit.yaml"
    ),
}


def _resolve(args: Sequence[str], trusted: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments with every ``--config`` resolved, and the first one's name without its ending.

    Within a command configurations come first, in their order: an option before one would lose to it otherwise, and
    where it chose a class its settings would go to the configuration's.
    """
    out: list[str] = []
    check_order(values_of(args, "--config", "-c"))
    first: list[str] = []  # the configurations of the command
    command: int | None = None  # where it ends
    stem: str | None = None

    def resolve(name: str) -> str:
        # jsonargparse would not say which file is broken, and would import a class to see what it is.
        content = read_config(name)
        if content.get("trust"):
            raise ValueError(f"{name} sets `trust`, which only the command line can: {TRUST}={content['trust']}.")
        check_classes(content, trusted, name)
        switched_off = [group for group in _OFF if group in content and content[group] is None]
        if not switched_off and not is_overlay(name):
            return find_config(name)
        return json.dumps({**content, **{group: _OFF[group] for group in switched_off}})

    takes_value = False
    for arg in args:
        is_config = takes_value or arg.startswith(("--config=", "-c=")) or arg in ("--config", "-c")
        if takes_value:
            stem = stem or _run_name(Path(arg))
            arg = resolve(arg)
        elif arg.startswith(("--config=", "-c=")):
            option, value = arg.split("=", 1)
            stem = stem or _run_name(Path(value))
            arg = f"{option}={resolve(value)}"
        takes_value = not takes_value and arg in ("--config", "-c")
        if is_config and command is not None:
            first.append(arg)
            continue
        out.append(arg)
        if command is None and not is_config and not arg.startswith("-"):
            command = len(out)
    return [*out[:command], *first, *out[command or len(out) :]], stem


def _run_name(config: Path) -> str:
    """What runs of a configuration are called: as it is, or, if it is what a run has saved, as that run."""
    place = config.resolve().parent
    return place.parent.name if config.name == "config.yaml" and place.name.startswith("version_") else config.stem


def _take_trust(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names given with ``--trust``, and the other arguments. Consent never comes from a file."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument(TRUST, default="")
    found, others = known.parse_known_args(list(args))
    return [name.strip() for name in found.trust.split(",") if name.strip()], others


_OFF: dict[str, dict[str, Any]] = {"downstream": {"n_items": 0}}
"""Groups of options that ``null`` switches off, and what says so."""


def _switch_off(args: Sequence[str]) -> list[str]:
    """Arguments with ``--<group>=null`` spelled out, where the group can be switched off."""
    spelled = {f"--{group}": [f"--{group}.{k}={v}" for k, v in settings.items()] for group, settings in _OFF.items()}
    out: list[str] = []
    for arg in args:
        if out and out[-1] in spelled and arg == "null":
            out[-1:] = spelled[out[-1]]
        else:
            option, _, value = arg.partition("=")
            out += spelled[option] if option in spelled and value == "null" else [arg]
    return out


def _take_resume(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The run named with ``--resume``, and arguments that go on with it."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument(RESUME)
    found, others = known.parse_known_args(list(args))
    if found.resume is None:
        return None, others
    run = find_run(found.resume)
    checkpoint = run / CHECKPOINT
    if not checkpoint.is_file():
        raise ValueError(f"{run} has no checkpoint to go on from: start the run again.")
    return run, [*others, "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]


class _NamedModel(LitEdit):
    """`LitEdit` as a configuration describes it: the model by its name."""

    def __init__(self, editor: Editor, model: str = EMBEDDED, **settings: Any) -> None:
        super().__init__(editor, model, **settings)


class _Parser(LightningArgumentParser):
    """Leaves out what only Python can give: a slot without a type would take any class."""

    def add_class_arguments(self, theclass: Any, nested_key: Any = None, **settings: Any) -> list[str]:
        if isinstance(theclass, type) and issubclass(theclass, LitEdit):
            settings["skip"] = {"tokenizer"}
        added: list[str] = super().add_class_arguments(theclass, nested_key, **settings)
        return added


class EditCLI(LightningCLI):
    """``fit`` for `LitEdit` and the data modules of editing, with the watching callbacks as options of their own.

    Args:
        args: the arguments; those of the process if None.
    """

    runs = True  # rather than only making what a run needs

    def __init__(self, args: ArgsType = None) -> None:
        _quiet()
        self.console = Console(highlight=False)
        given = list(sys.argv[1:] if args is None else args)
        self.trusted, given = _take_trust(given)
        enforce(self.trusted)
        self._made: list[Path] = []
        self._foreseen: dict[str, Any] = {}
        self.resumed, given = _take_resume(_switch_off(given))
        self._given = given
        resolved, self.run_name = _resolve(given, self.trusted)
        super().__init__(
            _NamedModel,
            EditDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": 1,
                "devices": 1,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "log_every_n_steps": 1,
            },
            parser_class=_Parser,
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
            args=resolved,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``: evaluation happens while editing, by the callbacks."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        # Listed only: `main` hands it over before anything is parsed here.
        if parser._subcommands_action is not None:
            for name, command in _COMMANDS.items():
                below = ArgumentParser(exit_on_error=False)
                parser._subcommands_action.add_subcommand(name, below, help=command.summary)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the resolved arguments, without Lightning's warning that they are not those of the process."""
        self.config = parser.parse_args(list(args or ()))
        if self.config.subcommand in _COMMANDS:
            name = self.config.subcommand
            raise ValueError(f"`{name}` comes first: {program()} {_COMMANDS[name].example}.")
        chosen = self.config.get(self.config.subcommand)
        if chosen is not None:
            check_classes(chosen.as_dict(), self.trusted, "The command line")

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration as the user gave it.

        Lightning would merge a checkpoint's ``hyper_parameters`` into it, and so create whatever classes they name.
        """
        path = (self.config.get(self.config.subcommand) or {}).get("ckpt_path")
        if path and Path(path).is_file():
            check_checkpoint(path)  # before the model is loaded

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults(weights_only=True)  # no pickled code is ever run
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--dry_run``, and ``--retention.*``, ``--stability.*`` and so on for the callbacks."""
        parser.add_argument(
            "--dry_run",
            action="store_true",
            help="say what the facts are to the model, and what memory and time the run needs; edit and write nothing",
        )
        parser.add_argument("--json", action="store_true", help="with --dry_run: print one JSON object and no tables")
        parser.add_argument(
            TRUST,
            default="",
            help="packages whose classes the configuration may create beside those of lit_edit, lightning and torch, "
            "separated by commas",
        )
        parser.add_argument(
            RESUME, help="go on with an interrupted run: its folder, or `last`; other options as it was started with"
        )
        parser.add_argument(
            "--folder",
            type=str | None,
            help="folder of the run, instead of a new one, runs/<configuration>/version_<n>",
        )
        parser.add_lightning_class_args(Retention, "retention")
        parser.add_lightning_class_args(MatrixStability, "stability")
        parser.add_lightning_class_args(DownstreamEval, "downstream")
        parser.add_lightning_class_args(LMEval, "lm_eval")
        parser.add_lightning_class_args(EditCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EditLog, "updates")
        parser.add_lightning_class_args(ExportModel, "export")
        parser.add_lightning_class_args(Report, "report")

    @property
    def dry(self) -> bool:
        """Whether nothing is to be edited or written."""
        return bool(self._get(self.config, "dry_run"))

    def before_instantiate_classes(self) -> None:
        """What another model takes over from the embedded one; in a dry run, the memory: before the model takes it."""
        config = self.config[self.subcommand].as_dict()
        check_trainer(config["trainer"])
        if self.runs and (said := check_strangers(config, self._given)):
            print(said, file=sys.stderr if config["json"] else sys.stdout, flush=True)
        if self.dry:
            self.console.quiet = bool(config["json"])
            self._foreseen = dry_run.foresee(config, self.console)
        elif config["json"]:
            raise ValueError("--json is for --dry_run; the figures of a run are in its results.json.")

    def instantiate_classes(self) -> None:
        """Also settles the number of CPU threads, as soon as the model is known."""
        super().instantiate_classes()
        if self.trainer.strategy.root_device.type == "cpu":
            torch.set_num_threads(self._threads())

    def _threads(self) -> int:
        try:
            layers = Architecture(self.model.model, self.model.preparation.family).layers
        except ValueError:  # a model of an unknown kind, which is refused in its own words where it is edited
            return torch.get_num_threads()
        return threads_for([layer.weight.numel() for layer in layers], torch.get_num_threads(), os.environ)

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.dry:
            try:
                # A model of an unknown kind is refused before it is asked.
                Architecture(self.model.model, self.model.preparation.family)
                super()._run_subcommand(subcommand)
            except BaseException:
                if self.trainer.is_global_zero:
                    if self.model.edits_applied:
                        self._say_how_to_go_on()
                    else:
                        _take_back(self._made)
                raise
            return
        Architecture(self.model.model, self.model.preparation.family)
        retention = next((c for c in self.trainer.callbacks if isinstance(c, Retention)), None)  # type: ignore[attr-defined]
        device = self.trainer.strategy.root_device
        found = dry_run.rehearse(self.model, self.datamodule, retention, device, self.console)
        if self.console.quiet:
            print(json.dumps({**self._foreseen, **found}, indent=2, ensure_ascii=False))

    def after_fit(self) -> None:
        """Says what can be done with the run, ready to be copied."""
        saved = next((c.path for c in self.trainer.callbacks if isinstance(c, EditCheckpoint)), None)  # type: ignore[attr-defined]
        folder = self.trainer.log_dir  # asked for on every rank: it is broadcast
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(f"fast_dev_run: {counted(self.model.edits_applied, 'edit')} made, nothing written.", flush=True)
        if saved is None or not self.trainer.is_global_zero or folder is None:
            return
        run = shlex.quote(str(folder))
        first = next((request.prompt for request in self.model.edited_requests), "")
        print(f"Ask it:     {program()} ask --run {run} {shlex.quote(first)}")
        print(f"Export it:  {program()} export --run {run} --out edited-model")
        print(f"Take back:  {program()} undo --run {run} --last 1", flush=True)

    def _say_how_to_go_on(self) -> None:
        saved = next((c.path for c in self.trainer.callbacks if isinstance(c, EditCheckpoint)), None)  # type: ignore[attr-defined]
        if saved is None:
            return
        run = Path(self.trainer.log_dir or saved.parent.parent)
        edits = self.model.edits_applied
        print(f"{counted(edits, 'edit')} saved. To go on: {program()} fit --resume {shlex.quote(str(run))}", flush=True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Every run has its folder ``runs/<configuration>/version_<n>``, whatever else it logs to; TensorBoard if told
        nothing.

        A run resumed from a checkpoint there goes on in the same folder, so that its results stay in one file.
        """
        config = self._get(self.config_init, "trainer", default={})
        folder = None
        if not self.runs or self.dry:
            kwargs["logger"] = False
        elif not config.get("fast_dev_run"):
            folder = self._folder(Path(config.get("default_root_dir") or "runs", self.run_name or "edit"))
            if config.get("logger") in (None, True):
                kwargs["logger"] = EditBoard(folder.parent.parent, name=folder.parent.name, version=folder.name)
        try:
            trainer = super().instantiate_trainer(**kwargs)
            check_processes(trainer)
        except (MisconfigurationException, TypeError, ValueError) as error:
            _take_back(self._made)
            raise ValueError(f"trainer: {one_line(str(error))}") from error
        if _wants_bar(trainer):
            trainer.callbacks.insert(0, EditProgressBar())  # type: ignore[attr-defined]
        trainer.callbacks.insert(0, _FactsReview())  # type: ignore[attr-defined]
        trainer.callbacks += [StopOnSignal(), _Outcome()]  # type: ignore[attr-defined]
        # The table, then the page: each reads what the others have written when the run ends.
        last = [ResultsTable(), *(c for c in trainer.callbacks if isinstance(c, Report))]  # type: ignore[attr-defined]
        trainer.callbacks = [*(c for c in trainer.callbacks if c not in last), *last]  # type: ignore[attr-defined]
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, _WRITING)]  # type: ignore[attr-defined]
        if folder is not None:
            # First, because Lightning takes the first logger's folder for the run's.
            trainer.loggers = [ResultsLogger(folder), *trainer.loggers]
        return trainer

    def _folder(self, runs: Path) -> Path:
        """Of the run: the one resumed, or a new one, made at once so that runs that start together do not share it."""
        if self.resumed is not None:
            return self.resumed
        if given := self._get(self.config_init, "folder"):
            folder = Path(given).expanduser()
            if (folder / FILE_NAME).exists() and not self._get(self.config_init, "ckpt_path"):
                raise ValueError(
                    f"{folder} holds a run already: --resume {folder} goes on with it, or name a new --folder."
                )
            self._made = _missing(folder)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        path = self._get(self.config_init, "ckpt_path")
        if path and (run := Path(path).expanduser().resolve().parent.parent).parent == runs.resolve():
            return runs / run.name
        number = 1 + max((int(p.name[8:]) for p in runs.glob("version_*") if p.name[8:].isdigit()), default=-1)
        while True:
            folder = runs / f"version_{number}"
            missing = _missing(folder)
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                number += 1
                continue
            self._made = missing
            return folder

    def before_fit(self) -> None:
        """Notes in ``results.json`` what is run."""
        model, data = self.model, self.datamodule
        method = model.editor.describe()
        if self.trainer.is_global_zero:
            print(
                f"Editing {model.model_name!r} with {method}, requests of {type(data).__name__}. "
                "First come the unedited model's answers, contexts and statistics.",
                flush=True,
            )
            if self.trainer.strategy.root_device.type == "cpu":
                print(f"{threads_line(torch.get_num_threads(), os.environ)}", flush=True)
        for logger in self.trainer.loggers:
            if isinstance(logger, ResultsLogger):
                logger.log_run(
                    {
                        "name": self.run_name,
                        "method": method,
                        "model": model.model_name,
                        "data": type(data).__name__,
                        "data_path": getattr(data, "path", None),
                        "n_edits": getattr(data, "n_edits", None),
                        "batch_size": getattr(data, "batch_size", None),
                        "seed": self._get(self.config, "seed_everything"),
                        "device": str(self.trainer.strategy.root_device),
                        "threads": torch.get_num_threads(),
                        "machine": machine(self.trainer.strategy.root_device),
                        "evaluation": {"definition": "exact_match", "curve": "retention", "locality": "unedited model"},
                    }
                )


# What leaves something on the disk; `fast_dev_run` does without.
_WRITING = (EditCheckpoint, EditLog, ExportModel, Report, ResultsTable)


class _Unstarted(EditCLI):
    """Everything that a run needs, and no run."""

    runs = False

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class _Parsed(_Unstarted):
    """The settings of a run, and nothing made of them."""

    def instantiate_classes(self) -> None:
        pass


def _check(args: list[str]) -> None:
    """Refuses arguments of ``fit`` that would end its run before the first edit; loads no model."""
    try:
        settings = _Parsed(args).config["fit"].as_dict()
    except ArgumentError as error:
        raise ValueError(readable(str(error))) from error
    check_strangers(settings, args)
    made(Editor, settings["model"]["editor"])
    if settings["data"] is not None:
        made(EditDataModule, settings["data"]).setup("fit")


def _ready(args: list[str]) -> tuple[LitEdit, torch.device]:
    """The module that ``fit`` with these arguments would run, and where it would compute."""
    made = _Unstarted(args)
    return made.model, made.trainer.strategy.root_device


def _prepared(args: list[str]) -> tuple[LitEdit, EditDataModule, torch.device]:
    """The same with the data."""
    made = _Unstarted([*args, "--trainer.logger=false"])
    return made.model, made.datamodule, made.trainer.strategy.root_device


def _opened(run: Path) -> LitEdit:
    """The module of a run, as its checkpoint has it."""
    checkpoint = load_checkpoint(run / CHECKPOINT) if (run / CHECKPOINT).is_file() else None
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint: the run made no edit, or was killed before it saved one.")
    made = _Unstarted(["fit", "--config", str(run / "config.yaml")])
    made.datamodule.setup("fit")
    requests = made.datamodule.requests
    made.model.open(requests, made.trainer.strategy.root_device)
    made.model.restore(checkpoint.get(CHECKPOINT_KEY), requests)
    return made.model


class _Outcome(Callback):
    """Puts settings and last figures of a run into TensorBoard's HParams tab."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        results = next((logger for logger in trainer.loggers if isinstance(logger, ResultsLogger)), None)
        if results is None or not results.records:
            return
        names = headlines(results.records)
        found = {name: record[name] for record in results.records for name in names if record.get(name) is not None}
        shown = ("name", "method", "model", "data", "n_edits", "batch_size", "seed")
        for logger in trainer.loggers:
            if isinstance(logger, EditBoard):
                logger.log_outcome({name: results.run.get(name) for name in shown}, found)


class _FactsReview(Callback):
    """Checks the facts before anything is asked, and says in one line what of a user's own file deserves a look."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if isinstance(pl_module, LitEdit) and isinstance(data, EditDataModule):
            check_requests(data.requests, pl_module.prompter)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if isinstance(pl_module, LitEdit) and pl_module.edits_applied and trainer.is_global_zero:
            print(_resumed(pl_module.edits_applied, len(getattr(data, "requests", []))), flush=True)
        if not (isinstance(pl_module, LitEdit) and isinstance(data, FactsDataModule) and trainer.is_global_zero):
            return
        if not pl_module.edits_applied:
            model: Any = pl_module.model
            print(review_line(review(data.requests, model, pl_module.prompter)), flush=True)


def _resumed(made: int, wanted: int) -> str:
    """Where a resumed run goes on."""
    if made < wanted:
        return f"Goes on after {made} of {counted(wanted, 'edit')}."
    return (
        f"All {counted(made, 'edit')} of this run are made: what is missing of figures and files follows. With more "
        f"facts it goes on, --data.n_edits={made + 100}; another run begins without --resume."
    )


def _missing(folder: Path) -> list[Path]:
    """A folder and those around it, as far as they are not there, the innermost first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


# What a run leaves in its folder before its first edit; a checkpoint or a file of the user's own is none of it.
_BEFORE_THE_FIRST_EDIT = (
    *("config.yaml", "hparams.yaml", "results.json", "outcomes.jsonl", "spectra.json"),
    "events.out.tfevents.*",
)


def _take_back(made: Sequence[Path]) -> None:
    """Removes folders that a run without an edit has made, the innermost first, unless they hold something else."""
    for folder in made:
        for pattern in _BEFORE_THE_FIRST_EDIT if folder == made[0] else ():
            for file in folder.glob(pattern):
                file.unlink()
        try:
            folder.rmdir()
        except OSError:  # it is not empty, or was not made
            return


def _wants_bar(trainer: Trainer) -> bool:
    """Replaces Lightning's own bar, which is there unless switched off or chosen by the user."""
    own = trainer.progress_bar_callback
    if own is None or isinstance(own, EditProgressBar):
        return False
    trainer.callbacks.remove(own)  # type: ignore[attr-defined]
    return True


# What Lightning says about ordinary training and what does not apply to editing, message by message, and what other
# packages tell Lightning.
_WARNINGS = (
    ".*LeafSpec.* is deprecated",
    r"\s*By default only one JsonargparseDeprecationWarning",
    r"(?s).*\bdeprecated in v4\.\d+\.\d+\s+and\s+will\s+be\s+removed\s+in\s+v5\.0\.0",
    "The '.*_dataloader' does not have many workers",
    r"Found \d+ module\(s\) in eval mode at the start of training",
)
_LOGGED = {
    "lightning.pytorch.utilities.rank_zero": (
        "GPU available: ",
        "TPU available: ",
        "\N{ELECTRIC LIGHT BULB} Tip: ",
        "`Trainer.fit` stopped: `max_epochs=",
    ),
    "lightning.fabric.utilities.seed": ("Seed set to ",),
}


class _Without(logging.Filter):
    """Drops the messages that start in one of some ways."""

    def __init__(self, starts: tuple[str, ...]) -> None:
        super().__init__()
        self.starts = starts

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.starts)


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning for people: what it says, without the line of the source that says it."""
    return f"warning: {one_line(str(message))}\n"


def _quiet() -> None:
    """Leaves out what Lightning says about ordinary training and what does not apply to editing."""
    if not os.environ.get(TRACEBACK):
        warnings.formatwarning = _warning
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, starts in _LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(starts))


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0, or 2 after an error said in one line.

    ``compare`` also returns 1, if one of its runs failed, and raises SystemExit after SIGTERM.

    Set ``LIT_EDIT_TRACEBACK=1`` to see where an error came from.
    """
    given = list(sys.argv[1:] if args is None else args)
    try:
        if given and given[0] in _COMMANDS:
            return _COMMANDS[given[0]].main(given[1:])
        EditCLI(args=given)
    except Interrupted as stop:
        print(f"{str(stop).capitalize()}.", file=sys.stderr)
        return stop.status
    except (ArgumentError, ValueError, OSError, FailedEditError, MisconfigurationException) as error:
        if os.environ.get(TRACEBACK):
            raise
        denied = re.search(r"Importing '([^']+)' is not allowed", str(error))  # by jsonargparse, before it is imported
        said = refusal(denied[1], "The command line") if denied else readable(str(error))
        print(f"error: {said}{_hint(error)}", file=sys.stderr)
        return 2
    return 0


def _hint(error: BaseException) -> str:
    if isinstance(error, ArgumentError) and "the following arguments are required" in str(error):
        return " (a configuration has them: fit --config mose.yaml)"
    if "does not exist: the model has layers" in str(error):
        return f" `{program()} locate --model MODEL` finds where a model can be edited."
    return ""


if __name__ == "__main__":
    sys.exit(main())
