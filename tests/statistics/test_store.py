"""Statistics as files: used again for what they were made from, and for nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import projection_of

from lit_edit.editors import LocateThenEdit
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.restraints import OEditPlus
from lit_edit.editors.solvers import ROME
from lit_edit.editors.values import OEdit, ValueOptimizer
from lit_edit.files import save_tensors
from lit_edit.session import EditSession, Preparation
from lit_edit.statistics import Collector, GradientCollector, Header, KeyCollector, Statistics, StatisticsError
from lit_edit.statistics.store import load, save, texts_sha256

TEXTS = [f"The {a} of {b} is known for its {c}." for a in ("king", "river") for b in ("Oslo", "Rome") for c in "abcdef"]
MATRIX = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
HEADER = Header("key_covariance", "m", "t", ("a",), "wiki", "c", 1000, 256, 900, "u")
EXPECTED = replace(HEADER, n_tokens=None, texts_sha256=None)

Asked = Callable[..., Statistics]
each_kind = pytest.mark.parametrize("kind", [KeyCollector, GradientCollector], ids=lambda kind: kind.kind)


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    model, tokenizer = tiny_model("gpt2")

    def make(kind: type[Collector] = KeyCollector, layers: tuple[int, ...] = (1, 2), **changes: Any) -> Statistics:
        given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "texts": TEXTS, "corpus_name": "own"}
        given |= {"max_tokens": 250, "sequence_length": 16, "folder": tmp_path / "kept"} | changes
        modules = {f"layer {i}": projection_of(given["model"], i) for i in layers}
        return Statistics(kind, modules=modules, **given)

    return make


def passes_of(statistics: Statistics) -> list[int]:
    ran: list[int] = []
    statistics.model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))  # type: ignore[operator]
    return ran


def test_a_file_loads_as_it_was_saved(tmp_path: Path) -> None:
    save(tmp_path / "c", MATRIX.float(), HEADER)
    found, header = load(tmp_path / "c", EXPECTED)
    torch.testing.assert_close(found, MATRIX, rtol=0, atol=0)
    assert header == HEADER


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("kind", "lm_gradient"), ("model", "x"), ("tokenizer", "x"), ("layers", ("b",)), ("corpus", "news")),
        *(("corpus_sha256", "x"), ("max_tokens", 1), ("sequence_length", 1), ("n_tokens", 1), ("texts_sha256", "x")),
        *(("dtype", "float32"), ("format_version", 2)),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(tmp_path: Path, field: str, value: Any) -> None:
    save(tmp_path / "c", MATRIX, HEADER)
    with pytest.raises(StatisticsError, match="made from something else") as error:
        load(tmp_path / "c", replace(EXPECTED, **{field: value}))
    assert f"{field}: found {getattr(HEADER, field)!r}, expected {value!r}" in str(error.value)
    assert replace(EXPECTED, **{field: value}).file_name != EXPECTED.file_name or field in ("n_tokens", "texts_sha256")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"hold the layers \[\], the header names \['a'\]"),
        ({"a": torch.ones(2, 3, dtype=torch.float64)}, r"must be a square .* of shape \(2, 3\)"),
        ({"a": torch.eye(2)}, "must be a square float64 matrix, it is torch.float32"),
        ({"a": torch.full((2, 2), float("nan"), dtype=torch.float64)}, "holds values that are not finite"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save(tmp_path / "c", MATRIX, HEADER)
    save_tensors(tmp_path / "c", tensors, {"statistics": json.dumps(asdict(HEADER))})
    with pytest.raises(StatisticsError, match=message):
        load(tmp_path / "c", EXPECTED)


def test_a_damaged_file_is_an_error_and_not_replaced(asked: Asked) -> None:
    statistics = asked()
    statistics.get()
    path = statistics.paths["layer 1"]
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    for damaged in (b"", bytes(content), bytes(content[:50])):
        path.write_bytes(damaged)
        with pytest.raises(StatisticsError, match=r"cannot be read: .* Delete the file to have it computed again\."):
            asked().get()
        assert path.read_bytes() == damaged


@each_kind
def test_other_layers_use_what_is_there_and_collect_the_rest(kind: type[Collector], asked: Asked) -> None:
    first = asked(kind, (1,)).get()
    both = asked(kind, (1, 2))
    assert both.missing() == ["layer 2"]
    ran = passes_of(both)
    found = both.get()
    assert ran
    assert list(found) == ["layer 1", "layer 2"]
    torch.testing.assert_close(found["layer 1"], first["layer 1"], rtol=0, atol=0)
    ran.clear()
    torch.testing.assert_close(asked(kind, (2, 1)).get(), {"layer 2": found["layer 2"], **first}, rtol=0, atol=0)
    assert ran == []
    assert not list(both.folder.glob("partial-*"))


def test_anything_else_is_collected_anew(asked: Asked) -> None:
    asked().get()
    other, _ = tiny_model("gpt2", seed=1)
    for change in ({"texts": TEXTS[1:]}, {"max_tokens": 200}, {"sequence_length": 8}, {"model": other}):
        assert len(asked(**change).missing()) == 2, change
    assert asked().missing() == []


class Stream:
    """A corpus known by its identity."""

    def __init__(self, identity: str, texts: list[str]) -> None:
        self.identity, self.texts, self.name, self.read = identity, texts, "stream", 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.read += 1
            yield text


def test_a_stream_is_known_by_its_identity_and_read_as_far_as_needed(asked: Asked) -> None:
    stream = Stream("v1", TEXTS * 100)
    statistics = asked(texts=stream)
    statistics.get()
    assert 0 < stream.read < 100
    header = statistics.headers["layer 1"]
    assert header.corpus == "stream"
    assert header.n_tokens == 250
    assert header.texts_sha256 == texts_sha256((TEXTS * 100)[: stream.read])
    again = Stream("v1", [])
    asked(texts=again).get()
    assert again.read == 0
    assert len(asked(texts=Stream("v2", TEXTS)).missing()) == 2
    with pytest.raises(TypeError, match="a collection of texts, got a single one"):
        asked(texts="one")


def test_what_may_not_be_collected_says_what_is_there(asked: Asked) -> None:
    with pytest.raises(StatisticsError, match=r"no key covariance of layer 1, layer 2 over 250 .*collect it with"):
        asked().get(may_collect=False)
    asked().get()
    with pytest.raises(StatisticsError, match=r"nearest there are .*max_tokens: found 250, expected 240"):
        asked(max_tokens=240).get(may_collect=False)


@pytest.mark.filterwarnings("default:The key covariance was counted over")
def test_few_tokens_are_said_also_when_the_file_is_read(asked: Asked) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="fewer than a key's .*singular"):
            asked(max_tokens=20).get()
        with pytest.warns(UserWarning, match="fewer than 10 for each of a key's"):
            asked(max_tokens=250).get()


@pytest.mark.parametrize("part", ["restraint", "penalty", "none"])
def test_a_session_collects_what_its_editor_asks_for(part: str, tmp_path: Path) -> None:
    penalties: list[Any] = [OEdit()] if part == "penalty" else []
    editor = LocateThenEdit(
        FixedLayers([1, 2]), ValueOptimizer(penalties=penalties), ROME(),
        restraints=[OEditPlus()] if part == "restraint" else None, contexts=0,
    )  # fmt: skip
    model, tokenizer = tiny_model("llama")
    session = EditSession(model, tokenizer, editor, Preparation(corpus=TEXTS, cache_dir=str(tmp_path)))
    for site in session.sites:
        assert site.covariance is not None
        assert (site.gradient is not None) == (part != "none")
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == (
        {"key_covariance"} if part == "none" else {"key_covariance", "lm_gradient"}
    )
