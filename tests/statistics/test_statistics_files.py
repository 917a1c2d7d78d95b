from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_edit.files import save_tensors
from lit_edit.statistics import (
    KeyCovariance,
    StatisticsError,
    StatisticsHeader,
    collect_covariances,
    corpus_sha256,
    covariances,
    load_covariances,
    model_fingerprint,
    save_covariances,
    tokenizer_fingerprint,
)

WORDS = [f"w{i}" for i in range(30)]
P = 24


def build_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": P,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "attention_dropout": 0.5,
            **changes,
        }
    )
    return LlamaForCausalLM(config)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small only loses time to threads, a lot of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, **{word: i + 1 for i, word in enumerate(WORDS)}}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 14, (40,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, 30, (n,), generator=generator)) for n in lengths]


def projections(model: LlamaForCausalLM) -> dict[str, nn.Module]:
    return {f"layers.{i}": block.mlp.down_proj for i, block in enumerate(model.model.layers)}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def keys_one_by_one(model: LlamaForCausalLM, tokenizer, texts: list[str], length: int) -> dict[str, list[Tensor]]:
    """Every key from an unpadded forward pass of its own sequence, by hand: gate, up, product."""
    model.eval()
    found: dict[str, list[Tensor]] = {"layers.0": [], "layers.1": []}
    for text in texts:
        whole = tokenizer(text)["input_ids"]
        for start in range(0, len(whole), length):
            ids = torch.tensor([whole[start : start + length]])
            for i, block in enumerate(model.model.layers):
                seen: list[Tensor] = []
                handle = block.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                with torch.no_grad():
                    model(ids)
                    handle.remove()
                    x = seen[0][0]
                    found[f"layers.{i}"] += list(block.mlp.act_fn(block.mlp.gate_proj(x)) * block.mlp.up_proj(x))
    return found


# The metric


def test_metric_equals_a_plain_loop() -> None:
    keys = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    expected, count = torch.zeros(5, 5, dtype=torch.float64), 0
    for row, row_mask in zip(keys, mask, strict=True):
        for key, counts in zip(row, row_mask, strict=True):
            if counts:
                expected += torch.outer(key, key)
                count += 1
    metric = KeyCovariance(5)
    metric.update(keys, mask)
    assert int(metric.count) == count
    torch.testing.assert_close(metric.compute(), expected / count)
    single = KeyCovariance(5)
    single.update(keys)
    torch.testing.assert_close(single.compute(), sum(torch.outer(k, k) for k in keys.reshape(-1, 5)) / 21)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_batches_and_merged_states_equal_one_update(dtype: torch.dtype) -> None:
    keys = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole, first, second = KeyCovariance(6), KeyCovariance(6), KeyCovariance(6)
    whole.update(keys)
    for part in keys[:30].split(7):
        first.update(part)
    second.update(keys[30:])
    first.merge_state(second)
    assert int(first.count) == 50
    torch.testing.assert_close(first.compute(), whole.compute())
    assert whole.compute().dtype == torch.float64


def test_masked_keys_play_no_part_whatever_they_are() -> None:
    keys = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]])
    metric = KeyCovariance(2)
    metric.update(keys, torch.tensor([1, 0]))
    torch.testing.assert_close(metric.compute(), torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64))


