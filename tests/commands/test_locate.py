"""Where a model can be edited: the search by hand-made trials, and the command on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import tiny_model
from helpers.runs import asked, command_line, facts, write_corpus
from lit_edit.configs.find import read_config

from lit_edit import load_editor
from lit_edit.cli import _Unstarted, main
from lit_edit.commands.locate import command
from lit_edit.commands.locate import search as searching
from lit_edit.commands.locate.search import (
    Bench,
    Clock,
    Found,
    Setting,
    around,
    candidates,
    editor_of,
    finalists,
    search,
    strength_of,
    winner,
    with_locality,
)
from lit_edit.commands.suitable import check_strangers
from lit_edit.editors.layers import FixedLayers
from lit_edit.model.workspace import Workspace
from lit_edit.program import program

Folder = Callable[[str], Path]


def found(method: str, layers: Sequence[int], *figures: float, n: int = 8, p: float = 0.5) -> Found:
    values = dict(zip(("reliability", "generalization", "locality"), figures, strict=False))
    return Found(Setting(method, tuple(layers)), n, values, p, 1.0)


def test_scores_by_hand() -> None:
    assert found("rome", [3], 1.0, 0.5, 1.0).score == pytest.approx(3 / 4)
    assert found("rome", [3], 1.0, 0.0, 1.0).score == 0
    assert found("rome", [3], 0.5, 1.0).score == pytest.approx(2 / 3)  # without rephrasings
    assert found("rome", [3], 0.5, 0.5, 0.5).editable
    assert not found("rome", [3], 1.0, 0.49, 1.0).editable
    good, lucky = found("rome", [3], 0.9, 0.9, 0.9, n=16), found("rome", [4], 1.0, 1.0, 1.0, n=2)
    assert winner([good, lucky]) == good  # two facts say less than sixteen
    trials = [lucky, found("memit", [2], 0.8, 0.8, 0.8), good, found("memit", [1], 0.9, 0.8, 0.8)]
    assert finalists(trials) == [Setting("rome", (3,)), Setting("memit", (1,))]
    assert str(Setting("memit", (2, 3, 4), 30.0)) == "memit, layers 2-4, λ 30"


def test_layers_to_try() -> None:
    assert candidates(8, 3) == [3, 2, 4, 1, 5, 0, 6]  # not the last one
    assert candidates(1, 0) == [0]
    many = candidates(48, 20)
    assert len(many) <= 16
    assert set(range(17, 24)) <= set(many)
    assert min(many) < 5
    assert max(many) > 40
    assert [around(center, 3, 8) for center in (0, 3, 6)] == [(0, 1, 2), (2, 3, 4), (4, 5, 6)]
    assert around(1, 6, 4) == (0, 1, 2)  # there are no six


def test_facts_without_locality_probes_get_other_facts_prompts() -> None:
    plain = asked(3)
    assert with_locality(plain) == plain  # they have their own
    bare = [type(r)(r.case_id, r.prompt, r.subject, r.target_new, "old") for r in plain]
    probes = with_locality(bare)[0].probes_of("locality")
    assert [probe.prompt for probe in probes] == [bare[1].prompt, bare[2].prompt]
    assert [probe.target for probe in probes] == ["old", "old"]


class Pretended(Bench):
    """Trials that cost a second a fact, and succeed by layer; time passes by them alone."""

    def __init__(self, clock: Clock, n_layers: int = 8) -> None:
        self.editors = {name: editor_of(name) for name in ("rome", "memit")}
        self._per_fact: dict[str, float] = {}
        self.clock, self.made = clock, []  # type: ignore[var-annotated]
        self.workspace: Any = type("Model", (), {"architecture": range(n_layers)})

    def measure(self, setting: Setting, requests: Sequence[Any], held_out: bool = False) -> Found:
        self.made.append(setting)
        self.clock.began -= len(requests)
        self._per_fact[setting.method] = 1.0
        good = 0.9 if 3 in setting.layers else 0.3
        if setting.method == "memit":
            good += 0.02 * len(setting.layers) + (0.03 if setting.strength == 3.0 else 0)
        return Found(setting, len(requests), dict.fromkeys(("reliability", "locality"), good), good, 1.0, held_out)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching.time, "monotonic", lambda: 1000.0)


@pytest.mark.usefixtures("still")
def test_with_time_enough_everything_is_tried_and_the_best_is_found() -> None:
    clock, skipped = Clock(1e6), []  # type: ignore[var-annotated]
    bench = Pretended(clock)
    tried = list(search(bench, [3, 2, 4, 1, 5, 0, 6], list(range(16)), clock, skipped))  # type: ignore[arg-type]
    assert skipped == []
    assert finalists(tried)[0] == Setting("memit", (1, 2, 3, 4, 5, 6), 3.0)  # 30 / 10
    assert {s.layers for s in bench.made if s.method == "rome"} >= {(i,) for i in range(7)} | {(2, 3, 4)}
    assert all(s.strength is None for s in bench.made if s.method == "rome")


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("budget", [30.0, 60.0, 120.0, 300.0])
def test_the_budget_is_kept_and_what_it_leaves_out_is_named(budget: float) -> None:
    clock, skipped = Clock(budget), []  # type: ignore[var-annotated]
    bench = Pretended(clock)
    tried = list(search(bench, [3, 2, 4, 1, 5, 0, 6], list(range(16)), clock, skipped))  # type: ignore[arg-type]
    assert clock.spent <= budget
    assert clock.spent > 0.3 * budget
    assert skipped or budget >= 60
    assert len(tried) == len({(one.setting, one.facts) for one in tried})
    assert 3 in finalists(tried)[0].layers
    assert not set(skipped) & {one.setting for one in tried if one.facts > 2}


def test_clock_does_not_count_what_it_is_stopped_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(searching.time, "monotonic", lambda: now[0])
    clock = Clock(10)
    now[0] = 4
    with clock.stopped():
        now[0] = 1004
    assert clock.spent == 4
    assert clock.allows(6)
    assert not clock.allows(2, share=0.5)


def test_methods_that_cannot_be_searched_are_refused() -> None:
    with pytest.raises(ValueError, match="locate searches layers of methods with keys, values and a solver"):
        editor_of("ft-l")
    assert strength_of(editor_of("rome")) is None
    assert strength_of(editor_of("memit")) == ("preservation", 30.0)
    assert strength_of(editor_of("mose-key")) is not None


def test_a_trial_is_a_mean_of_single_edits_and_leaves_the_model_as_it_was() -> None:
    model, tokenizer = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    workspace = Workspace.of(model, tokenizer)
    bench = Bench(workspace, ["memit"])
    editor = bench.editors["memit"]
    editor.values.steps = 2
    for layer in (1, 2):
        site = workspace.site(layer)
        site.covariance = torch.eye(site.shape[1], dtype=torch.float64)
    made = bench.measure(Setting("memit", (1, 2), 0.5), asked(3))
    assert (editor.solver.preservation, editor.layers.layers) == (30.0, (2, 3, 4))  # type: ignore[attr-defined]
    editor.layers, editor.solver.preservation = FixedLayers([1, 2]), 0.5  # type: ignore[attr-defined]
    outcomes = [outcome for _, outcome in editor.single_edits(workspace, asked(3))]
    assert made.figures["reliability"] == sum(o.own.exact for o in outcomes) / 3
    assert made.facts == 3
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


# The command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, **more: Any) -> str:
    (folder / "mine.json").write_text(json.dumps([{**record, **more} for record in facts(6)]))
    return str(folder / "mine.json")


def test_on_a_random_model_nothing_can_be_edited(
    tiny_folder: Folder, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_folder("gpt2"))
    assert main(["locate", "--model", model, "--facts", written(here, target_true="Nowhere")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing can be edited here: of 6 facts the model answers 0 as recorded." in said
    (folder,) = (here / "locate").iterdir()
    assert json.loads((folder / "locate.json").read_text())["best"] is None
    assert not list(folder.glob("*.yaml"))


def test_what_it_leaves_is_a_configuration_that_fit_takes(
    tiny_folder: Folder, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On facts whose old answers are not on record, with few steps, and a floor that anything reaches."""

    def quick(method: str) -> Any:
        editor: Any = load_editor(method)
        editor.values.steps, editor._contexts = 2, (1, 2)
        return editor

    monkeypatch.setattr(searching, "FLOOR", 0.0)
    monkeypatch.setattr(searching, "load_editor", quick)
    monkeypatch.setattr(command, "_TRACED", 2)
    model, corpus = str(tiny_folder("llama")), str(write_corpus(here))
    options = ["--facts", written(here), "--corpus", corpus, "--methods", "memit", "--sample", "2"]
    assert main(["locate", "--model", model, *options, "--budget", "6000", "--out", "found"]) == 0
    said = capsys.readouterr().out
    assert "6 facts without `target_true`" in said
    assert "Edit it: " in said
    result = json.loads(Path("found/locate.json").read_text())
    assert result["tracing"]["facts"] >= 1
    assert {tuple(one["layers"]) for one in result["tried"]} >= {(0,), (1,), (2,), (0, 1, 2)}
    assert any(one["lambda"] is not None for one in result["tried"])
    assert result["judged"][0]["held_out"]
    assert Path("found/locate.png").stat().st_size > 1000
    assert Path("found/locate.md").read_text().count("\n| memit |") == len(result["tried"]) + len(result["judged"])

    config = yaml.safe_load(Path("found/memit.yaml").read_text())
    best = result["best"]
    assert config["model"]["editor"]["init_args"]["layers"]["init_args"]["layers"] == best["layers"]
    made = _Unstarted(["fit", "--config", "found/memit.yaml", "--trainer.logger=false"])
    assert list(made.model.editor.layers.layers) == best["layers"]
    assert made.model.editor.solver.preservation == (best["lambda"] or 30.0)
    assert made.model.model_name == model
    assert "layers" not in check_strangers(made.config["fit"].as_dict(), ["--config", "found/memit.yaml"])
    made.datamodule.setup("fit")
    assert len(made.datamodule.requests) == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--budget", "0"], "--budget should be positive"),
        (["--sample", "1"], "--sample at least 2"),
        (["--layers", "9"], "Layer 9 does not exist: the model has layers 0 to 3"),
        (["--methods", "romme"], "There is no configuration 'romme'"),
        (["--family", "[1]"], "argument --family: is not of the form"),
        (["--facts", "nowhere.json"], "nowhere.json: there is no such file"),
    ],
)
def test_what_is_refused(
    tiny_folder: Folder, here: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert main(["locate", "--model", str(tiny_folder("gpt2")), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (here / "locate").exists()


# What `fit` says of layers that nobody has named


def test_fit_says_to_run_locate(tiny_folder: Folder, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder("llama")
    editor = read_config("rome")["model"]["editor"]
    config = {"model": {"model": str(model), "editor": editor}, "data": {"init_args": {"path": "facts.json"}}}
    said = check_strangers(config, ["--config", "rome.yaml"])
    assert said.endswith(f" Layers of its own are found by: {program()} locate --model {model}")
    assert "locate" not in check_strangers(config, ["--config", "rome.yaml", "--model.editor.layers.layers=[1]"])
    memit = [word for word in command_line(model, here, "memit") if not word.startswith("--model.editor.layers")]
    assert main([*memit, "--dry_run"]) == 2
    assert "Layer 4 does not exist: the model has layers 0 to 3." in (error := capsys.readouterr().err)
    assert "locate --model MODEL` finds where a model can be edited." in error


@pytest.mark.slow
def test_it_agrees_with_the_card_of_the_embedded_model(here: Path) -> None:
    """The layers it writes into are among those where the card's single edits fare best, and tracing finds the same."""
    from lit_edit.model.loading import embedded_path

    card = json.loads((embedded_path("model", "scores.json")).read_text(encoding="utf-8"))["single_edits"]
    rows = {key.split(" | ")[1]: row for key, row in card.items() if key.startswith("ROME")}
    single = {
        int(layers): row["reliability"] + row["generalization"] for layers, row in rows.items() if layers.isdigit()
    }
    assert single
    assert main(["locate", "--methods", "rome", "--sample", "8", "--budget", "240"]) == 0
    result = json.loads(Path("locate/embedded/locate.json").read_text())
    good = {layer for layer, score in single.items() if score >= 0.75 * max(single.values())}
    assert set(result["best"]["layers"]) & good
    mine = {one["layers"][0]: one for one in result["tried"] if len(one["layers"]) == 1}
    bad = {layer for layer, score in single.items() if score <= 0.25 * max(single.values())}
    assert all(mine[layer]["generalization"] < result["best"]["generalization"] for layer in bad & mine.keys())
    effects = result["tracing"]["effects"]["MLP output"]["last subject token"]
    assert abs(effects.index(max(effects)) - max(single, key=single.__getitem__)) <= 1
