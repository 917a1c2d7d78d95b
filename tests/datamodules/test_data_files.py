from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
from lit_edit.datamodules import FactsDataModule, read_records

from lit_edit.requests import RequestError

RECORDS = [{"a": "x"}, {"a": "y"}]


def error_of(path: str | Path) -> str:
    """That of the file, or else of its first record that cannot be read."""
    with pytest.raises(RequestError) as caught:  # noqa: PT012 - either of two
        for _, record in read_records(path):
            if isinstance(record, RequestError):
                raise record
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("value", [RECORDS, {"about": "two", "data": RECORDS}])
def test_json(tmp_path: Path, value: object) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(value))
    assert read_records(path) == [("f.json, record 1", {"a": "x"}), ("f.json, record 2", {"a": "y"})]


def test_jsonl_counts_lines_and_ignores_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"a": "x"}\n\n{"a": "y\u2028z"}\r\n', encoding="utf-8")
    assert read_records(path) == [("f.jsonl, line 1", {"a": "x"}), ("f.jsonl, line 3", {"a": "y\u2028z"})]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text('\ufeffa, b\nx,"two\nlines"\n\n"p | q","u | v"\ny,\n', encoding="utf-8")
    assert read_records(path, {"b"}) == [
        ("f.csv, line 2", {"a": "x", "b": "two\nlines"}),
        ("f.csv, line 5", {"a": "p | q", "b": ["u", "v"]}),
        ("f.csv, line 6", {"a": "y", "b": None}),
    ]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_what_spreadsheet_programs_put_between_cells(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "f.csv"
    path.write_text(f'a{separator}b\nx, y{separator}"1{separator}2"\n', encoding="utf-8")
    assert read_records(path) == [(f"{path.name}, line 2", {"a": "x, y", "b": f"1{separator}2"})]
    path.write_text(f"a{separator}b\nx\n", encoding="utf-8")
    name = "tab" if separator == "\t" else "semicolon"
    assert error_of(path).endswith(f"2 columns; put a text with a {name} in it into quotation marks.")


def test_one_column_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("a\nx;y\n", encoding="utf-8")
    assert read_records(path) == [("f.csv, line 2", {"a": "x;y"})]


@pytest.mark.parametrize(("name", "text"), [("f.json", '[{"a": "x"}]'), ("f.jsonl", '{"a": "x"}'), ("f.csv", "a\nx\n")])
def test_gzip(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(text.encode()))
    ((source, record),) = read_records(path)
    assert source.startswith(f"{name}.gz, ")
    assert record == {"a": "x"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.json", "", "f.json: the file is empty."),
        ("f.json", "[]", "f.json: the file has no records."),
        ("f.json", '[{"a": 1},\n {"b" 2}]', "f.json, line 2, column 7: is not valid JSON (Expecting ':' delimiter)."),
        ("f.json", '"text"', "f.json: holds text where a list of records is expected."),
        (
            "f.json",
            '{"a": 1, "b": 2}',
            "f.json: is an object, but not one with exactly one list of records in it (it has the fields a, b); "
            "put the records into one list.",
        ),
        (
            "f.json",
            '{"a": [], "b": []}',
            "f.json: is an object, but not one with exactly one list of records in it (2 of its fields are lists); "
            "put the records into one list.",
        ),
        ("f.json", '[{"a": 1}, 7]', "f.json, record 2: is a number, not an object with named fields."),
        ("f.jsonl", '{"a": 1}\n{"a": ', "f.jsonl, line 2, column 7: is not valid JSON (Expecting value)."),
        ("f.jsonl", '{"a": 1}\n\nnull', "f.jsonl, line 3: is null, not an object with named fields."),
        (
            "f.csv",
            "a,b\nx,y\nx\n",
            "f.csv, line 3: has 1 cell where the header names 2 columns; put a text with a comma in it into "
            "quotation marks.",
        ),
        ("f.csv", 'a,b\nx,"y\n', "f.csv, line 2: is not valid CSV (unexpected end of data)."),
        ("f.csv", "a,a\nx,y\n", "f.csv, line 1: the column 'a' is there twice."),
        ("f.csv", "a,,b\nx,y,z\n", "f.csv, line 1: column 2 has no name."),
        ("f.csv", "a,b\n", "f.csv: the file has no records."),
        (
            "f.tsv",
            'a\tb\n"x\ty\nx\t"y"\tz\n',
            "f.tsv, line 3: has 3 cells where the header names 2 columns; no text may have a tab in it.",
        ),
        ("f.json.gz", "plain", "f.json.gz: is not a readable gzip file (Not a gzipped file (b'pl'))."),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert error_of(path) == message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.json", '[{"a": 1}, {"b": 1, "a": 2, "b": 3}]', "f.json, record 2: has the field 'b' twice."),
        ("f.json", '[{"a": {"x": [{"y": 1, "y": 2}]}}]', "f.json, record 1: has the field 'y' twice."),
        ("f.json", '[{"a": {"y": 1, "y": 2}}]', "f.json, record 1: has the field 'y' twice."),
        ("f.json", '[{"a": ' + "[" * 40 + "]" * 40 + "}]", "f.json, record 1: is nested more than 30 levels deep."),
        ("f.json", '[\n{"a": ' + "[" * 10**5 + "]" * 10**5 + "}]", "f.json, line 2: is nested too deeply."),
        ("f.jsonl", '{"a": 1}\n{"a": ' + "[" * 10**5, "f.jsonl, line 2: is nested too deeply."),
    ],
)
def test_what_nobody_can_have_meant_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert error_of(path) == message


