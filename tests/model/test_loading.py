"""Models and tokenizers by name, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from lit_edit.commands.dry_run import skeleton
from lit_edit.model.loading import LoadingError, embedded_path, load_model, transformers_bars

Folder = Callable[[str], Path]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_is_loaded_in_the_given_type(tiny_folder: Folder, dtype: str) -> None:
    model, tokenizer = load_model(str(tiny_folder("gpt2")), dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert tokenizer.decode(tokenizer("Paris")["input_ids"]) == "Paris"


def test_a_folder_below_home(tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path / "models" / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_model("~/models/mine")
    monkeypatch.chdir(tmp_path)
    load_model("models/mine")
    with pytest.raises(LoadingError, match="~/models: no model there"):
        load_model("~/models")


def test_a_folder_without_a_tokenizer(tiny_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path / "mine", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(LoadingError, match=r"mine: there is a model, but no tokenizer .* save it there"):
        load_model(str(tmp_path / "mine"))


def test_what_cannot_be_loaded(tiny_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match="dtype 'int8' is not one of float32, bfloat16, float16"):
        load_model(str(tiny_folder("llama")), "int8")
    with pytest.raises(LoadingError, match=f"{tmp_path}: no model there"):
        load_model(str(tmp_path))
    with pytest.raises(LoadingError, match=r"\./nowhere: no model there"):
        load_model("./nowhere")

    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder("llama"), broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(LoadingError, match=r"broken' cannot be loaded: .") as caught:
        load_model(str(broken))
    assert "\n" not in str(caught.value)

    (broken / "config.json").write_text(json.dumps({"model_type": "no such family"}))
    with pytest.raises(LoadingError, match=r"broken' cannot be loaded: .*no such family"):
        load_model(str(broken))

    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder("llama"), bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(LoadingError, match=r"bare' cannot be loaded: .*model\.safetensors"):
        load_model(str(bare))


QUANTISED = {
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "fp8, 8 bits": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "mxfp4, 4 bits": {"quant_method": "mxfp4"},
    "compressed-tensors, 8 bits": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}, "targets": ["Linear"]}},
    },
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "newly invented": {"quant_method": "newly invented"},
}


@pytest.mark.parametrize("said", QUANTISED)
def test_quantised_models_are_refused_by_their_configuration(said: str, tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(tiny_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTISED[said]}))
    (folder / "model.safetensors").unlink()  # it is not asked for
    for load in (load_model, skeleton):
        with pytest.raises(LoadingError) as caught:
            load(str(folder), "float32")
        assert str(caught.value).endswith(
            f"packed' is quantised ({said}): what it stores is not the weight itself, and an edit cannot be written to "
            "it. Load the model that it was made from, unquantised."
        )


def test_a_library_that_is_missing_is_named(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("\nThis tokenizer needs `something`.\nInstall it.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(LoadingError, match=r"cannot be loaded: This tokenizer needs `something`\."):
        load_model(str(tiny_folder("llama")))
    assert skeleton(str(tiny_folder("llama")), "float32") is None


def test_damaged_weights_are_an_error_of_one_line(tiny_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoadingError, match=r"cut' cannot be loaded: ."):
        load_model(str(tmp_path / "cut"))


def test_code_that_comes_with_a_model_is_not_run(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(LoadingError, match="own' cannot be loaded"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_the_embedded_files_are_found() -> None:
    for name in ("counterfact.json", "zsre.json", "tasks.json", "text.txt"):
        assert embedded_path("data", name).is_file()


@pytest.mark.parametrize("were_on", [True, False])
def test_progress_bars_are_left_as_they_were(were_on: bool) -> None:
    was = transformers_logging.is_progress_bar_enabled()
    switch = {True: transformers_logging.enable_progress_bar, False: transformers_logging.disable_progress_bar}
    try:
        switch[were_on]()
        for shown in (True, False):
            inside: list[bool] = []
            with suppress(KeyError), transformers_bars(shown):
                inside.append(transformers_logging.is_progress_bar_enabled())
                raise KeyError
            assert inside == [were_on and shown]
            assert transformers_logging.is_progress_bar_enabled() == were_on
    finally:
        switch[was]()
