"""Tasks described as data: the papers' in every form their files have, few-shot prompts, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lit_edit.datamodules.tasks import descriptions, load_abilities

from lit_edit.evaluation.answers import cut, extracted
from lit_edit.evaluation.downstream import Task, TaskFileError

PAPERS = ["rte", "sst2", "nq", "samsum", "gsm8k", "socialiqa", "commonsenseqa", "lambada"]


def one(folder: Path, task: str, file: str, content: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Prompt, accepted answers and choices of the one item in a file."""
    (folder / file).write_text(content, encoding="utf-8")
    (found,) = load_abilities(tasks={task: str(folder / file)})
    assert len(found.prompts) == 1
    return found.prompts[0], found.right[0], found.choices[0] if found.choices else ()


RTE = 'It "rains", they say. entails the It\'s wet.. True or False? answer:'
SIQA = "Tracy ran. Why? A. fear B. joy C. the bus Answer:"
CSQA = "Where is a door? A. bank B. sea C. sky D. fire E. ice Answer:"
WHY = {"context": "Tracy ran.", "question": "Why?"}
MATHS = "Two and 1,000?"


@pytest.mark.parametrize(
    ("task", "file", "content", "prompt", "right", "choices"),
    [
        # GLUE's own file: tabs, quotation marks as they are, labels as words; the hub's: numbers.
        (
            "rte",
            "dev.tsv",
            'index\tsentence1\tsentence2\tlabel\n0\tIt "rains", they say.\tIt\'s wet.\tnot_entailment\n',
            RTE,
            ("False",),
            (),
        ),
        (
            "rte",
            "hub.json",
            json.dumps([{"sentence1": 'It "rains", they say.', "sentence2": "It's wet.", "label": 0, "idx": 0}]),
            RTE,
            ("True",),
            (),
        ),
        (
            "sst2",
            "dev.tsv",
            "sentence\tlabel\na charming journey . \t1\n",
            "For each snippet of text, label the sentiment of the text as positive or negative. The answer should be "
            "exact 'positive' or 'negative'. text: a charming journey . answer:",
            ("positive",),
            (),
        ),
        (
            "nq",
            "oracle.jsonl",
            json.dumps(
                {"question": "who won", "answers": ["Ann", "A. Lee"], "ctxs": [{"text": "Ann won."}, {"text": "x"}]}
            ),
            "Refer to the passage below and answer the following question. Passage: Ann won. Question: who won",
            ("Ann", "A. Lee"),
            (),
        ),
        (
            "nq",
            "hub.json",
            json.dumps([{"context": "Ann won.", "question": "who won", "answers": ["Ann"], "key": "1", "labels": []}]),
            "Refer to the passage below and answer the following question. Passage: Ann won. Question: who won",
            ("Ann",),
            (),
        ),
        (
            "samsum",
            "test.json",
            json.dumps([{"id": "1", "dialogue": "A: Hi\r\nB: Ho", "summary": "A greets B. "}]),
            "A: Hi\nB: Ho TL;DR:",
            ("A greets B.",),
            (),
        ),
        (
            "gsm8k",
            "test.jsonl",
            json.dumps({"question": MATHS, "answer": "2 + 1,000 = <<2+1000=1002>>1,002.\n#### 1,002"}),
            f"Question: {MATHS} Let's think step by step. Answer:",
            ("1002",),
            (),
        ),
        (
            "socialiqa",
            "options.jsonl",
            json.dumps(
                {
                    "context": "Tracy ran.",
                    "question": "Why?",
                    "options": ["fear", "joy", "the bus"],
                    "answer": "the bus",
                }
            ),
            SIQA,
            ("C",),
            ("A", "B", "C"),
        ),
        (
            "socialiqa",
            "hub.json",
            json.dumps([{**WHY, "answerA": "fear", "answerB": "joy", "answerC": "the bus", "label": "2"}]),
            SIQA,
            ("B",),
            ("A", "B", "C"),
        ),
        (
            "commonsenseqa",
            "dev.jsonl",
            json.dumps(
                {
                    "answerKey": "D",
                    "question": {
                        "stem": "Where is a door?",
                        "choices": [
                            {"label": letter, "text": text}
                            for letter, text in zip("ABCDE", ("bank", "sea", "sky", "fire", "ice"), strict=True)
                        ],
                    },
                }
            ),
            CSQA,
            ("D",),
            ("A", "B", "C", "D", "E"),
        ),
        (
            "commonsenseqa",
            "hub.json",
            json.dumps(
                [
                    {
                        "question": "Where is a door?",
                        "choices": {"label": list("ABCDE"), "text": ["bank", "sea", "sky", "fire", "ice"]},
                        "answerKey": "A",
                    }
                ]
            ),
            CSQA,
            ("A",),
            ("A", "B", "C", "D", "E"),
        ),
        (
            "lambada",
            "test.jsonl",
            json.dumps({"text": "I don't care\n\nabout signs"}),
            "Please complete the following sentence: I don't care\n\nabout",
            ("signs",),
            (),
        ),
    ],
)
def test_official_forms(
    tmp_path: Path, task: str, file: str, content: str, prompt: str, right: tuple[str, ...], choices: tuple[str, ...]
) -> None:
    assert one(tmp_path, task, file, content) == (prompt, right, choices)


