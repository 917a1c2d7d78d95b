from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.records import concept, counterfact, fact, flat, mend
from lit_edit.datamodules import (
    ConceptEditDataModule,
    CounterFactDataModule,
    EditDataModule,
    EditLoader,
    FactsDataModule,
    ZsREDataModule,
)

from lit_edit.requests import RequestError


def ids(data: EditDataModule) -> list[str]:
    data.setup("fit")
    return [request.case_id for request in data.requests]


def test_batches_are_in_order_and_the_last_may_be_short(facts_file: Callable[[int], str]) -> None:
    data = FactsDataModule(facts_file(7), batch_size=3)
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader, EditLoader)
    assert len(loader) == 3
    for _ in range(2):
        assert [list(batch) for batch in loader] == [data.requests[:3], data.requests[3:6], data.requests[6:]]
    assert [request.case_id for request in data.requests] == list("1234567")
    assert next(iter(loader)) == data.requests[:3]


def test_setup_twice_reads_once(facts_file: Callable[[int], str]) -> None:
    path = facts_file(2)
    data = FactsDataModule(path)
    data.setup("fit")
    Path(path).unlink()
    first = data.requests
    data.setup("fit")
    assert data.requests is first


def test_offset_count_and_seed(facts_file: Callable[[int], str]) -> None:
    path = facts_file(10)
    assert ids(FactsDataModule(path, n_edits=3, offset=4)) == ["5", "6", "7"]
    assert ids(FactsDataModule(path, n_edits=None, offset=8)) == ["9", "10"]
    shuffled = ids(FactsDataModule(path, seed=1))
    assert shuffled != ids(FactsDataModule(path))
    assert shuffled == ids(FactsDataModule(path, seed=1))
    assert shuffled != ids(FactsDataModule(path, seed=2))
    assert sorted(shuffled, key=int) == ids(FactsDataModule(path))
    # The shuffle comes first: two parts of one shuffle are disjoint.
    assert ids(FactsDataModule(path, seed=1, n_edits=4, offset=5)) == shuffled[5:9]


def test_headers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    head = "Case ID;Prompt;Subject;Target New;Rephrase-Prompt"
    path.write_text(f"{head}\n7;The capital of {{}} is;Peru;Oslo;Peru has | In Peru, \n", encoding="utf-8")
    data = FactsDataModule(str(path))
    assert ids(data) == ["7"]
    (request,) = data.requests
    assert (request.subject, request.target_new, data.unused) == ("Peru", "Oslo", [])
    assert [probe.prompt for probe in request.probes] == ["Peru has", "In Peru,"]