def test_metric_refuses() -> None:
    metric = KeyCovariance(2)
    with pytest.raises(ValueError, match=r"2 features last, got shape \(4, 3\)"):
        metric.update(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) does not fit keys of shape \(4, 2\)"):
        metric.update(torch.ones(4, 2), torch.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        metric.update(torch.full((4, 2), float("nan")))
    metric.reset()
    metric.update(torch.ones(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="no key covariance before a key was counted"):
        metric.compute()
    with pytest.raises(ValueError, match="at least one feature, got 0"):
        KeyCovariance(0)


# Collecting


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_collected_covariance_equals_keys_one_by_one(model, tokenizer, texts, batch_size: int) -> None:
    found = collect_covariances(model, tokenizer, texts, projections(model), sequence_length=9, batch_size=batch_size)
    keys = keys_one_by_one(model, tokenizer, texts, 9)
    assert list(found) == ["layers.0", "layers.1"]
    for name, covariance in found.items():
        stacked = torch.stack(keys[name]).double()
        torch.testing.assert_close(covariance, stacked.T @ stacked / len(stacked), rtol=1e-5, atol=1e-9)


def test_it_stops_at_max_tokens_and_reads_no_further(model, tokenizer, texts) -> None:
    read: list[str] = []

    def stream() -> Iterator[str]:
        for text in texts:
            read.append(text)
            yield text

    found = collect_covariances(model, tokenizer, stream(), projections(model), max_tokens=50, sequence_length=9)
    keys = keys_one_by_one(model, tokenizer, texts, 9)
    stacked = torch.stack(keys["layers.1"][:50]).double()
    torch.testing.assert_close(found["layers.1"], stacked.T @ stacked / 50, rtol=1e-5, atol=1e-9)
    assert len(read) < len(texts)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_nothing_of_a_long_text_is_left_out(model, tokenizer, texts, batch_size: int) -> None:
    long = [" ".join(texts * 2), *texts[:3], " ".join(texts)]
    number = sum(len(tokenizer(text)["input_ids"]) for text in long)
    assert number > 20 * P
    found = collect_covariances(
        model, tokenizer, long, projections(model), max_tokens=number, sequence_length=9, batch_size=batch_size
    )
    for name, keys in keys_one_by_one(model, tokenizer, long, 9).items():
        assert len(keys) == number
        stacked = torch.stack(keys).double()
        torch.testing.assert_close(found[name], stacked.T @ stacked / number, rtol=1e-5, atol=1e-9)


def test_texts_without_tokens_are_passed_over(model, tokenizer, texts) -> None:
    plain = collect_covariances(model, tokenizer, texts, projections(model), sequence_length=16)
    padded = [text for pair in zip(texts, [""] * len(texts), strict=True) for text in pair]
    torch.testing.assert_close(
        collect_covariances(model, tokenizer, padded, projections(model), sequence_length=16), plain
    )
    with pytest.raises(StatisticsError, match="corpus for the key covariance has no token"):
        collect_covariances(model, tokenizer, ["", " "], projections(model), sequence_length=16)


def test_the_model_is_left_as_it_was(model, tokenizer, texts) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    collect_covariances(model, tokenizer, texts, projections(model), sequence_length=16)
    assert [module.training for module in model.modules()] == modes
    assert hooks(model) == 0
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_hooks_are_removed_after_an_exception(model, tokenizer, texts) -> None:
    def broken() -> Iterator[str]:
        yield from texts[:3]
        raise OSError("the disk is gone")

    model.train()
    with pytest.raises(OSError, match="disk is gone"):
        collect_covariances(model, tokenizer, broken(), projections(model), sequence_length=16, batch_size=2)
    assert hooks(model) == 0
    assert model.training


def test_fewer_tokens_than_features_warn(model, tokenizer, texts) -> None:
    with pytest.warns(UserWarning, match="over 20 tokens, fewer than a key's 24 features in layers") as caught:
        collect_covariances(model, tokenizer, texts, projections(model), max_tokens=20, sequence_length=16)
    assert caught[0].filename == __file__


def test_modules_that_are_not_the_models_are_named(model, tokenizer, texts) -> None:
    stranger = {"elsewhere": nn.Linear(P, 16)}
    with pytest.raises(StatisticsError, match="elsewhere ran 0 times"):
        collect_covariances(model, tokenizer, texts, {**projections(model), **stranger}, sequence_length=16)
    with pytest.raises(StatisticsError, match="head ran 0 times"):
        collect_covariances(model, tokenizer, texts, {"head": model.lm_head}, sequence_length=16)


def test_an_input_that_is_not_a_key_per_token_is_named(model, tokenizer, texts) -> None:
    first_only = nn.Identity()
    model.model.norm.register_forward_hook(lambda _, __, output: (first_only(output[:, :1]), output)[1])
    with pytest.raises(StatisticsError, match=r"input of module 'first' should be a key for each of \(16, 13\) tokens"):
        collect_covariances(model, tokenizer, texts, {"first": first_only}, sequence_length=16)


def test_inputs_flattened_over_the_batch_are_understood(model, tokenizer, texts) -> None:
    flat = nn.Identity()
    model.model.norm.register_forward_hook(lambda _, __, output: (flat(output.flatten(0, 1)), output)[1])
    straight = nn.Identity()
    model.model.norm.register_forward_hook(lambda _, __, output: (straight(output), output)[1])
    found = collect_covariances(model, tokenizer, texts, {"flat": flat, "straight": straight}, sequence_length=16)
    torch.testing.assert_close(found["flat"], found["straight"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sequence_length": 33}, StatisticsError, "sequence_length is 33, the model takes 32 tokens at most"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"modules": {}}, ValueError, "no modules to collect"),
        ({"texts": "a single text"}, TypeError, "collection of texts"),
    ],
)
def test_bad_settings_are_refused(model, tokenizer, texts, settings, error, message: str) -> None:
    arguments = {"texts": texts, "modules": projections(model), "sequence_length": 16, **settings}
    with pytest.raises(error, match=message):
        collect_covariances(model, tokenizer, **arguments)


# Fingerprints


def test_model_fingerprint_knows_the_values_and_nothing_else() -> None:
    model = build_model()
    reference = model_fingerprint(model)
    assert model_fingerprint(build_model()) == reference
    assert model_fingerprint(model.train()) == reference
    assert model_fingerprint(build_model(seed=1)) != reference
    assert model_fingerprint(build_model().bfloat16()) != reference
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    assert model_fingerprint(model) != reference


def test_model_fingerprint_of_tied_transposed_and_large_parameters() -> None:
    tied = build_model(tie_word_embeddings=True)
    assert model_fingerprint(tied) == model_fingerprint(build_model(tie_word_embeddings=True))
    assert model_fingerprint(tied) != model_fingerprint(build_model())

    plain, viewed = nn.Linear(5, 7), nn.Linear(5, 7)
    viewed.weight = nn.Parameter(plain.weight.detach().T.contiguous().T)  # equal, stored the other way round
    viewed.bias = plain.bias
    assert model_fingerprint(viewed) == model_fingerprint(plain)

    large = nn.Linear(400, 400)
    reference = model_fingerprint(large)
    with torch.no_grad():
        large.weight.mul_(1.001)
    assert model_fingerprint(large) != reference


def formerly_sampled(shape: tuple[int, int]) -> torch.Tensor:
    """The columns of a matrix that a sample of every n-th value meets, n the least that leaves 65,536."""
    stride = -(-shape[0] * shape[1] // 65_536)
    return torch.arange(0, shape[0] * shape[1], stride) % shape[1]


@pytest.mark.parametrize("shape", [(256, 1024), (64, 4096), (512, 384)])
def test_model_fingerprint_sees_a_change_of_rank_one_in_other_columns(shape: tuple[int, int]) -> None:
    linear = nn.Linear(shape[1], shape[0], bias=False)
    reference = model_fingerprint(linear)
    key = torch.randn(shape[1], generator=torch.Generator().manual_seed(0))
    key[formerly_sampled(shape)] = 0
    assert 0.4 * shape[1] < int((key != 0).sum()) < shape[1]
    with torch.no_grad():
        linear.weight.add_(torch.outer(torch.ones(shape[0]), key))
    assert model_fingerprint(linear) != reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 301), (7,), (3, 5, 11), ()])
