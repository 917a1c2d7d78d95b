"""One run of a comparison: what is asked for, how ``fit`` is called for it, and how far it has got."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from lit_edit.configs.find import config_folder, find_config, read_config
from lit_edit.files import write_json
from lit_edit.runs.report.gather import EDITS, flattened
from lit_edit.runs.results import FILE_NAME, ResultsError, read_results

ASKED = "asked.json"
LOG = "log.txt"
CHECKPOINT = Path("checkpoints", "edits.ckpt")

#: Options of ``fit`` that a comparison sets itself, and what to use instead.
RESERVED = {
    "--data.n_edits": "--n_edits",
    "--data.init_args.n_edits": "--n_edits",
    "--data.seed": "--seeds",
    "--data.init_args.seed": "--seeds",
    "--model.seed": "--seeds",
    "--seed_everything": "--seeds",
    "--ckpt_path": "the same command again, which goes on where a run was cut",
    "--folder": "--out",
    "--trainer.default_root_dir": "--out",
    "--checkpoint.dirpath": "--out",
}

_DIFFERENCES_SHOWN = 3


class State(Enum):
    """How far a run has got."""

    NEW = "new"
    CUT = "cut"  # with a checkpoint to go on from
    COMPLETE = "complete"


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Args:
        name: Name of the method in tables, and of the folder its runs are in.
        configs: Configuration files that make it, later ones laid over earlier ones.
        seed: 0 takes the requests in the order of the file, as ``fit`` does; any other shuffles the file by it first.
            It is also the seed of the sampled contexts and of everything else that is random.
        n_edits: Number of edits.
        at: Counts of edits to measure at, ascending; the last is ``n_edits``.
        overrides: Further options of ``fit``.
        folder: Folder of this run alone.
    """

    name: str
    configs: tuple[str, ...]
    seed: int
    n_edits: int
    at: tuple[int, ...]
    folder: Path
    overrides: tuple[str, ...] = field(default=())

    @property
    def asked(self) -> dict[str, Any]:
        """Everything that decides what comes out, in plain types; the content of configurations, not their names."""
        return {
            "configs": [read_config(config) for config in self.configs],
            "overrides": list(self.overrides),
            "seed": self.seed,
            "n_edits": self.n_edits,
            "at": list(self.at),
        }

    @property
    def options(self) -> list[str]:
        """Arguments of ``fit`` that make this run."""
        counts = json.dumps(list(self.at))
        order = self.seed if self.seed else "null"
        options = [part for config in self.configs for part in ("--config", config)]
        options += [f"--{group}.every_n={counts}" for group in ("retention", "stability", "downstream")]
        options += ["--export.model=false", "--trainer.enable_progress_bar=false", *self.overrides]
        options += [f"--data.n_edits={self.n_edits}", f"--data.seed={order}"]
        options += [f"--model.seed={self.seed}", f"--seed_everything={self.seed}"]
        return [*options, f"--folder={self.folder}"]

    @property
    def command(self) -> list[str]:
        """The process that makes this run, or goes on with it."""
        checkpoint = self.folder / CHECKPOINT
        resumed = [f"--ckpt_path={checkpoint}"] if checkpoint.is_file() else []
        return [sys.executable, "-m", "lit_edit", "fit", *self.options, *resumed]

    def state(self) -> State:
        """How far this run has got.

        Raises:
            ValueError: If the folder holds something else: a run with other settings, or none of a comparison.
        """
        if not self.folder.exists():
            return State.NEW
        record = self.folder / ASKED
        if not record.is_file():
            raise ValueError(f"{self.folder} was not made by `compare`: choose another --out.")
        then, now = _read_json(record), self.asked
        if then != now:
            raise ValueError(
                f"{self.folder} holds a run with other settings ({differences(then, now)}): --fresh makes it anew, "
                "another --out keeps both."
            )
        if self.edits_done() == self.n_edits and self._ended():
            return State.COMPLETE
        return State.CUT if (self.folder / CHECKPOINT).is_file() else State.NEW

    def edits_done(self) -> int:
        """Edits at the last evaluation that is on file."""
        try:
            records = read_results(self.folder).records
        except (FileNotFoundError, ResultsError):
            return 0
        return int(records[-1]["edits"]) if records else 0

    def _ended(self) -> bool:
        return "seconds" in read_results(self.folder).run and (self.folder / EDITS).is_file()

    def prepare(self) -> None:
        """Makes the folder and notes what is asked for; a run that cannot be continued begins anew."""
        if not (self.folder / CHECKPOINT).is_file():
            (self.folder / FILE_NAME).unlink(missing_ok=True)
        write_json(self.folder / ASKED, self.asked)

    def clear(self) -> None:
        """Removes what an earlier run left, if it was one of a comparison."""
        if (self.folder / ASKED).is_file():
            shutil.rmtree(self.folder)

    def tidy(self) -> None:
        """Removes the checkpoint of a complete run, which is as large as the edited weights."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)

    def last_lines(self, number: int) -> list[str]:
        """The end of the run's output."""
        path = self.folder / LOG
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return [line for line in text.splitlines() if line.strip()][-number:]