def test_socialiqa_with_its_file_of_labels(tmp_path: Path) -> None:
    records = [
        {"context": "c", "question": "q", "answerA": "x", "answerB": "y", "answerC": "z"},
        {"context": "d", "question": "r", "answerA": "x", "answerB": "y", "answerC": "z"},
    ]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "dev-labels.lst").write_text("3\n1\n")
    (task,) = load_abilities(tasks={"socialiqa": str(tmp_path / "dev.jsonl")})
    assert task.answers == ["C", "A"]
    (tmp_path / "dev-labels.lst").write_text("3\n")
    with pytest.raises(TaskFileError, match=r"dev-labels.lst has 1 labels for 2 records"):
        load_abilities(tasks={"socialiqa": str(tmp_path / "dev.jsonl")})


def test_names_of_the_hub_are_asked_for_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(*names: str, split: str, **more: Any) -> datasets.Dataset:
        asked.append((*names, split))
        return datasets.Dataset.from_list([{"sentence1": "a", "sentence2": "b", "label": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (task,) = load_abilities(tasks=["rte"])
    assert (task.name, task.answers, asked) == ("rte", ["False"], [("nyu-mll/glue", "rte", "validation")])
    load_abilities(tasks={"rte": "hf:my/rte"})
    assert asked[1:] == [("my/rte", "train")]


def described(folder: Path, **tasks: Any) -> str:
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks, sort_keys=False), encoding="utf-8")
    return str(folder / "tasks.yaml")


OWN = {"data": "own.jsonl", "prompt": "Q: {q} A:", "answer": "a"}


def own_data(folder: Path, n: int = 3) -> None:
    rows = [{"q": f"q{i}", "a": f"a{i}", "why": f"because {i}"} for i in range(n)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows[::-1])).encode()))


def test_ones_own_task_with_examples(tmp_path: Path) -> None:
    own_data(tmp_path)
    shots = {"base": "own", "shots": 2, "examples": "train.jsonl.gz", "shown": "why"}
    path = described(tmp_path, few=shots, own=OWN)
    few, plain = load_abilities(path, n_items=1)
    assert (plain.name, plain.prompts, plain.answers) == ("own", ["Q: q0 A:"], ["a0"])
    assert few.prompts == ["Q: q2 A: because 2\n\nQ: q1 A: because 1\n\nQ: q0 A:"]
    assert few.answers == ["a0"]
    assert [task.name for task in load_abilities(path, ["few"])] == ["few"]