def test_model_fingerprint_sees_every_single_value(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.ones(shape, dtype=dtype))
    reference = model_fingerprint(holder)
    for index in {0, 1, holder.weight.numel() // 2, holder.weight.numel() - 1}:
        if index < holder.weight.numel():
            with torch.no_grad():
                holder.weight.view(-1)[index] = 1.5
                assert model_fingerprint(holder) != reference
                holder.weight.view(-1)[index] = 1.0
    assert model_fingerprint(holder) == reference


def test_model_fingerprint_does_not_depend_on_where_a_value_lies_in_memory() -> None:
    plain, shifted = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    room = torch.zeros(10)
    room[1:] = plain.weight.detach().reshape(-1)
    shifted.weight = nn.Parameter(room[1:].view(3, 3))
    assert model_fingerprint(shifted) == model_fingerprint(plain)


def test_tokenizer_fingerprint_forgets_how_it_was_called(tokenizer) -> None:
    reference = tokenizer_fingerprint(tokenizer)
    tokenizer("w1 w2 w3", truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == reference
    other = Tokenizer(WordLevel({"[UNK]": 0, "w2": 1}, unk_token="[UNK]"))
    assert tokenizer_fingerprint(PreTrainedTokenizerFast(tokenizer_object=other)) != reference


def test_corpus_hash_knows_the_borders_between_texts() -> None:
    assert corpus_sha256(["ab", "c"]) == corpus_sha256(iter(["ab", "c"]))
    assert len({corpus_sha256(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], [])}) == 5


# Files

HEADER = StatisticsHeader(
    kind="key_covariance",
    model="m" * 64,
    tokenizer="t" * 64,
    layers=("b", "a"),
    corpus="wiki",
    corpus_sha256="c" * 64,
    max_tokens=1000,
    sequence_length=256,
    n_tokens=900,
    texts_sha256="u" * 64,
)
MATRICES = {"a": torch.eye(3, dtype=torch.float64), "b": 2 * torch.eye(4, dtype=torch.float64)}


def test_a_saved_file_loads_in_the_headers_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "c.safetensors"
    save_covariances(path, MATRICES, HEADER)
    for expected in (HEADER, replace(HEADER, n_tokens=None, texts_sha256=None)):
        found = load_covariances(path, expected)
        assert list(found) == ["b", "a"]
        torch.testing.assert_close(found, {name: MATRICES[name] for name in ("b", "a")}, rtol=0, atol=0)
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]


