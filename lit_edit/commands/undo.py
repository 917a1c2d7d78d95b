"""``undo`` and ``replay``: a run's edits taken back, and its edited model made again from its updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lit_edit.commands.edited_run import CHECKPOINT, find_run
from lit_edit.files import load_checkpoint, save_checkpoint, write_json
from lit_edit.module import CHECKPOINT_KEY, LitEdit
from lit_edit.runs.results import FILE_NAME, read_results

UNDO_EXAMPLES = """\
  python train.py undo --run runs/mose/version_0 --last 3
  python train.py undo --run last --to 100
  python train.py undo --run last --case 1042 77"""
REPLAY_EXAMPLES = "  python train.py replay --run runs/mose/version_0"

Open = Callable[[Path], LitEdit]


def undo(
    run: str,
    last: int | None = None,
    to: int | None = None,
    case: list[str] | None = None,
    reason: str = "",
    *,
    open_run: Open,
) -> int:
    """Take edits of a run back: the last ones, or any others.

    The run's checkpoint is saved anew. With all edits taken back the weights are bit by bit those before the first.
    edits.jsonl keeps their lines, marked `undone`. The original model must be where the run found it.

    Args:
        run: Folder of the run, or `last`.
        last: Take back the last so many edits.
        to: Take back all edits after the first so many; 0 for all.
        case: Take back the edits with these case ids.
        reason: Noted in edits.jsonl.
        open_run: Gives the module of a run as its checkpoint has it.

    Raises:
        ValueError: If the run or an edit cannot be found, or an update is no longer kept. Nothing is changed then.
    """
    if sum(which is not None for which in (last, to, case)) != 1:
        raise ValueError("undo: which edits? One of --last 3, --to 100 and --case 1042.")
    folder = find_run(run)
    module = open_run(folder)
    session = module.session
    if session is None:
        raise RuntimeError("The module has no session.")
    session.keep_in(folder)
    journal, before = session.journal, len(session.journal.events)
    gone = session.undo(last=last, to=to, case_ids=case or (), reason=reason)
    if not gone:
        print("There is nothing to take back.")
        return 0
    checkpoint = load_checkpoint(folder / CHECKPOINT)
    checkpoint[CHECKPOINT_KEY] = module.state()
    save_checkpoint(folder / CHECKPOINT, checkpoint)
    if (folder / FILE_NAME).is_file():
        results = read_results(folder)
        write_json(folder / FILE_NAME, {"run": results.run | {"edits": journal.counts()}, "records": results.records})
    left = session.workspace.edits
    print(f"Taken back: {_listed(gone)}. {left} edits are in the weights.")
    for event in journal.events[before:]:
        if event.event == "rewritten":
            print(f"Written again alone, because they were written together with those: {_listed(event.numbers)}.")
    if not left:
        print("The weights are those before the first edit, bit by bit.")
    if (folder / "model").is_dir():
        print(
            f"{folder / 'model'} is still the model from before; `export --run {run} --out FOLDER` writes the new one."
        )
    return 0


def replay(run: str, *, open_run: Open) -> int:
    """Make the edited model of a run again from its updates, and compare every step.

    The updates that a run has kept are applied to the unedited model, write by write. The checksum of every layer is
    compared after every write, and the result with the run's checkpoint.

    Args:
        run: Folder of the run, or `last`.
        open_run: Gives the module of a run as its checkpoint has it.

    Returns:
        0 if the model is what the checkpoint holds, 1 if not.

    Raises:
        ValueError: If the run cannot be found, or has kept no updates.
        lit_edit.files.DamagedFileError: If a write does not make of a layer what it was.
    """
    folder = find_run(run)
    session = open_run(folder).session
    if session is None:
        raise RuntimeError("The module has no session.")
    updates = session.kept_updates(folder)
    if not len(updates):
        raise ValueError(f"{folder} has kept no updates: `fit` keeps them unless --updates.limit is 0.")
    stored = {site.layer: site.stored.clone() for site in session.sites}
    writes = updates.compose(session.workspace.sites, verify=True)
    wrong = [site.name for site in session.sites if not site.stored.equal(stored[site.layer])]
    if wrong:
        print(f"After {len(writes)} writes these are not what {folder / CHECKPOINT} holds: {', '.join(wrong)}.")
        return 1
    edits = len({number for write in writes for number in write.numbers})
    print(f"{edits} edits, {len(writes)} writes: every layer is what {folder / CHECKPOINT} holds, bit by bit.")
    return 0


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:20]))
    return f"edits {shown}" + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")