def test_tasks_of_the_papers_can_be_built_on(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nbad .\t0\n")
    path = described(tmp_path, mine={"base": "sst2", "data": "dev.tsv", "prompt": "{sentence} This was"})
    (task,) = load_abilities(path)
    assert (task.prompts, task.answers, task.how.extract) == (["bad . This was"], ["negative"], "label")
    same_name = {"base": "sst2", "data": "dev.tsv", "labels": {"0": "bad", "1": "good"}}
    assert load_abilities(described(tmp_path, sst2=same_name))[0].answers == ["bad"]
    for circle in ({"a": {"base": "a"}}, {"a": {"base": "b"}, "b": {"base": "a"}}):
        with pytest.raises(TaskFileError, match="there is no task 'a' to build on"):
            load_abilities(described(tmp_path, **circle))


def test_tasks_of_a_file_and_of_the_papers_together(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nbad .\t0\n")
    (first,) = load_abilities(tasks=["qa"], n_items=1)
    assert first.name == "qa"
    with pytest.raises(TaskFileError, match=r"has no task 'nli'; it has .*qa.*Described are rte, sst2"):
        load_abilities(tasks=["nli"])
    with pytest.raises(TaskFileError, match=r"task 'sst2': .*none\.tsv: there is no such file"):
        load_abilities(tasks={"sst2": str(tmp_path / "none.tsv")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "x"}, r"task 'own': there is no setting 'promt'; there are base, about, answer"),
        ({"answer": None}, r"task 'own': 'answer' is missing"),
        ({"metric": "best"}, r"task 'own': metric is 'best'; it can be identical, accuracy"),
        ({"answer": "a | shout"}, r"there is no function 'shout'; there are first_line"),
        ({"choose": "sum"}, r"`choose` needs `choices`"),
        ({"shots": 2}, r"`shots` is a number of examples, and needs `examples`"),
        ({"shots": 9, "examples": "own.jsonl"}, r"own\.jsonl has 3 records for 9 shots"),
        ({"base": "other"}, r"there is no task 'other' to build on"),
        ({"prompt": "{question}"}, r"own\.jsonl, line 1: the prompt needs a text 'question'; there are q, a, why"),
        ({"answer": "gold"}, r"own\.jsonl, line 1: there is no gold; the record has q, a, why"),
        ({"labels": {"x": "y"}}, r"own\.jsonl, line 1: the answer 'a0' is none of x"),
        ({"choose": "sum", "choices": ["options"]}, r"own\.jsonl, line 1: there are no choices"),
        ({"choose": "sum", "choices": [["q", "why"]]}, r"line 1: the answer 'a0' is none of the choices q0, because 0"),
        ({"choose": "sum", "choices": [["q", "a"]], "score": "both"}, r"score is 'both'; it can be letters or texts"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    own_data(tmp_path)
    with pytest.raises(TaskFileError, match=message):
        load_abilities(described(tmp_path, own={**OWN, **changes}))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(TaskFileError, match="tasks by name are needed"):
        load_abilities(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(TaskFileError, match="cannot be read"):
        load_abilities(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("a: 1")
    with pytest.raises(TaskFileError, match="task 'a': a mapping is needed"):
        load_abilities(str(tmp_path / "a.yaml"))
    with pytest.raises(TaskFileError, match=r"nowhere\.yaml"):
        load_abilities("nowhere.yaml")
    (tmp_path / "own.jsonl").write_text('{"q": "x", "a": "y"}\n7\n')
    with pytest.raises(TaskFileError, match=r"own\.jsonl, line 2: is a number"):
        load_abilities(described(tmp_path, own=OWN))


REAL = {
    "rte": ("rte_dev.tsv", 277),
    "sst2": ("sst2_dev.tsv", 872),
    "nq": ("nq-open-oracle.jsonl.gz", 2655),
    "samsum": ("samsum-test.json", 818),
    "gsm8k": ("gsm8k_test.jsonl", 1319),
    "socialiqa": ("socialiqa_dev.jsonl", 1954),
    "commonsenseqa": ("commonsenseqa_dev.jsonl", 1221),
    "lambada": ("lambada_test.jsonl", 5153),
}
SAID = {
    "rte": " {}. The second sentence says so.",
    "sst2": " It is {}!",
    "nq": "\nAnswer: the {}.",
    "samsum": " {}",
    "gsm8k": " First there are 3 of 7.\nThen there are {}.00 left.\n\nQuestion: how many are 5?",
    "lambada": ' "{}," he said',
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_model_that_is_right_in_its_own_words_scores_one(real_file: Callable[[str], Path], name: str) -> None:
    file, count = REAL[name]
    (task,) = load_abilities(tasks={name: str(real_file(f"tasks/{file}"))})
    assert len(task.prompts) == count
    assert task.chance < 0.54  # no task is won by one answer to all questions
    if name in SAID:
        given = [
            extracted(cut(SAID[name].format(a), task.how.stop), task.how.extract, task.how.labels) for a in task.answers
        ]
    else:
        given = task.answers
        assert all(right[0] in options for right, options in zip(task.right, task.choices, strict=True))
    if name == "samsum":  # a few summaries go over several lines, of which the first is an answer
        task = Task(name, task.prompts[:50], task.answers[:50], task.judging)
        given = given[:50]
    assert task.score(given) > 0.999


def test_the_papers_tasks() -> None:
    assert sorted(descriptions()) == sorted(PAPERS)
    assert all(found.about for found in descriptions().values())