def test_a_number_of_thousands_of_digits_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('[{"a": ' + "9" * 6000 + ', "b": 12}]', encoding="utf-8")
    assert read_records(path)[0][1] == {"a": math.inf, "b": 12}


def test_a_file_that_unpacks_beyond_all_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_edit.datamodules.files._UNPACKED", 1000)
    path = tmp_path / "f.json.gz"
    path.write_bytes(gzip.compress(b" " * 5000 + b'[{"a": "x"}]'))
    assert error_of(path) == "f.json.gz: is larger than 1 kB unpacked; split it."


def test_truncated_gzip(tmp_path: Path) -> None:
    path = tmp_path / "f.json.gz"
    path.write_bytes(gzip.compress(b'[{"a": "x"}]')[:-6])
    assert error_of(path).startswith("f.json.gz: is not a readable gzip file (")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes("a\nx\né\n".encode("latin-1"))
    assert error_of(path) == "f.csv, line 3: is not UTF-8 text."


def test_missing_folder_and_unknown_kind(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.json") == f"{tmp_path / 'no.json'}: there is no such file."
    assert error_of(tmp_path) == f"{tmp_path}: is a folder; name a file in it."
    (tmp_path / "f.txt").write_text("x")
    assert error_of(tmp_path / "f.txt") == (
        f"{tmp_path / 'f.txt'}: is not a .json, .jsonl, .csv, .tsv file (or one of these with .gz appended)."
    )


def test_saved_data_set(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(folder))
    assert read_records(f"hf:{folder}") == [
        (f"hf:{folder}:train, record 1", {"a": "x"}),
        (f"hf:{folder}:train, record 2", {"a": "y"}),
    ]
    splits = tmp_path / "splits"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(RECORDS[:1])}).save_to_disk(str(splits))
    assert read_records(f"hf:{splits}:test") == [(f"hf:{splits}:test, record 1", {"a": "x"})]
    assert error_of(f"hf:{splits}").startswith(f"hf:{splits}: cannot be loaded (KeyError: ")


def test_hub_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*names: str, split: str, **more: object) -> datasets.Dataset:
        asked.append((*names, split))
        if names[0] == "no/such":
            raise FileNotFoundError("not\nthere")
        assert not more.get("trust_remote_code")
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_records("hf:owner/name")[1] == ("hf:owner/name:train, record 2", {"a": "y"})
    read_records("hf:owner/name:validation")
    assert error_of("hf:no/such") == "hf:no/such: cannot be loaded (FileNotFoundError: not there)."
    assert asked == [("owner/name", "train"), ("owner/name", "validation"), ("no/such", "train")]
    assert read_records("hf:owner/name:large:test")[0][0] == "hf:owner/name:large:test, record 1"
    assert asked[3:] == [("owner/name", "large", "test")]
    assert "is not of the form" in error_of("hf:")
    assert "is not of the form" in error_of("hf:owner/name::test")


def test_tabs_leave_quotation_marks_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "f.tsv"
    path.write_text('a\tb\n"Yes", he said.\t1\n', encoding="utf-8")
    assert read_records(path) == [("f.tsv, line 2", {"a": '"Yes", he said.', "b": "1"})]


def test_none_where_records_of_a_data_set_differ(tmp_path: Path) -> None:
    """Data sets fill fields that a record lacks with None, at every depth."""
    import datasets

    def entry(name: str) -> dict[str, object]:
        return {"prompt": "{} is", "subject": name, "target_new": "red"}

    rows = [entry("A") | {"locality": {"near": [{"prompt": "B is", "ground_truth": "blue"}]}}, entry("C")]
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    data = FactsDataModule(f"hf:{folder}")
    data.setup("fit")
    assert [len(request.probes) for request in data.requests] == [1, 0]