def test_a_column_is_not_taken_twice(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("prompt,Prompt,subject,target_new\n{} is,no,Peru,Oslo\n", encoding="utf-8")
    data = FactsDataModule(str(path))
    with pytest.warns(UserWarning, match=r"columns not used: Prompt\."):
        data.setup("fit")
    assert data.requests[0].prompt == "Peru is"


def test_the_embedded_file_has_a_name() -> None:
    assert ids(CounterFactDataModule("embedded", n_edits=3)) == ids(CounterFactDataModule(n_edits=3))
    with pytest.raises(ValueError, match="FactsDataModule needs a path"):
        FactsDataModule("embedded")


def test_records_for_choosing_settings_stay_behind_the_others(write_json: Callable[..., str]) -> None:
    """Else a table over shuffled records would judge settings by records they were chosen on."""
    splits = ["choose", "report", "choose", "report", "report", "report"]
    records = [{**fact(n), "split": split} for n, split in enumerate(splits, start=1)]
    path = write_json(records)
    shuffled = [ids(EditDataModule(path, n_edits=None, seed=seed)) for seed in range(6)]
    assert {tuple(sorted(order[:4])) for order in shuffled} == {("2", "4", "5", "6")}
    assert len({tuple(order) for order in shuffled}) > 1
    assert ids(EditDataModule(path, n_edits=None)) == list("123456")


def test_default_number_of_edits(facts_file: Callable[[int], str]) -> None:
    path = facts_file(120)
    assert len(ids(EditDataModule(path))) == 100
    assert len(ids(FactsDataModule(path))) == 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_edits": 0}, "n_edits is 0; it must be at least 1, or null for all."),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1."),
        ({"offset": -1}, "offset is -1; it must not be negative."),
        ({"on_bad_record": "ignore"}, "on_bad_record is 'ignore'; it must be 'raise' or 'skip'."),
    ],
)
def test_arguments_out_of_range(facts_file: Callable[[int], str], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        FactsDataModule(facts_file(2), **arguments)
    assert str(caught.value) == message


def test_a_path_is_needed() -> None:
    with pytest.raises(ValueError, match="FactsDataModule needs a path: the file of facts to edit"):
        FactsDataModule()
    with pytest.raises(ValueError, match="EditDataModule needs a path"):
        EditDataModule()
    with pytest.raises(ValueError, match="module is 'outer'; it must be 'intra' or 'inter'"):
        ConceptEditDataModule("outer")  # type: ignore[arg-type]


def test_more_edits_than_records(facts_file: Callable[[int], str]) -> None:
    path = facts_file(5)
    with pytest.raises(ValueError, match="asked for") as caught:
        FactsDataModule(path, n_edits=4, offset=2).setup("fit")
    assert str(caught.value) == (
        f"n_edits=4 edits are asked for, but {path} has 3 usable records after offset 2; n_edits: null takes all there "
        "are."
    )
    with pytest.raises(ValueError, match="asked for") as caught:
        FactsDataModule(path, offset=5).setup("fit")
    assert str(caught.value) == f"all edits are asked for, but {path} has 0 usable records after offset 5."


def test_a_bad_record_stops_or_is_reported(write_json: Callable[..., str]) -> None:
    records = [fact(1), fact(2, target_new=""), fact(3), fact(4, subject="X"), *(fact(n, subject=None) for n in "567")]
    hint = " (--data.on_bad_record=skip leaves such records out and lists them.)"
    with pytest.raises(RequestError) as caught:
        FactsDataModule(write_json(records[:3])).setup("fit")
    assert str(caught.value) == f"facts.json, record 2, field 'target_new': is empty.{hint}"
    path = write_json(records)
    with pytest.raises(RequestError) as caught:
        FactsDataModule(path).setup("fit")
    all_in_one = str(caught.value)
    data = FactsDataModule(path, on_bad_record="skip")
    with pytest.warns(UserWarning, match="cannot be edited") as warned:
        data.setup("fit")
    assert [request.case_id for request in data.requests] == ["1", "3"]
    refused = [
        "facts.json, record 2, field 'target_new': is empty.",
        "facts.json, record 4, field 'subject': 'X' does not occur in 'prompt', 'The capital of Land4 is'.",
        *(f"facts.json, record {number}, field 'subject': is empty." for number in (5, 6, 7)),
    ]
    assert data.refused == refused
    assert all_in_one == f"5 of 7 records cannot be edited: {' '.join(refused)}{hint}"
    assert [str(warning.message) for warning in warned] == [
        "5 of 7 records cannot be edited and are left out: " + " ".join(refused[:3]) + "; 2 more are in `refused`"
    ]
    with (
        pytest.warns(UserWarning, match="cannot be edited"),
        pytest.raises(ValueError, match=r"2 usable records \(5 records were left out\); n_edits: null"),
    ):
        FactsDataModule(path, n_edits=3, on_bad_record="skip").setup("fit")


def test_ten_bad_records_are_named_and_the_rest_is_counted(write_json: Callable[..., str]) -> None:
    with pytest.raises(RequestError) as caught:
        FactsDataModule(write_json([fact(n, subject=None) for n in range(13)])).setup("fit")
    said = str(caught.value)
    assert said.startswith("13 of 13 records cannot be edited: facts.json, record 1, field 'subject': is empty. facts")
    assert said.count("field 'subject'") == 10
    assert "record 10, field 'subject': is empty. And 3 more. (--data.on_bad_record=skip" in said


def test_columns_that_nothing_reads_are_said_with_the_one_that_may_be_meant(write_json: Callable[..., str]) -> None:
    path = write_json([fact(1, Rephrase_Prompts="x"), fact(2, note="mine", locality_promt="y", subject_id=3)])
    data = FactsDataModule(path)
    with pytest.warns(UserWarning, match="columns not used") as warned:
        data.setup("fit")
    (said,) = [str(warning.message) for warning in warned]
    assert said == (
        f"{path}: columns not used: Rephrase_Prompts (did you mean rephrase_prompt?), note, "
        "locality_promt (did you mean locality_prompt?), subject_id."
    )
    assert data.unused == ["Rephrase_Prompts", "note", "locality_promt", "subject_id"]
    published = CounterFactDataModule(write_json([counterfact()]), n_edits=1)
    published.setup("fit")  # its further fields are no mistake, and there are many
    assert published.unused == []


def test_a_broken_line_is_skipped_and_a_broken_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(fact(1)) + "\n{")
    with pytest.raises(RequestError, match=r"f\.jsonl, line 2, column 2: is not valid JSON"):
        FactsDataModule(str(path)).setup("fit")
    data = FactsDataModule(str(path), on_bad_record="skip")
    with pytest.warns(UserWarning, match="1 of 2 records cannot be edited and are left out"):
        data.setup("fit")
    assert len(data.requests) == len(data.refused) == 1
    path.with_suffix(".json").write_text(f"[{json.dumps(fact(1))}, ")
    with pytest.raises(RequestError, match=r"f\.json, line 1, column \d+: is not valid JSON"):
        FactsDataModule(str(path.with_suffix(".json")), on_bad_record="skip").setup("fit")


