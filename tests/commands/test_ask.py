"""`train.py ask`: what is asked, of whom, and what is said of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model
from helpers.runs import taught
from transformers import AutoModelForCausalLM

from lit_edit.cli import main
from lit_edit.commands.ask import answer
from lit_edit.evaluation.evaluate import Reference, evaluate, figures
from lit_edit.model.loading import load_model
from lit_edit.model.prompts import Prompter
from lit_edit.requests import EditRequest

Said = pytest.CaptureFixture[str]
FACTS = [
    {"case_id": "known", "prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"},
    {"case_id": "not", "prompt": "The capital of {} is", "subject": "Peru", "target_new": "Oslo"},
    {"case_id": "[b]", "prompt": "{} was born in", "subject": "Maria", "target_new": "Oslo"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model, and the same after it has learnt some sentences: the edited one."""
    root = tmp_path_factory.mktemp("ask")
    for part in tiny_model("qwen2"):
        part.save_pretrained(root / "original")
    for part in taught(root / "original"):
        part.save_pretrained(root / "edited")
    return root / "original", root / "edited"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def cells(said: str) -> list[list[str]]:
    """The rows of the printed tables."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in said.splitlines() if line.startswith("│")]


def test_both_models_are_asked_the_same(folders: tuple[Path, Path], capsys: Said) -> None:
    original, edited = folders
    prompts = ["The capital of France is", "The river of Peru runs"]
    given = ["ask", *prompts, "--model", str(edited), "--original", str(original), "--max_new_tokens", "6"]
    assert main(given) == 0
    rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == prompts
    for column, folder in ((1, original), (2, edited)):  # an independent reference: the model's own search
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_model(str(folder))[1]
        for row in rows:
            ids = tokenizer(row[0], return_tensors="pt")
            found = model.generate(**ids, do_sample=False, num_beams=1, max_new_tokens=6)[0]
            found = found[ids["input_ids"].shape[1] :]
            text = tokenizer.decode(found, skip_special_tokens=True).strip()
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
            assert row[column] == text
    assert rows[0][2].startswith("Lyon")
    assert rows[0][1] != rows[0][2]


def test_facts_are_judged_as_a_run_judges_them(folders: tuple[Path, Path], tmp_path: Path, capsys: Said) -> None:
    original, edited = folders
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(FACTS), encoding="utf-8")
    assert main(["ask", "--model", str(edited), "--original", str(original), "--facts", str(file)]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 facts hold; 0 held before the edits" in said
    rows = cells(said)[1:] if cells(said)[0][0] == "case" else cells(said)
    assert [(row[0], row[2], row[5]) for row in rows] == [
        ("known", "Lyon", "yes"), ("not", "Oslo", "no"), ("[b]", "Oslo", "yes"),
    ]  # fmt: skip
    assert rows[0][4].startswith("Lyon")
    assert rows[1][4].startswith("Lim")

    model, tokenizer = load_model(str(edited))
    prompter = Prompter.of(model, tokenizer)
    requests = [
        EditRequest(f["case_id"], f["prompt"].format(f["subject"]), f["subject"], f["target_new"]) for f in FACTS
    ]
    found = answer(model, prompter, [], requests, 1)
    judged = evaluate(model, prompter, requests, Reference())
    assert found.holds == [outcome.own.exact for outcome in judged]
    assert sum(found.holds) / len(requests) == pytest.approx(figures(judged)["reliability"])


def test_prompts_come_from_standard_input(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Maria was born in\n\n"))
    assert main(["ask", "--model", str(folders[1]), "--original", str(folders[0])]) == 0
    ((prompt, _, after),) = cells(capsys.readouterr().out)
    assert prompt == "Maria was born in"
    assert after.startswith("Oslo.")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_prompts_are_asked_for(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(f"Maria was born in\n\nhelp\n{'so ' * 500}\nMaria was born in\n"))
    assert main(["ask", "--model", str(folders[1]), "--original", str(folders[0])]) == 0
    said = capsys.readouterr().out
    assert said.count("Ctrl-D") == 2  # at the beginning, and when asked for
    assert said.count("ask> ") == 6
    assert said.count("  before  ") == said.count("  after   Oslo.") == 2
    assert "tokens" in said  # of the prompt that is too long, which does not end it
    monkeypatch.setattr("sys.stdin", Terminal("quit\nMaria was born in\n"))
    assert main(["ask", "--model", str(folders[1]), "--original", str(folders[0])]) == 0
    assert "before" not in capsys.readouterr().out.replace("what was asked before", "")


def test_answers_as_json(folders: tuple[Path, Path], tmp_path: Path, capsys: Said) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(FACTS), encoding="utf-8")
    given = ["ask", "Maria was born in", "--model", str(folders[1]), "--original", str(folders[0])]
    assert main([*given, "--facts", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (prompt,) = said["prompts"]
    assert prompt["after"].startswith("Oslo.")
    assert [(f["case_id"], f["target_new"], f["held_before"], f["holds"]) for f in said["facts"]] == [
        ("known", "Lyon", False, True), ("not", "Oslo", False, False), ("[b]", "Oslo", False, True),
    ]  # fmt: skip


def test_an_answer_stays_within_the_model_s_length(folders: tuple[Path, Path]) -> None:
    model, tokenizer = load_model(str(folders[0]))
    prompter = Prompter(tokenizer, 12)
    prompt = "The capital of France"
    room = 12 - len(prompter.row(prompt).ids)
    assert room > 0
    (said,) = answer(model, prompter, [prompt], [], 50).prompts
    (longer,) = answer(model, Prompter(tokenizer, 128), [prompt], [], room).prompts
    assert said == longer


def test_facts_that_cannot_be_edited_are_left_out_if_asked_to(
    folders: tuple[Path, Path], tmp_path: Path, capsys: Said
) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([*FACTS, FACTS[0] | {"target_new": ""}]), encoding="utf-8")
    given = ["ask", "--model", str(folders[1]), "--original", str(folders[0]), "--facts", str(file)]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "record 4, field 'target_new': is empty. (--on_bad_record=skip leaves such records out" in said
    with pytest.warns(UserWarning, match="1 of 4 records cannot be edited and are left out"):
        assert main([*given, "--on_bad_record=skip"]) == 0
    assert "2 of 3 facts hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["hello"], "ask: which model?"),
        (["hello", "--run", "x", "--model", "y"], "ask: which model?"),
        (["hello", "--model", "embedded", "--max_new_tokens", "0"], "ask: --max_new_tokens is 0"),
        (["hello", "--model", "/nowhere/at/all"], "/nowhere/at/all: no model there"),
        (["hello", "--run", "/nowhere/at/all"], "/nowhere/at/all is no folder of a run"),
        (["--model", "embedded", "--facts", "/nowhere/facts.csv"], "/nowhere/facts.csv: there is no such file"),
        (["hello", "--model", "embedded", "--device", "abacus"], "ask: there is no device 'abacus' here"),
        (["--model", "embedded"], "ask: nothing is asked"),
    ],
)
def test_refusals_are_one_line(given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["ask", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_help_and_place_of_the_commands(capsys: Said) -> None:
    for command in ("ask", "export"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert "--run" in capsys.readouterr().out
        assert main(["--config", "mose.yaml", command]) == 2
        assert command in capsys.readouterr().err
    assert torch.is_grad_enabled()
