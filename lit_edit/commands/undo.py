"""``undo`` and ``replay``: a run's edits taken back, and its edited model made again from its updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lit_edit.commands.edited_run import CHECKPOINT, find_run
from lit_edit.commands.options import Parser
from lit_edit.files import load_checkpoint, save_checkpoint, write_json
from lit_edit.module import CHECKPOINT_KEY, LitEdit
from lit_edit.runs.results import FILE_NAME, read_results

UNDO = "Take edits of a run back: the last ones, or any others."
REPLAY = "Make the edited model of a run again from its updates, and compare every step."

_UNDO = """\
Takes edits of a run back and saves its checkpoint anew. With all edits taken back the weights are bit by bit those
before the first. edits.jsonl keeps their lines, marked `undone`. The original model must be where the run found it."""

_UNDO_EXAMPLES = """\
  python train.py undo --run runs/mose/version_0 --last 3
  python train.py undo --run last --to 100
  python train.py undo --run last --case 1042 77"""

_REPLAY = """\
Applies the updates that a run has kept to the unedited model, write by write, and compares the checksum of every layer
after every write, and the result with the run's checkpoint."""

Open = Callable[[Path], LitEdit]


def undo(args: Sequence[str], open_run: Open) -> int:
    """Takes edits back. Returns 0.

    Args:
        args: The options.
        open_run: Gives the module of a run as its checkpoint has it.

    Raises:
        ValueError: If the run or an edit cannot be found, or an update is no longer kept. Nothing is changed then.
    """
    options = Parser("undo", _UNDO, _UNDO_EXAMPLES)
    options.add_argument("--run", required=True, metavar="FOLDER", help="the run, or `last`")
    which = options.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=int, metavar="K", help="the last K edits")
    which.add_argument("--to", type=int, metavar="N", help="all after the first N; 0 for all")
    which.add_argument("--case", nargs="+", default=(), metavar="ID", help="those with these case ids")
    options.add_argument("--reason", default="", help="noted in edits.jsonl")
    given = options.parse_args(args)
    run = find_run(given.run)
    module = open_run(run)
    session = module.session
    if session is None:
        raise RuntimeError("The module has no session.")
    session.keep_in(run)
    journal, before = session.journal, len(session.journal.events)
    gone = session.undo(last=given.last, to=given.to, case_ids=given.case, reason=given.reason)
    if not gone:
        print("There is nothing to take back.")
        return 0
    checkpoint = load_checkpoint(run / CHECKPOINT)
    checkpoint[CHECKPOINT_KEY] = module.state()
    save_checkpoint(run / CHECKPOINT, checkpoint)
    if (run / FILE_NAME).is_file():
        results = read_results(run)
        write_json(run / FILE_NAME, {"run": results.run | {"edits": journal.counts()}, "records": results.records})
    left = session.workspace.edits
    print(f"Taken back: {_listed(gone)}. {left} edits are in the weights.")
    for event in journal.events[before:]:
        if event.event == "rewritten":
            print(f"Written again alone, because they were written together with those: {_listed(event.numbers)}.")
    if not left:
        print("The weights are those before the first edit, bit by bit.")
    if (run / "model").is_dir():
        print(f"{run / 'model'} is still the model from before; `export --run {run} --out FOLDER` writes the new one.")
    return 0


def replay(args: Sequence[str], open_run: Open) -> int:
    """Makes the edited model again. Returns 0 if it is what the checkpoint holds, 1 if not.

    Args:
        args: The options.
        open_run: As above.

    Raises:
        ValueError: If the run cannot be found, or has kept no updates.
        lit_edit.files.DamagedFileError: If a write does not make of a layer what it was.
    """
    options = Parser("replay", _REPLAY, "  python train.py replay --run runs/mose/version_0")
    options.add_argument("--run", required=True, metavar="FOLDER", help="the run, or `last`")
    run = find_run(options.parse_args(args).run)
    session = open_run(run).session
    if session is None:
        raise RuntimeError("The module has no session.")
    updates = session.kept_updates(run)
    if not len(updates):
        raise ValueError(f"{run} has kept no updates: `fit` keeps them unless --updates.limit is 0.")
    stored = {site.layer: site.stored.clone() for site in session.sites}
    writes = updates.compose(session.workspace.sites, verify=True)
    wrong = [site.name for site in session.sites if not site.stored.equal(stored[site.layer])]
    if wrong:
        print(f"After {len(writes)} writes these are not what {run / CHECKPOINT} holds: {', '.join(wrong)}.")
        return 1
    edits = len({number for write in writes for number in write.numbers})
    print(f"{edits} edits, {len(writes)} writes: every layer is what {run / CHECKPOINT} holds, bit by bit.")
    return 0


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:20]))
    return f"edits {shown}" + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")