def test_errors_are_one_line_of_a_length_that_can_be_read(tmp_path: Path) -> None:
    """Whatever the records hold: what is long is cut, what cannot be printed is escaped."""
    records = [fact(n, prompt="a" * 5000, subject="b\n\ud800" * 500) for n in range(30)]
    path = tmp_path / "f.json"
    path.write_text(json.dumps(records))
    with pytest.raises(RequestError) as caught:
        FactsDataModule(str(path)).setup("fit")
    said = str(caught.value)
    assert "30 of 30 records cannot be edited" in said
    assert " more." in said
    assert len(said) < 1300
    assert said.isprintable()


def test_identifiers_are_made_to_differ(write_json: Callable[..., str]) -> None:
    path = write_json([fact(n, case_id=c) for n, c in enumerate([7, 8, 7, "7#2", 7, None, ""])])
    assert ids(FactsDataModule(path)) == ["7", "8", "7#3", "7#2", "7#4", "6", "7#5"]


def test_facts_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(
        "prompt,subject,target_new,target_true,rephrase_prompt,locality_prompt,locality_ground_truth,relation\n"
        '"{}, whose capital is",France,Lyon,Paris,France is run from | {} is led from,Spain: | Italy:,Madrid | Rome,a\n'
        "In Peru,Peru,x,,,,,b | c\n"
        "In Chile,,x,,,,,\n"
    )
    data = FactsDataModule(str(path), on_bad_record="skip")
    with pytest.warns(UserWarning, match="1 of 3 records"):
        data.setup("fit")
    first, second = data.requests
    assert (first.prompt, first.target_true) == ("France, whose capital is", "Paris")
    assert [p.prompt for p in first.probes] == ["France is run from", "France is led from", "Spain:", "Italy:"]
    assert [p.target for p in first.probes_of("locality")] == ["Madrid", "Rome"]
    assert (second.source, second.probes) == ("facts.csv, line 3", ())
    assert [first.relation, second.relation] == ["a", "b | c"]
    assert data.unused == []
    assert data.refused == ["facts.csv, line 4, field 'subject': is empty."]


def test_each_data_set_reads_its_forms(write_json: Callable[..., str]) -> None:
    mixed = write_json([counterfact(), flat()])
    assert ids(CounterFactDataModule(mixed, n_edits=None)) == ["12", "2"]
    questions = write_json([mend(), flat()], "zsre.json")
    assert ids(ZsREDataModule(questions, n_edits=2)) == ["1", "2"]
    assert ids(EditDataModule(write_json([mend(), flat(), concept(), counterfact()], "all.json"), n_edits=4))[3] == "12"
    with pytest.raises(RequestError, match=r"zsre\.json, record 1: looks like ZsRE as published with MEND"):
        CounterFactDataModule(questions).setup("fit")
    with pytest.raises(RequestError, match="what is read here is ConceptEdit"):
        ConceptEditDataModule(path=mixed).setup("fit")


@pytest.mark.parametrize("keep", [False, True])
def test_zsre_prefix(write_json: Callable[..., str], keep: bool) -> None:
    data = ZsREDataModule(write_json([mend()]), n_edits=1, keep_loc_prefix=keep)
    data.setup("fit")
    prefix = "nq question: " if keep else ""
    assert data.requests[0].probes_of("locality")[0].prompt == f"{prefix}who sang yesterday"


