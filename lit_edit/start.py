"""Where the program starts: help, and what is mistyped, before the seconds that torch and Lightning take to load."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_edit.completion import script
from lit_edit.configs.find import check_order, values_of
from lit_edit.program import TRACEBACK, __version__, program
from lit_edit.spelling import check_options, did_you_mean

COMMANDS = {
    "fit": "edit a model by a configuration: one run",
    "compare": "several methods over the same edits; one table and one figure",
    "ask": "ask the model before and after its edits, and see which facts hold",
    "report": "a page about a run, or about several side by side",
    "export": "the edited model as transformers loads it, or what changed as a small file",
    "undo": "take edits of a run back",
    "replay": "make the edited model again from its updates, and compare every step",
    "single": "write every fact alone into the unedited model: what single edits score",
    "locate": "where a model can be edited, and a configuration for it",
    "statistics": "collect key covariances beforehand; list and clear what is kept",
    "completion": 'a script for bash or zsh: eval "$(lit-edit completion bash)"',
}

_OVERVIEW = """\
usage: {program} COMMAND [OPTIONS]

Rewrites single facts in a language model's weights, one after another, and measures what holds and what breaks.

{commands}

  {program} fit --config rome.yaml            edits the model that comes along, offline
  {program} ask --run last                    asks it, before and after
  {program} COMMAND --help                    the options of a command

Errors end in one line; {traceback}=1 shows where one came from.
"""

_FIT = """\
usage: {program} fit --config METHOD [OPTIONS]

Edits a model, fact after fact, and leaves figures, answers and the edited model in runs/METHOD/version_N.

what to edit, and how
  -c, --config NAME          a method that comes along (rome, memit, mose, mose-plus, ...) or a YAML file; several are
                             laid over one another
  --model.model NAME         embedded (default), a folder, or a name on the Hugging Face hub
  --model.corpus NAME        text for the key covariances: embedded, a text or JSONL file, hf:owner/name
  --data CLASS               FactsDataModule for facts of your own; CounterFactDataModule, ZsREDataModule
  --data.path FILE           CSV, JSON or JSON Lines with prompt, subject, target_new
  --data.n_edits N           how many of them; null for all

along the way
  --retention.every_n N      ask for all edits so far every N edits, or at a list of counts
  --model.guard.on_failed_edit keep|retry|skip|undo|stop
                             what becomes of an edit that does not take
  --dry_run                  say what memory and time it would take, with --json for programs; nothing is written
  --resume RUN               go on with a run that was stopped: its folder, or `last`

  --help.all                 every other option: --trainer.*, --model.editor.*, --stability.*, --downstream.*, ...
  --model.editor.help CLASS, --data.help CLASS
                             what a class takes; --print_config shows all settings with their values

  {program} fit --config rome.yaml --data.init_args.n_edits=20
  {program} fit --config memit.yaml --data=FactsDataModule --data.path=facts.csv --data.n_edits=null --dry_run
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program. Returns the exit status, see `lit_edit.cli.main`.

    Args:
        args: Those of the process if None.
    """
    given = list(sys.argv[1:] if args is None else args)
    try:
        said = at_once(given)
    except ValueError as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if said is not None:
        print(said, end="")
        return 0
    from lit_edit import cli  # takes seconds

    return cli.main(["--help" if arg == "--help.all" else arg for arg in given])


def at_once(given: Sequence[str]) -> str | None:
    """What can be said without loading anything: help, the version; None if the program has to do something.

    Args:
        given: The arguments of the program.

    Raises:
        ValueError: If a command, an option of ``fit``, a configuration or a file of facts does not exist.
    """
    if not given or given[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
        return _OVERVIEW.format(program=program(), commands=lines, traceback=TRACEBACK)
    if given[0] == "--version":
        return f"lit-edit {__version__}\n"
    if given[0] == "completion":
        return script(given[1] if len(given) > 1 else "", COMMANDS)
    if given[0].startswith("-"):
        return None
    if given[0] not in COMMANDS:
        meant = did_you_mean(given[0], COMMANDS)
        raise ValueError(f"There is no command {given[0]!r}{meant}. The commands are {', '.join(COMMANDS)}.")
    if given[0] == "fit":
        if "-h" in given or "--help" in given:
            return _FIT.format(program=program())
        check_options(given[1:])
    if given[0] in ("fit", "single", "statistics"):
        check_order(values_of(given, "--config", "-c"))
        # A later file takes the place of an earlier one; whatever is no plain file name, the data module looks at.
        for path in values_of(given, "--data.path", "--data.init_args.path")[-1:]:
            if path.endswith((".csv", ".json", ".jsonl")) and not Path(path).expanduser().exists():
                raise ValueError(f"{path}: there is no such file.")
    return None
