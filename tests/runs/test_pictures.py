"""Pictures as files: what is written is read, drawn the same every time, and what is none is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.reports import write_run

from lit_edit.runs.pictures import Picture, draw, read_pictures, write_picture
from lit_edit.runs.report.gather import read_run

LINES = Picture("a/b c", "Title", "Note.", "lines", {"one": [[0.0, 1.23456], [1.0, math.nan]]}, scale="log")
CELLS = Picture("cells", "Title", "", "heatmap", matrix=[[None, 0.5], [0.5, None]], labels=["1", "2"])


def test_a_picture_is_read_as_it_was_written(tmp_path: Path) -> None:
    for picture in (LINES, CELLS):
        write_picture(tmp_path, picture)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{stem}.{ending}" for stem in ("a-b-c", "cells") for ending in ("json", "png", "svg")
    )
    (lines, cells), wrong = read_pictures(tmp_path)
    assert (cells, wrong) == (CELLS, [])
    assert lines.series == {"one": [[0, 1.235], [1, None]]}
    assert lines.scale == "log"


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    for place in ("one", "other"):
        write_picture(tmp_path / place, CELLS)
    for ending in ("json", "png", "svg"):
        one, other = ((tmp_path / place / f"cells.{ending}").read_bytes() for place in ("one", "other"))
        assert one == other


def test_what_is_drawn() -> None:
    (axis,) = draw(LINES).axes
    assert (axis.get_title(), axis.get_yscale()) == ("Title", "log")
    assert axis.lines[0].get_xydata().tolist()[0] == [0, 1.23456]
    dots = Picture("s", "S", "", "scatter", {"one": [[1.0, 2.0], [None, 1.0]], "other": [[3.0, 4.0]]})
    (axis,) = draw(dots).axes
    assert [found.get_offsets().tolist() for found in axis.collections] == [[[1, 2]], [[3, 4]]]
    axis = draw(CELLS).axes[0]
    assert axis.images[0].get_array().filled(-1).tolist() == [[-1, 0.5], [0.5, -1]]


@pytest.mark.parametrize(
    "changes",
    [{"kind": "pie"}, {"matrix": [[1.0]], "labels": []}, {"matrix": [[1.0, 2.0]], "labels": ["1"]}, {"scale": "cubic"}],
)
def test_a_picture_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"picture|matrix"):
        Picture(**{"name": "n", "title": "t", "note": "", "kind": "heatmap", **changes})


def test_the_report_names_files_that_are_no_picture(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", edits=2, every=2)
    good = {"name": "n", "title": "t", "note": "", "kind": "lines"}
    bad = ["{", "[]", json.dumps(good | {"more": 1}), json.dumps(good | {"series": {"a": [["x", 1]]}})]
    bad += [json.dumps(good | {"series": {"a": [1]}}), json.dumps(good | {"series": [1]})]
    (folder / "pictures").mkdir()
    for number, text in enumerate(bad):
        (folder / "pictures" / f"{number}.json").write_text(text)
    write_picture(folder / "pictures", CELLS)
    run = read_run(folder)
    assert run.pictures == [CELLS]
    assert [line.split(" ")[0] for line in run.missing] == [f"pictures/{number}.json" for number in range(len(bad))]