def test_float32_is_stored_as_float64(tmp_path: Path) -> None:
    save_covariances(tmp_path / "c", {name: matrix.float() for name, matrix in MATRICES.items()}, HEADER)
    assert load_covariances(tmp_path / "c", HEADER)["a"].dtype == torch.float64


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    save_covariances(path, MATRICES, HEADER)
    before = path.read_bytes()

    def broken(tensors, file, metadata) -> None:
        Path(file).write_bytes(b"half a")
        raise OSError("no space left")

    monkeypatch.setattr("lit_edit.files.save_file", broken)
    with pytest.raises(OSError, match="no space left"):
        save_covariances(path, MATRICES, HEADER)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "x"}, f"model: found '{'m' * 64}', expected 'x'"),
        ({"tokenizer": "x"}, f"tokenizer: found '{'t' * 64}', expected 'x'"),
        ({"layers": ("a",)}, r"layers: found \('b', 'a'\), expected \('a',\)"),
        ({"corpus": "news"}, "corpus: found 'wiki', expected 'news'"),
        ({"corpus_sha256": "x"}, f"corpus_sha256: found '{'c' * 64}', expected 'x'"),
        ({"max_tokens": 1}, "max_tokens: found 1000, expected 1"),
        ({"n_tokens": 1}, "n_tokens: found 900, expected 1"),
        ({"sequence_length": 1}, "sequence_length: found 256, expected 1"),
        ({"dtype": "float32"}, "dtype: found 'float64', expected 'float32'"),
        ({"format_version": 2}, "format_version: found 4, expected 2"),
        ({"texts_sha256": "x"}, f"texts_sha256: found '{'u' * 64}', expected 'x'"),
        ({"kind": "gradient"}, "kind: found 'key_covariance', expected 'gradient'"),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(tmp_path: Path, change, message: str) -> None:
    save_covariances(tmp_path / "c", MATRICES, HEADER)
    with pytest.raises(StatisticsError, match=f"made from something else. {message}. Delete the file"):
        load_covariances(tmp_path / "c", replace(HEADER, **change))


