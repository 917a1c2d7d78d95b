"""`fit --dry_run`: what it says comes true, and nothing is written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import FAMILIES, tiny_model
from helpers.runs import CORPUS, asked, command_line, data, facts, quick_editor
from helpers.sites import random_case
from lit_edit.callbacks import EveryNEdits, Retention

from lit_edit import load_model
from lit_edit.cli import main
from lit_edit.commands.dry_run import advice, editing_time, memory_at_hand, memory_needed, skeleton
from lit_edit.editors import Editor
from lit_edit.editors.solvers import MOSE, MOSEKey
from lit_edit.editors.solvers.mose_key import FOLD_AT
from lit_edit.model.workspace import Workspace
from lit_edit.session import EditSession, Preparation
from lit_edit.units import size_text, time_text

Folder = Callable[[str], Path]
Said = pytest.CaptureFixture[str]


@pytest.fixture
def arguments(tiny_folder: Folder, tmp_path: Path) -> Callable[..., list[str]]:
    """A complete command line on a tiny model, runs in ``tmp_path / "runs"``."""

    def command(method: str = "memit", n: int = 4, **changes: Any) -> list[str]:
        given = command_line(tiny_folder("llama"), tmp_path, method, n, **changes)
        given[given.index("--trainer.default_root_dir") + 1] = str(tmp_path / "runs")
        return [*given, "--model.cache_dir", str(tmp_path / "cache")]

    return command


Command = Callable[..., list[str]]


# The command


@pytest.mark.parametrize("method", ["memit", "mose"])
def test_nothing_is_written_and_everything_is_said(
    arguments: Command, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    command = arguments(method, prompt="The capital of France is", subject="France")  # the second fact contradicts
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    for words in (
        "weights",
        "key covariances",
        "original weights",
        "memory at hand",
        "4 facts to write",
        "contradicts c0",
        "statistics",
        "4 edits would take about",
        "The rehearsal took",
        "Nothing was written.",
    ):
        assert words in said
    assert said.index("key covariances") < said.index("4 facts to write") < said.index("would take")


def test_the_same_as_json(arguments: Command, capsys: Said) -> None:
    command = arguments("memit", prompt="The capital of France is", subject="France")
    assert main([*command, "--dry_run", "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said[said.index("{") :])
    assert said.index("{") == 0
    assert found["edits"] == 4
    assert [fact["contradicts"] for fact in found["facts"]] == [[], ["c0"], [], []]
    assert all(0 <= fact["probability"] <= 1 for fact in found["facts"])
    parts = {name: value for name, value in found["memory_bytes"].items() if name not in ("together", "at hand")}
    assert found["memory_bytes"]["together"] == sum(parts.values()) > 0
    seconds = dict(found["seconds"])
    assert seconds.pop("together") == pytest.approx(sum(seconds.values()))
    assert main([*command, "--json"]) == 2
    assert "--json is for --dry_run" in capsys.readouterr().err


def test_advice_names_what_takes_most_of_a_run() -> None:
    often = Retention(every_n=10)
    said = advice({}, {"values": 100.0}, {"retention": 900.0}, 100, 1, often)
    # Asked 100 + (10 + 20 + ... + 100) = 650 times now, 100 + 50 + 100 = 250 times then.
    assert said == ["evaluation would take 15 min of 17 min: with --retention.every_n=50 it is 5.8 min."]
    assert advice({}, {"values": 1000.0}, {"retention": 900.0}, 100, 1, often) == []
    assert (
        advice({}, {"values": 1.0}, {"retention": 9.0}, 100, 1, Retention(every_n=100)) == []
    )  # not to be had for less
    (said_too,) = advice({"statistics": 3600.0}, {"values": 100.0}, {}, 100, 1, None)
    assert said_too.startswith("collecting statistics would take 60 min of 62 min: `")
    assert "statistics` with the same options does it once" in said_too


def test_a_run_after_a_rehearsal_is_the_run_without_one(arguments: Command, tmp_path: Path, capsys: Said) -> None:
    assert main([*arguments(), "--dry_run"]) == 0
    assert main(arguments()) == 0
    assert len((tmp_path / "runs" / "memit" / "version_0" / "edits.jsonl").read_text().splitlines()) == 4
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert kept
    capsys.readouterr()
    assert main([*arguments(), "--dry_run"]) == 0  # with the statistics that are there by now
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == kept
    assert not (tmp_path / "runs" / "memit" / "version_1").exists()


def test_a_model_larger_than_the_memory_is_never_loaded(
    arguments: Command, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lit_edit.module.load_model", never)
    monkeypatch.setattr("lit_edit.commands.dry_run.memory_at_hand", lambda device: 50_000)
    assert main([*arguments(), "--dry_run"]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert "for what lasts alone, 50 kB are at hand: take --model.dtype=bfloat16" in line
    assert "key covariances" in said.out


def test_errors_of_a_run_are_those_of_its_rehearsal(arguments: Command, tmp_path: Path, capsys: Said) -> None:
    for given, words in (
        (["--model.model", str(tmp_path / "none")], "no model there"),
        (["--model.editor.layers.layers=[9]"], "Layer 9 does not exist"),
        (["--data.path", str(tmp_path / "none.csv")], "there is no such file"),
    ):
        assert main([*arguments(), *given, "--dry_run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def test_missing_statistics_that_may_not_be_collected_end_the_rehearsal_too(arguments: Command, capsys: Said) -> None:
    given = [*arguments(), "--model.collect_statistics=false"]
    for command in ([*given, "--dry_run"], given):
        assert main(command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "no key covariance of model.layers.1.mlp.down_proj" in line
        assert "collect it with" in line
    assert main(arguments()) == 0
    assert main([*given, "--dry_run"]) == 0  # they are there by now


@pytest.mark.filterwarnings("ignore:The key covariance was counted over 20 tokens, fewer than a key's")
def test_a_corpus_too_short_for_the_method_ends_the_rehearsal_too(arguments: Command, capsys: Said) -> None:
    """And only for a method that inverts what its few tokens leave singular."""
    for method, status in (("memit", 2), ("mose", 0)):
        given = [*arguments(method), "--model.corpus_tokens=20"]
        for command in ([*given, "--dry_run"], given):
            assert main(command) == status
            said = capsys.readouterr().err
            assert ("matrix to invert is not positive definite" in said) == (status == 2)


def test_a_rehearsal_warns_of_few_tokens_as_the_run_does(arguments: Command) -> None:
    with pytest.warns(UserWarning, match="counted over 200 tokens, fewer than 10 for each") as warned:
        assert main([*arguments(), "--model.corpus_tokens=200", "--dry_run"]) == 0
    assert len([w for w in warned if "key covariance" in str(w.message)]) == 1


@pytest.mark.parametrize("field", ["rephrase_prompt", "locality_prompt"])
def test_a_probe_too_long_in_a_later_record_is_found_before_anything_else(
    arguments: Command, tmp_path: Path, capsys: Said, field: str
) -> None:
    command = arguments(n=4, **{field: "The sea of Peru is " * 30})
    for given in ([*command, "--dry_run"], command):
        assert main(given) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"error: facts.json, record 2, field '{field}': ")
        assert "facts to write" not in said.out
    assert not list(tmp_path.rglob("*.safetensors*"))  # no statistics either


def test_all_mistakes_in_the_facts_are_said_at_once(arguments: Command, tmp_path: Path, capsys: Said) -> None:
    command = arguments()
    records = facts(5)
    records[1]["target_new"], records[3]["subject"] = "", "nobody"
    (tmp_path / "facts.json").write_text(json.dumps(records), encoding="utf-8")
    for given in ([*command, "--dry_run"], command):
        assert main(given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: 2 of 5 records cannot be edited: facts.json, record 2, field 'target_new'")
        assert "facts.json, record 4, field 'subject': 'nobody' does not occur" in line
        hint = line[line.index("--data.") :].split()[0]
    with pytest.warns(UserWarning, match="2 of 5 records cannot be edited and are left out") as warned:
        assert main([*command, hint, "--dry_run"]) == 0
    assert len([w for w in warned if "are left out" in str(w.message)]) == 1
    assert "3 facts to write (3 rephrasings, 3 locality probes)" in capsys.readouterr().out


def test_a_run_says_in_one_line_what_deserves_a_look(arguments: Command, capsys: Said) -> None:
    assert main([*arguments(prompt="The capital of France is", subject="France"), "--export.model=false"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "facts to write" in line]
    assert line.startswith(
        "4 facts to write (4 rephrasings, 4 locality probes): 0 already known, 0 given twice, 1 contradicting an "
        "earlier one ("
    )
    assert (
        "facts.json, record 2 wants 'Oslo' for 'The capital of France is' where facts.json, record 1 wants 'Lyon'"
        in line
    )


# Memory


def stored(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def session(family: str, editor: Editor, tmp_path: Path) -> EditSession:
    model, tokenizer = tiny_model(family)
    how = Preparation(corpus=CORPUS.splitlines(), cache_dir=str(tmp_path))
    return EditSession(model, tokenizer, editor, how)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_its_weights_counts_the_same(family: str, tiny_folder: Folder) -> None:
    editor = quick_editor("memit")
    for dtype in ("float32", "bfloat16"):
        hollow, tokenizer = skeleton(str(tiny_folder(family)), dtype) or (None, None)
        whole, _ = load_model(str(tiny_folder(family)), dtype)
        assert hollow is not None
        needed, loaded = (memory_needed(Workspace.of(model, tokenizer), editor, 5) for model in (hollow, whole))
        assert needed == loaded
        assert needed["weights"] == stored([*whole.parameters(), *whole.buffers()])
        assert stored(hollow.parameters()) <= 8 * len(list(hollow.parameters()))
        assert {n: p.shape for n, p in hollow.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert skeleton(str(tiny_folder(family) / "nowhere"), "float32") is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["memit", "alphaedit", "o-edit-memit", "mose", "ft"])
def test_what_lasts_is_as_large_as_the_tensors(method: str, family: str, tmp_path: Path) -> None:
    editor = quick_editor(method)
    made = session(family, editor, tmp_path)
    found = memory_needed(made.workspace, editor, 5)
    assert found.pop("weights") == stored([*made.model.parameters(), *made.model.buffers()])
    assert found.pop("key covariances", 0) == stored(s.covariance for s in made.sites if s.covariance is not None)
    assert found.pop("language-model gradients", 0) == stored(s.gradient for s in made.sites if s.gradient is not None)
    for request in asked(5):
        made.apply(made.plan([request]))
    every = stored(site.stored for site in made.sites)
    assert found.pop("original weights") == every
    originals = stored(site.original_stored for site in made.sites if site.edited)
    assert 0 < originals <= every if method == "mose" else originals == every
    keys = stored(part for site in made.sites for part in (site.keys, site.targets))
    assert keys <= found.pop("keys and targets of past edits")
    if method == "alphaedit":
        kept: list[Any] = [site.kept["AlphaEdit.null_space"] for site in made.sites]
        real_kept = sum(stored([k.projector, k.inverse, k.fresh, k.solved, k.inner]) for k in kept)
        assert sum(part.projector.nbytes for part in kept) <= real_kept <= found.pop("what the method keeps")
    elif method == "ft":
        assert found.pop("what the method keeps") == 16 * sum(site.stored.numel() for site in made.sites)
    else:  # see below for how much it is
        assert found.pop("what the method keeps") > 0
    assert found == {}
    made.model.to(torch.bfloat16)
    assert memory_needed(made.workspace, editor, 5)["what rounding took"] == every / 2  # as large as the weights


def test_what_rotations_keep_from_edit_to_edit() -> None:
    """On a width at which they keep anything; a narrower one is solved by a dense decomposition every time."""
    d, p = 96, 128
    for solver in (MOSE(), MOSEKey()):
        case = random_case(d, p)
        for seed in range(3):
            case = case.then(seed)
            case.write(solver)
        kept: Any = case.site.kept
        if isinstance(solver, MOSE):
            real = stored([kept["MOSE.eigenvectors"]["vectors"], kept["MOSE.eigenvectors"]["factor"].clone()])
        else:
            preserved = kept["MOSEKey.eigenvectors"].preserved
            real = stored([preserved.vectors, preserved.factor.clone(), kept["MOSEKey.triangle"]["triangle"]])
            real += 8 * p * (FOLD_AT - preserved.factor.shape[1])
        assert real <= 8 * solver.kept_size(d, p) <= 2 * real
        assert type(solver)(method="svd").kept_size(d, p) == (d * d if isinstance(solver, MOSEKey) else 0)


def test_a_longer_run_never_needs_less(tiny_folder: Folder) -> None:
    hollow, tokenizer = skeleton(str(tiny_folder("llama")), "float32") or (None, None)
    assert hollow is not None
    workspace = Workspace.of(hollow, tokenizer)
    for method in ("memit", "mose", "alphaedit", "rome"):
        editor = quick_editor(method)
        needs = [sum(memory_needed(workspace, editor, n).values()) for n in (1, 2, 5)]
        assert needs == sorted(set(needs))


def test_memory_at_hand_is_what_the_machine_has() -> None:
    found = memory_at_hand(torch.device("cpu"))
    assert found is None or found > 10_000_000


def test_files_that_were_read_do_not_take_memory_from_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "memory.max": "5000\n",
        "memory.current": "4500\n",
        "memory.stat": "anon 1500\nactive_file 2000\ninactive_file 900\nfile 3000\n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    group = (str(tmp_path), "memory.max", "memory.current", ("active_file", "inactive_file"))
    monkeypatch.setattr("lit_edit.commands.dry_run._GROUPS", (group,))
    assert memory_at_hand(torch.device("cpu")) == 5000 - 4500 + 2900
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")  # no limit: what the machine has
    assert (memory_at_hand(torch.device("cpu")) or 1e9) > 5000


# Time


def test_the_first_batch_counts_once() -> None:
    found = editing_time({"values": 2.0, "solve": 10.0}, {"values": 1.0, "write": 0.5}, n_edits=7, batch_size=2)
    assert found == {"values": 2 * 2 + 5, "solve": 20, "write": 2.5}
    assert editing_time({"a": 1.0}, {"a": 9.0}, n_edits=1, batch_size=5) == {"a": 1.0}


def test_questions_are_counted_as_the_callback_asks_them() -> None:
    class Counting(EveryNEdits):
        asked = 0

        def measure(self, trainer: Any, pl_module: Any, edits: int) -> dict[str, float]:
            self.asked += edits if edits else trainer.n
            return {}

    rng = random.Random(0)
    for _ in range(200):
        n, batch = rng.randint(1, 40), rng.randint(1, 7)
        every: Any = rng.randint(1, 12) if rng.random() < 0.5 else sorted(rng.sample(range(1, 50), rng.randint(1, 4)))
        start, end = rng.random() < 0.5, rng.random() < 0.5
        callback = Counting(every, start, end)
        module: Any = torch.nn.Linear(1, 1)
        module.edits_applied = 0
        trainer: Any = SimpleNamespace(
            n=n, callback_metrics={}, is_global_zero=True, loggers=[], global_step=0, callbacks=[]
        )
        for done in range(0, n, batch):
            module.edits_applied = done
            callback.on_train_batch_start(trainer, module, None, 0)
        module.edits_applied = n
        callback.on_train_end(trainer, module)
        foreseen = sum(callback.counts(n, batch)) + start * n
        assert foreseen == callback.asked, (n, batch, every, start, end)


@pytest.mark.parametrize(
    ("size", "text"),
    [(12, "12 B"), (999, "999 B"), (1000, "1 kB"), (34_989_120, "35 MB"), (1.6e10, "16 GB"), (3.2e12, "3.2 TB")],
)
def test_sizes_in_words(size: float, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.001, "< 0.01 s"), (0.4, "0.4 s"), (42, "42 s"), (720, "12 min"), (12_240, "3.4 h")]
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_the_data_module_is_read_as_a_run_reads_it(tmp_path: Path) -> None:
    module = data(tmp_path, 3)
    module.setup("fit")
    assert [r.case_id for r in module.requests] == [r.case_id for r in asked(3)]
