"""Errors of configuration in one line."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from lit_edit.commands.messages import one_line, readable
from lit_edit.trust import enforce


class Part:
    def __init__(self, size: int | None = None, kinds: list[str] | None = None) -> None: ...


class Whole:
    def __init__(self, part: Part | None = None, name: str = "") -> None: ...


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"class_path": "Wohle"}, "top: there is no class 'Wohle'"),
        (
            {"class_path": "Whole", "init_args": {"nmae": 3}},
            f"top: {__name__}.Whole has no option 'nmae' (did you mean name?)",
        ),
        (
            {"class_path": "Whole", "init_args": {"part": {"class_path": "Part", "init_args": {"size": "big"}}}},
            "top.part.size: expected int, got 'big'",
        ),
        (
            {"class_path": "Whole", "init_args": {"part": {"class_path": "Part", "init_args": {"sizes": 1}}}},
            f"top.part: {__name__}.Part has no option 'sizes' (did you mean size?)",
        ),
        (
            {"class_path": "Whole", "init_args": {"part": {"class_path": "Part", "init_args": {"kinds": 1}}}},
            "top.part.kinds: expected list, got '1'",
        ),
    ],
)
def test_the_key_and_the_cause(given: dict[str, object], said: str) -> None:
    enforce([__name__])  # an earlier command in this process may have denied all but its own
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--top", type=Whole)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_object({"top": given})
    assert readable(str(caught.value)) == said


def test_other_messages_only_become_one_line() -> None:
    assert readable("Layer 4 does\n  not exist.") == one_line("Layer 4 does not   exist.") == "Layer 4 does not exist."


def test_names_of_classes_and_keys_that_are_nearly_right() -> None:
    said = "Parser key \"a\":\n  Problem with given class_path 'x':\n    Expected a dot import path string: Pobre"
    assert readable(said) == "a: there is no class 'Pobre' (did you mean Probe?)"
    said = readable("Subcommand 'fit' does not accept option 'retention.every' in it.")
    assert said == "Subcommand 'fit' does not accept option 'retention.every' (did you mean every_n?) in it."
    assert readable("unrecognized arguments: --model.dtpe=3").startswith(
        "There is no option --model.dtpe (did you mean "
    )


def test_nothing_is_lost_that_is_not_understood() -> None:
    assert readable('Parser key "a.b":\n  Something new:\n  in two lines') == "a.b: Something new:; in two lines"
    assert readable('Parser key "a": Does not validate against any of the Union subtypes') != "a: "