def test_damaged_files_say_so_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with pytest.raises(StatisticsError, match=r"no statistics at .*c: collect them"):
        load_covariances(path, HEADER)
    save_covariances(path, MATRICES, HEADER)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:100], whole[:-8], struct.pack("<Q", 3) + b"abc"):
        path.write_bytes(damaged)
        with pytest.raises(StatisticsError, match=r"c cannot be read: .* Delete the file to have it computed again\."):
            load_covariances(path, HEADER)
    for metadata in ({}, {"statistics": "{}"}, {"statistics": "not json"}, {"other": "x"}):
        save_tensors(path, MATRICES, metadata)
        with pytest.raises(StatisticsError, match=r"cannot be read: .* Delete the file"):
            load_covariances(path, HEADER)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": MATRICES["a"]}, r"hold the layers \['a'\], the header names \['a', 'b'\]"),
        ({**MATRICES, "b": torch.ones(2, 3, dtype=torch.float64)}, r"'b' must be a square .* of shape \(2, 3\)"),
        ({**MATRICES, "b": torch.eye(2)}, "'b' must be a square float64 matrix, it is torch.float32"),
        ({**MATRICES, "b": torch.full((2, 2), float("nan"), dtype=torch.float64)}, "'b' holds values that are not"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, tensors, message: str) -> None:
    save_tensors(tmp_path / "c", tensors, {"statistics": HEADER.to_json()})
    with pytest.raises(StatisticsError, match=message):
        load_covariances(tmp_path / "c", HEADER)


def test_saving_checks_the_header(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match=r"names the layers \['a', 'b'\], the covariances are of \['a'\]"):
        save_covariances(tmp_path / "c", {"a": MATRICES["a"]}, HEADER)
    with pytest.raises(StatisticsError, match="does not say how many tokens"):
        save_covariances(tmp_path / "c", MATRICES, replace(HEADER, n_tokens=None))


def test_header_is_plain_json() -> None:
    assert json.loads(HEADER.to_json())["layers"] == ["b", "a"]
    assert StatisticsHeader.from_json(HEADER.to_json()) == HEADER
    assert replace(HEADER, n_tokens=None, texts_sha256=None).file_name == HEADER.file_name
    assert replace(HEADER, max_tokens=2).file_name != HEADER.file_name


# The cache


@pytest.fixture
def passes(model: LlamaForCausalLM) -> list[int]:
    found: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: found.append(1))
    return found


def test_a_cached_file_is_used_again_and_only_for_the_same(model, tokenizer, texts, tmp_path, passes) -> None:
    def run(**changes: object) -> dict[str, Tensor]:
        arguments = {"texts": iter(texts), "corpus_name": "own", "modules": projections(model), **changes}
        return covariances(model, tokenizer, cache_dir=tmp_path / "cache", sequence_length=16, **arguments)

    first = run()
    assert len(passes) == 3
    torch.testing.assert_close(run(), first, rtol=0, atol=0)
    assert list(run()) == list(first)
    assert len(passes) == 3
    for changes in ({"texts": texts[1:]}, {"max_tokens": 100}):
        before = len(passes)
        run(**changes)
        assert len(passes) > before
    before = len(passes)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert not torch.allclose(run()["layers.1"], first["layers.1"])
    assert len(passes) > before
    assert len(list((tmp_path / "cache").iterdir())) == 8


def test_a_damaged_cache_is_an_error_and_not_recomputed(model, tokenizer, texts, tmp_path, passes) -> None:
    arguments = (model, tokenizer, texts, "own", projections(model), tmp_path)
    covariances(*arguments, sequence_length=16)
    path = min(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    before = len(passes)
    with pytest.raises(StatisticsError, match=f"{path.name} cannot be read: .* Delete the file"):
        covariances(*arguments, sequence_length=16)
    assert len(passes) == before


def test_no_gradients_are_tracked(model, tokenizer, texts, tmp_path) -> None:
    modes: list[bool] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    collect_covariances(model, tokenizer, texts, projections(model), sequence_length=16)
    covariances(model, tokenizer, texts, "own", projections(model), tmp_path, sequence_length=16)
    assert modes
    assert not any(modes)


def test_a_single_text_is_no_corpus(model, tokenizer, tmp_path) -> None:
    with pytest.raises(TypeError, match="collection of texts"):
        covariances(model, tokenizer, "a text", "own", projections(model), tmp_path)


def test_module_doctest() -> None:
    import doctest

    import lit_edit.statistics.covariance

    assert doctest.testmod(lit_edit.statistics.covariance) == (0, 3)