def test_conceptedit_chooses_in_a_folder(write_json: Callable[..., str], tmp_path: Path) -> None:
    write_json([concept()], "final_gpt2_inter.json")
    write_json([concept() | {"case_id": "x"}], "final_gpt2_intra.json")
    assert ids(ConceptEditDataModule("inter", str(tmp_path), n_edits=1)) == ["1"]
    assert ids(ConceptEditDataModule("intra", str(tmp_path), n_edits=1)) == ["x"]
    write_json([concept()], "final_llama_inter.json")
    with pytest.raises(RequestError, match=r"has 2 files final_\*_inter\.json \(final_gpt2_inter\.json, final_llama"):
        ConceptEditDataModule("inter", str(tmp_path), n_edits=1).setup("fit")


EMBEDDED = [
    (CounterFactDataModule, {}, "counterfact.json"),
    (ZsREDataModule, {}, "zsre.json"),
    (ConceptEditDataModule, {"module": "intra"}, "final_world_intra.json"),
    (ConceptEditDataModule, {"module": "inter"}, "final_world_inter.json"),
]


@pytest.mark.parametrize(("kind", "arguments", "name"), EMBEDDED, ids=[name for *_, name in EMBEDDED])
def test_embedded_files(kind: type[EditDataModule], arguments: dict[str, Any], name: str) -> None:
    from importlib.resources import files

    assert (files("lit_edit.world") / "data" / name).is_file()
    everything = kind(**arguments, n_edits=None)
    everything.setup("fit")
    assert everything.refused == []
    for request in everything.requests:
        assert request.source.startswith(f"{name}, record ")
        assert request.probes_of("generalization")
        assert request.probes_of("locality")
        assert request.target_true
    default = kind(**arguments)
    default.setup("fit")
    assert default.requests == everything.requests[: default.n_edits]


REAL = [
    (CounterFactDataModule, "counterfact/counterfact-edit.json", 10_000, 0),
    (CounterFactDataModule, "counterfact/counterfact-train.json", 10_000, 0),
    (CounterFactDataModule, "counterfact/counterfact-full-1599.json", 1_599, 0),
    (CounterFactDataModule, "counterfact/counterfact-portability.json", 1_031, 0),
    (CounterFactDataModule, "counterfact/counterfact-distracting-neighbor.json", 804, 0),
    (ZsREDataModule, "zsre/zsre-eval-portability.json", 1_037, 0),
    (ZsREDataModule, "zsre/zsre-train-1k.json", 998, 2),
]


@pytest.mark.parametrize(
    ("kind", "name", "n_loaded", "n_refused"), REAL, ids=[name.split("/")[1] for _, name, *_ in REAL]
)
def test_real_files(
    real_file: Callable[[str], Path], kind: type[EditDataModule], name: str, n_loaded: int, n_refused: int
) -> None:
    path = real_file(name)
    data = kind(str(path), n_edits=None, on_bad_record="skip")
    with pytest.warns(UserWarning, match="are left out") if n_refused else contextlib.nullcontext():
        data.setup("fit")
    assert len(data.requests) + len(data.refused) == len(json.loads(path.read_text(encoding="utf-8")))
    assert (len(data.requests), len(data.refused)) == (n_loaded, n_refused)
    assert len({request.case_id for request in data.requests}) == n_loaded
    for refused in data.refused:
        assert refused.startswith(f"{path.name}, record ")
        assert ", field 'alt': is empty." in refused
    for request in data.requests:
        assert request.subject in request.prompt
        assert request.target_true
        assert request.target_new == request.target_new.strip()
        assert request.probes_of("generalization")
        assert all(probe.target for probe in request.probes_of("locality"))
    has_portability = "portability" in path.name or "distracting" in path.name
    assert all(bool(request.probes_of("portability")) == has_portability for request in data.requests)


def test_real_probes(real_file: Callable[[str], Path]) -> None:
    data = CounterFactDataModule(str(real_file("counterfact/counterfact-distracting-neighbor.json")), n_edits=1)
    data.setup("fit")
    (request,) = data.requests
    names = [probe.name for probe in request.probes_of("locality")]
    assert {name: names.count(name) for name in names} == {
        "neighborhood": 10,
        "distracting": 10,
        "unrelated_relation": 1,
    }
    assert len(request.probes_of("generalization")) == 2
    assert len(request.probes_of("generation")) == 3