def plan(
    configs: Sequence[str],
    seeds: Sequence[int],
    n_edits: int,
    at: Sequence[int],
    out: Path,
    overrides: Sequence[str] = (),
) -> list[Run]:
    """The runs of a comparison, seed by seed, so that the first seed's table is complete first.

    Args:
        configs: A method each: a configuration, or several joined by ``+``, later ones laid over earlier ones.
        seeds: see `Run`.
        n_edits: how many edits.
        at: counts to measure at; none for four equal parts.
        out: the folder of all runs.
        overrides: Further options of ``fit``, for every run; a ``--config`` among them is laid over every method.

    Raises:
        ValueError: If a configuration cannot be read, numbers are out of range, or names or seeds occur twice.
    """
    if n_edits < 1:
        raise ValueError(f"n_edits is {n_edits}; it must be at least 1.")
    counts = sorted(set(at or [n_edits * part // 4 for part in (1, 2, 3)]) - {0})
    if counts and not 0 < counts[0] <= counts[-1] <= n_edits:
        raise ValueError(f"--at {' '.join(map(str, at))}: counts from 1 to n_edits, {n_edits}, are needed.")
    counts = sorted({*counts, n_edits})
    if len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: different whole numbers from 0 on are needed.")
    for word in overrides:
        option = word.split("=", 1)[0]
        for reserved, instead in RESERVED.items():
            if option == reserved or option.startswith(f"{reserved}."):
                raise ValueError(f"{option} is set by compare: use {instead}.")
    if overrides and not overrides[0].startswith("-"):
        raise ValueError(f"{overrides[0]!r} is not an option; what is passed on to every run starts with --.")
    common, rest = _split_configs(overrides)
    methods: dict[str, tuple[str, ...]] = {}
    for config in configs:
        files = tuple(str(Path(find_config(part)).resolve()) for part in config.split("+"))
        for part in (*files, *common):
            read_config(part)
        name = "+".join(_short(Path(part)) for part in files)
        if name in methods:
            raise ValueError(f"There are two methods with the name {name!r}: name the files differently.")
        methods[name] = (*files, *common)
    return [
        Run(name, files, seed, n_edits, tuple(counts), out / name / f"seed-{seed}", tuple(rest))
        for seed in seeds
        for name, files in methods.items()
    ]


def _split_configs(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that ``--config`` names among the options, and the other options."""
    files: list[str] = []
    rest: list[str] = []
    words = iter(overrides)
    for word in words:
        option, _, value = word.partition("=")
        if option in ("--config", "-c"):
            files.append(str(Path(find_config(value or next(words, ""))).resolve()))
        else:
            rest.append(word)
    return files, rest


def differences(then: Any, now: Any) -> str:
    """What two records of settings differ in: the first dotted names, with the old value and the new one."""
    one, other = (dict(flattened(settings)) for settings in (then, now))
    found = [
        # The place of a configuration in the list says nothing: its settings are known by their own names.
        f"{re.sub(r'^configs[.][0-9]+[.]', '', name)}: {_shown(one.get(name))} then, {_shown(other.get(name))} now"
        for name in {**one, **other}
        if one.get(name) != other.get(name)
    ]
    more = len(found) - _DIFFERENCES_SHOWN
    return "; ".join(found[:_DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def _short(path: Path) -> str:
    """``memit``, or ``models-llama3-8b-memit`` for a file further down in the package's folder."""
    folder = config_folder().resolve()
    below = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    return "-".join(below.with_suffix("").parts)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): --fresh makes the run anew.") from error
