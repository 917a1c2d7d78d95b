"""The evidence of docs/RELIABILITY.md: runs killed, files damaged, records mutated, edits taken back.

Every try is noted in a file as soon as it is over; the same command goes on where it was stopped.

* ``kills``: ``fit`` on a tiny model is ended by SIGKILL, SIGTERM or SIGINT at a random moment and resumed (started
  again where there is no checkpoint yet); it has to end with the weights of an uninterrupted run, bit by bit.
* ``full``: the same with a limit on the size of files, as on a full disk; afterwards the run goes on without the limit.
* ``flips``, ``cuts``: one bit of a file is turned, or its end cut off; reading has to refuse it.
* ``records``: records of every form are mutated; a file of them is read, or refused in one line that names it.
* ``undo``: edits are made and taken back: all at once, one by one from the end, some picked at random.

    python benchmarks/reliability.py --kills 100 --full 50 --flips 1000 --cuts 200 --records 10000 --undo 1000
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lit_edit.datamodules import EditDataModule
from rich.progress import track

from lit_edit.files import DamagedFileError, load_checkpoint
from lit_edit.requests import RequestError
from lit_edit.runs.delta import DeltaError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers import records as forms
from helpers.models import tiny_model
from helpers.runs import command_line
from helpers.sessions import FACTS, MAKERS, contents, session, write

METHODS = ("rome", "memit", "alphaedit", "r-rome", "emmet", "mose")
PROCESSES = multiprocessing.get_context("forkserver")  # of children that need not import everything again
PROCESSES.set_forkserver_preload(["lit_edit.cli"])


def _child(arguments: list[str], log: Path, size: int | None) -> None:
    """Runs a command line; files it writes may have ``size`` bytes."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    from lit_edit.cli import main

    sys.argv = ["lit-edit", *arguments]
    sys.exit(main())


def started(arguments: list[str], folder: Path, size: int | None = None) -> Any:
    """A process that runs a command line."""
    process = PROCESSES.Process(target=_child, args=(arguments, folder / "log", size))
    process.start()
    return process


def command(folder: Path, method: str) -> list[str]:
    """Seven slow edits on a tiny model, saved after every one."""
    model = folder / "model"
    if not model.is_dir():
        made, tokenizer = tiny_model("llama")
        made.save_pretrained(model)
        tokenizer.save_pretrained(model)
    steps = "--model.editor.values.steps=40"
    quiet = ["--trainer.enable_progress_bar=false", "--export.model=false", "--checkpoint.every_n=1", steps]
    return [*command_line(model, folder, method, 7), *quiet, f"--model.cache_dir={folder / 'cache'}"]


def final(run: Path) -> dict[str, Any]:
    """What a finished run has in its checkpoint, but for times."""
    state = load_checkpoint(run / "checkpoints" / "edits.ckpt")["lit_edit"]
    edits = [{k: v for k, v in edit.items() if k not in ("seconds", "stages")} for edit in state["journal"]["edits"]]
    return {"edits": edits, "sites": state["sites"], "history": state["last_number"]}


