"""The answer in what a model says: cases worked out by hand."""

from __future__ import annotations

import pytest

from lit_edit.evaluation.answers import comparable, cut, extracted


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" True", "True"),
        ("True.", "True"),
        (" true, because it says so", "True"),
        ("The statement is False.", "False"),
        ("**False**", "False"),
        ("Falsehoods are everywhere", ""),  # no word of its own
        ("It is untrue", ""),
        ("False, not True", "False"),  # the first one
        ("", ""),
    ],
)
def test_labels(said: str, answer: str) -> None:
    assert extracted(said, "label", ["True", "False"]) == answer


def test_a_label_within_a_longer_one() -> None:
    assert extracted("not entailed", "label", ["entailed", "not entailed"]) == "not entailed"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("16 - 3 - 4 = 9 eggs. 9 * 2 = $18 every day.\n#### 18", "18"),
        ("She makes $18.", "18"),
        ("18.00", "18"),
        ("the total is 1,018.50 dollars", "1018.5"),
        ("12,34", "34"),  # no thousands
        ("from 16-3", "3"),
        ("it falls to -5", "-5"),
        ("-0", "0"),
        ("so .5 of it", "0.5"),
        ("1000000", "1000000"),
        ("about a dozen", ""),
        ("version2", ""),
    ],
)
def test_the_last_number(said: str, answer: str) -> None:
    assert extracted(said, "number") == answer


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" B", "B"),
        ("B. library", "B"),
        ("(C)", "C"),
        ("The answer is D.", "D"),
        ("I think it is A.", "A"),
        ("A bank is it, so (B).", "B"),
        ("E because", "E"),
        ("none", ""),
        ("USA", ""),
    ],
)
def test_letters(said: str, answer: str) -> None:
    assert extracted(said, "letter") == answer


def test_words_and_lines() -> None:
    assert extracted(' "signs," he said', "word") == "signs"
    assert extracted("... — Shane's", "word") == "Shane's"
    assert extracted("?!", "word") == ""
    assert extracted("\n\n  first \nsecond", "line") == "first"
    assert extracted("", "line") == ""


def test_where_a_continuation_ends() -> None:
    assert cut(" yes\nQuestion: no", ["\n"]) == "yes"
    assert cut("\n\nAnswer: yes\nno", ["\n"]) == "yes"
    assert cut("one. Question: two\nQ", ["\n", "Question:"]) == "one."
    assert cut("to the end ", []) == "to the end"


def test_what_accuracy_compares() -> None:
    assert comparable("True.") == comparable(" true ") == comparable('"TRUE"!') == "true"
    assert comparable("New  York") == "new york"
    assert comparable("$5") != comparable("5")
    assert comparable("-5") != comparable("5")
