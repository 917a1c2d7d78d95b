"""Corpora: files, and data sets as streams, that give the same texts every time and are known without being read."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lit_edit.model.loading import LoadingError
from lit_edit.statistics import corpora
from lit_edit.statistics.corpora import StreamedCorpus, load_corpus

TEXTS = [f"Text number {i}, in Zürich." for i in range(30)]


# Files


def test_a_text_file_has_a_text_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\ufeffOne text.\n\n  \nAnother, in Zürich.\n", encoding="utf-8")
    corpus = load_corpus(str(path))
    assert list(corpus) == list(corpus) == ["One text.", "Another, in Zürich."]
    assert corpus.identity is None
    assert len(list(load_corpus())) > 100
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(LoadingError, match=r"corpus\.txt' cannot be read"):
        load_corpus(str(path))
    path.write_text(" \n")
    with pytest.raises(LoadingError, match=r"corpus\.txt' holds no text"):
        load_corpus(str(path))
    with pytest.raises(LoadingError, match=r"'nowhere\.txt' cannot be read"):
        load_corpus("nowhere.txt")


def test_lines_of_json_have_a_text_in_a_field(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    odd = "with a line\nbreak and a \u2028 separator"  # neither ends a text
    records = [{"text": "One."}, {"text": " "}, {"text": odd, "id": 3}]
    path.write_text("\n\n".join(map(json.dumps, records)), encoding="utf-8")
    assert list(load_corpus(str(path))) == ["One.", odd]
    for line, message in (
        ("{", "line 2: is not valid JSON"),
        ('["a"]', "line 2: is no object, but list"),
        ('{"body": "a", "id": 1}', r"line 2: has no field 'text' \(it has body, id\)"),
        ('{"text": 3}', "line 2: the field 'text' is no text, but int"),
    ):
        path.write_text('{"text": "One."}\n' + line)
        with pytest.raises(LoadingError, match=message):
            list(load_corpus(str(path)))


def test_packed_files(tmp_path: Path) -> None:
    for name, line in (("c.txt.gz", "One."), ("c.jsonl.gz", '{"text": "One."}')):
        (tmp_path / name).write_bytes(gzip.compress(line.encode()))
        assert list(load_corpus(str(tmp_path / name))) == ["One."]
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"One." * 1000)[:-12])
    with pytest.raises(LoadingError, match=r"c\.txt\.gz' cannot be read"):
        load_corpus(str(tmp_path / "c.txt.gz"))


# Data sets as streams


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A data set as `save_to_disk` writes it."""
    import datasets

    folder = tmp_path / "kept"
    records = [{"text": text, "body": text.upper(), "id": i} for i, text in enumerate(TEXTS)]
    splits = {"train": datasets.Dataset.from_list(records), "test": datasets.Dataset.from_list(records[:3])}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder of data files, as on the hub."""
    folder = tmp_path / "raw"
    folder.mkdir()
    records = [json.dumps({"text": text}) for text in [*TEXTS, " "]]
    (folder / "train.jsonl").write_text("\n".join(records), encoding="utf-8")
    return folder


@pytest.mark.parametrize("form", ["kept", "raw"])
def test_a_folder_is_shuffled_and_always_in_the_same_way(form: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(form)
    corpus = load_corpus(f"hf:{folder}")
    found, identity = list(corpus), corpus.identity
    assert found != TEXTS
    assert sorted(found) == sorted(TEXTS)
    again = load_corpus(f"hf:{folder}")
    assert list(again) == found
    assert again.identity == identity  # reading leaves nothing in the folder


def test_split_and_field(kept: Path) -> None:
    assert sorted(load_corpus(f"hf:{kept}:test")) == TEXTS[:3]
    assert sorted(load_corpus(f"hf:{kept}::test:body")) == sorted(text.upper() for text in TEXTS[:3])
    with pytest.raises(LoadingError, match=r"has no field 'title' \(it has text, body, id\)"):
        list(load_corpus(f"hf:{kept}:::title"))
    with pytest.raises(LoadingError, match="the field 'id' is no text, but int"):
        list(load_corpus(f"hf:{kept}:::id"))
    with pytest.raises(LoadingError, match=r"cannot be read .*valid"):
        list(load_corpus(f"hf:{kept}:valid"))


def test_only_what_is_needed_is_read(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    read: list[int] = []

    def records() -> Any:
        for i, text in enumerate(TEXTS):
            read.append(i)
            yield {"text": text}

    stream = datasets.IterableDataset.from_generator(records)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    monkeypatch.setattr(corpora, "BUFFER", 5)
    texts = iter(load_corpus(f"hf:a/b@{'0' * 40}"))
    next(texts)
    assert len(read) < 10


def test_a_data_set_is_known_by_where_it_comes_from(kept: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [f"hf:{kept}", f"hf:{kept}:test", f"hf:{kept}:::body", f"hf:{raw}"]
    identities = {load_corpus(address).identity for address in addresses}
    assert len(identities) == len(addresses)
    moved = kept.rename(kept.parent / "moved")
    assert load_corpus(f"hf:{moved}").identity in identities
    before = load_corpus(f"hf:{raw}").identity
    text = (raw / "train.jsonl").read_text(encoding="utf-8")
    (raw / "train.jsonl").write_text(text.replace("number 7", "number 8"), encoding="utf-8")
    assert load_corpus(f"hf:{raw}").identity != before
    monkeypatch.setattr(corpora, "SEED", 1)
    assert load_corpus(f"hf:{moved}").identity not in identities


def test_the_hub_is_asked_for_the_commit_and_read_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    commit, asked, loaded = "ab" * 20, [], []

    class Info:
        sha = commit

    def dataset_info(self: object, name: str, revision: str | None) -> Info:
        asked.append((name, revision))
        return Info()

    def load_dataset(*names: object, **settings: object) -> Any:
        loaded.append((names, settings))
        return datasets.Dataset.from_list([{"text": text} for text in TEXTS]).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    newest, named = load_corpus("hf:own/er:conf:valid"), load_corpus(f"hf:own/er@{commit}:conf:valid")
    assert newest.identity == named.identity
    assert newest.name == named.name == "hf:own/er:conf:valid:text"
    assert sorted(newest) == sorted(named) == sorted(TEXTS)
    assert asked == [("own/er", None)]  # once, and not for a commit that is named
    expected = (("own/er", "conf"), {"split": "valid", "streaming": True, "revision": commit})
    assert loaded == [expected, expected]
    assert load_corpus("hf:own/er@v2").identity != newest.identity
    assert asked[1:] == [("own/er", "v2")]

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(LoadingError, match=r"which commit this is \(ConnectionError: no network\)\. Name one, hf:own/"):
        _ = load_corpus("hf:own/er").identity
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(LoadingError, match=r"hf:own/er::train:text: cannot be read \(ConnectionError: no network\)"):
        next(iter(named.__class__.parse(f"hf:own/er@{commit}")))


def test_addresses(tmp_path: Path) -> None:
    parse = StreamedCorpus.parse
    assert parse("hf:a/b") == StreamedCorpus("a/b", None, None, "train", "text")
    assert parse("hf:a/b:test") == StreamedCorpus("a/b", split="test")
    assert parse("hf:a/b@v1:c:test") == StreamedCorpus("a/b", "v1", "c", "test")
    assert parse("hf:a/b:::body") == StreamedCorpus("a/b", field="body")
    assert parse("hf:a/b:c::") == StreamedCorpus("a/b", config="c")
    for wrong in ("hf:", "hf::test", "hf:a/b:c:test:text:more"):
        with pytest.raises(LoadingError, match=f"{wrong}: is not of the form hf:owner/name"):
            parse(wrong)
    if os.name == "posix":
        folder = tmp_path / "a:b@c"
        folder.mkdir()
        assert parse(f"hf:{folder}") == StreamedCorpus(str(folder))
        shutil.rmtree(folder)