def same(one: Any, other: Any) -> bool:
    """Equal, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other) or (one != one and other != other)


def go_on(folder: Path, method: str) -> tuple[int, str]:
    """Resumes the run in a folder, or starts it again where nothing was saved."""
    run = folder / method / "version_0"
    if (run / "checkpoints" / "edits.ckpt").is_file():
        arguments = ["fit", "--resume", str(run)]
    else:
        shutil.rmtree(folder / method, ignore_errors=True)
        arguments = command(folder, method)
    process = started(arguments, folder)
    process.join()
    return process.exitcode, (folder / "log").read_text(encoding="utf-8", errors="replace")[-300:]


def interrupted(limit: bool) -> Callable[[int, Path, random.Random], str]:
    """A try: what became of a run that was stopped."""
    whole: dict[str, dict[str, Any]] = {}

    def attempt(number: int, place: Path, rng: random.Random) -> str:
        method = METHODS[number % len(METHODS)]
        if method not in whole:
            reference = place / f"whole-{method}"
            shutil.rmtree(reference, ignore_errors=True)
            reference.mkdir(parents=True)
            status, said = go_on(reference, method)
            if status:
                raise RuntimeError(f"The uninterrupted run failed: {said}")
            whole[method] = final(reference / method / "version_0")
        folder = place / "try"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        size = rng.choice([1_000, 3_000, 6_000, 12_000, 24_000]) if limit else None
        process = started(command(folder, method), folder, size)
        if not limit:
            journal = folder / method / "version_0" / "edits.jsonl"
            if rng.random() < 0.8:  # while edits are made; else at any time from the start
                while process.is_alive() and not journal.is_file():
                    time.sleep(0.005)
                time.sleep(rng.random() * 1.5)
            else:
                time.sleep(rng.random() * 8)
            if process.is_alive():
                os.kill(process.pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        process.join()
        stopped = process.exitcode != 0
        status, said = go_on(folder, method)
        if status:
            return f"lost: {said}"
        if not same(final(folder / method / "version_0"), whole[method]):
            return f"differs: {method}"
        return "survived" if stopped else "too late"

    return attempt


def damage(kind: str) -> Callable[[int, Path, random.Random], str]:
    """A try: whether a damaged file was refused."""
    import test_files as known

    made: dict[str, tuple[bytes, Path, Callable[[Path], Any]]] = {}

    def attempt(number: int, place: Path, rng: random.Random) -> str:
        name = sorted(known.KINDS)[number % len(known.KINDS)]
        if name not in made:
            folder = place / f"files-{name}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            path, load = known.KINDS[name](folder)
            made[name] = path.read_bytes(), path, load
        content, path, load = made[name]
        spoiled = bytearray(content)
        if kind == "flips":
            place_of = rng.randrange(len(spoiled))
            spoiled[place_of] ^= 1 << rng.randrange(8)
        else:
            spoiled = spoiled[: rng.randrange(len(spoiled))]
        path.write_bytes(spoiled)
        try:
            load(path)
        except (DamagedFileError, DeltaError, ValueError) as error:
            said = str(error)
            return "refused" if path.name in said or str(path.parent) in said else f"unnamed: {said[:80]}"
        finally:
            path.write_bytes(content)
        return f"accepted: {name}"

    return attempt


_NESTED = "NESTED"  # stands for lists nested too deep for Python to write
_ODD: list[Any] = [None, "", " ", "\ud800", "{}", "a" * 5000, -1, 1e308, float("inf"), True, [], {}, [[]], ["x", None]]
_ODD += [{"str": 3}, "\x00", "{subject}", 10**40]


def mutate(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A record with something else in one place or more."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        what = rng.random()
        if what < 0.15:
            del changed[key]
        elif what < 0.25:
            changed[f"{key} "] = changed.pop(key)
        elif what < 0.3:
            changed[key] = f"{_NESTED}{rng.choice([3, 60, 2000, 200_000])}"
        else:
            changed[key] = mutate(value[key], rng, depth + 1)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        changed_list = list(value)
        changed_list[rng.randrange(len(value))] = mutate(rng.choice(value), rng, depth + 1)
        return changed_list
    return copy.deepcopy(rng.choice(_ODD))


def mutated(number: int, place: Path, rng: random.Random) -> str:
    """A try: whether a file of mutated records was read or refused as it should."""
    maker = [forms.counterfact, forms.mend, forms.concept, forms.flat][number % 4]
    records = [maker() for _ in range(3)]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(3)
        records[at] = mutate(records[at], rng) if isinstance(records[at], dict) else records[at]
    path = place / "records.json"
    text = re.sub(rf'"{_NESTED}(\d+)"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), json.dumps(records))
    if rng.random() < 0.2:  # not JSON any more, or other characters
        cut = rng.randrange(len(text))
        text = text[:cut] + rng.choice(["", '"', "}", "\ufeff", "9" * 6000, "\\u"]) + text[cut + rng.randrange(4) :]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = EditDataModule(str(path), n_edits=None)
            data.setup("fit")
    except RequestError as error:
        said = str(error)
        if "\n" in said or len(said) > 1300:
            return f"long: {len(said)} characters"
        return "refused" if path.name in said else f"unnamed: {said[:80]}"
    except Exception as error:  # what this counts
        return f"traceback: {type(error).__name__}: {str(error)[:80]}"
    return "read"


def undone(number: int, place: Path, rng: random.Random) -> str:
    """A try of 25 edits: made, and taken back in one of three ways."""
    name = sorted(MAKERS)[number % len(MAKERS)]
    opened = session(MAKERS[name]())
    before = contents(opened)
    from dataclasses import replace

    requests = [replace(FACTS[i % len(FACTS)], case_id=str(i)) for i in range(25)]
    states = []
    for request in requests:
        states.append(contents(opened))
        write(opened, [request])
    way = ("all at once", "from the end", "at random")[(number // len(MAKERS)) % 3]
    if way == "all at once":
        opened.undo(to=0)
    elif way == "from the end":
        for state in reversed(states):
            opened.undo(last=1)
            if not same(contents(opened), state):
                return f"differs: {name}, {way}"
    else:
        gone = sorted(rng.sample(range(1, 26), 10))
        opened.undo(gone)
        if set(opened.workspace.history) & set(gone):
            return f"left: {name}, {way}"
        opened.undo(to=0)
    return "exact" if same(contents(opened), before) else f"differs: {name}, {way}"


SECTIONS: dict[str, Callable[[], Callable[[int, Path, random.Random], str]]] = {
    "kills": lambda: interrupted(limit=False),
    "full": lambda: interrupted(limit=True),
    "flips": lambda: damage("flips"),
    "cuts": lambda: damage("cuts"),
    "records": lambda: mutated,
    "undo": lambda: undone,
}
_EDITS_A_TRY = 25


def results(out: Path) -> Iterator[tuple[str, int, str]]:
    """Tries that are over."""
    if out.is_file():
        for line in out.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield record["section"], record["number"], record["result"]


def table(out: Path) -> str:
    """Tries by section and result, as Markdown."""
    by_section: dict[str, Counter[str]] = {}
    for section, _, result in results(out):
        by_section.setdefault(section, Counter())[result.split(":")[0]] += 1
    lines = ["| what | tries | results |", "|---|---|---|"]
    for section, counts in by_section.items():
        found = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        lines.append(f"| {section} | {sum(counts.values())} | {found} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SECTIONS:
        options.add_argument(f"--{name}", type=int, default=0, metavar="N", help="edits" if name == "undo" else "tries")
    options.add_argument("--out", type=Path, default=Path("runs/reliability.jsonl"), help="where tries are noted")
    given = options.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    done = {(section, number) for section, number, _ in results(given.out)}
    with tempfile.TemporaryDirectory() as place:
        for name, make in SECTIONS.items():
            count = getattr(given, name)
            count = -(-count // _EDITS_A_TRY) if name == "undo" else count
            left = [number for number in range(count) if (name, number) not in done]
            attempt = make() if left else None
            for number in track(left, description=name):
                assert attempt is not None
                result = attempt(number, Path(place), random.Random(f"{name} {number}"))
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"section": name, "number": number, "result": result}) + "\n")
    print(table(given.out))


if __name__ == "__main__":
    main()
