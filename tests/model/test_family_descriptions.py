"""Every described family, and the finder for those that are not, on tiny random models."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import yaml
from helpers.models import FAMILIES as MAIN_FAMILIES
from helpers.models import OTHER_FAMILIES, tiny_model
from helpers.references import CONTEXTS, requests, tokens, weights
from helpers.runs import TEXTS, one_layer_editor
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, MixtralConfig

from lit_edit import EditRequest, edit
from lit_edit.editors.keys import BareKey, MeanKey, compute_keys
from lit_edit.editors.values import ValueOptimizer, ValueProblem
from lit_edit.model.families import FAMILIES, Architecture, Family, UnsupportedModelError, find_family
from lit_edit.model.hooks import change_outputs
from lit_edit.model.passes import cut, supported
from lit_edit.model.prompts import Prompter
from lit_edit.model.workspace import Workspace
from lit_edit.statistics import KeyCollector, StatisticsError, collect

EVERY = [*MAIN_FAMILIES, *OTHER_FAMILIES]
each_family = pytest.mark.parametrize("kind", EVERY)
# Models whose MLP output is normalised before it is added: a change of the weight reaches the stream through the norm.
NORMALISED = {"gemma2", "gemma3_text", "gemma3", "olmo2"}


def test_every_family_that_is_described_is_tested() -> None:
    assert set(EVERY) == set(FAMILIES)


def modules_named(block: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in block.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2}


@each_family
def test_the_projection_is_the_one_module_that_maps_the_inner_width_to_the_models(kind: str) -> None:
    model, _ = tiny_model(kind)
    architecture = Architecture(model)
    assert len(architecture) == 4
    inner = 32 if kind == "llama" else 48
    for part in architecture.layers:
        assert part.weight.shape == (32, inner)
        assert dict(model.named_parameters())[part.name] is part.projection.weight
        if inner != 32:
            fitting = [
                m
                for m in modules_named(part.block).values()
                if sorted(m.weight.shape) == [32, 48] and m is part.projection
            ]
            assert fitting == [part.projection]


@each_family
def test_it_computes_weight_times_input_plus_bias(kind: str) -> None:
    model, _ = tiny_model(kind)
    part = Architecture(model.double())[2]
    seen: list[tuple[Tensor, Tensor]] = []
    handle = part.projection.register_forward_hook(lambda _, args, out: seen.append((args[0], out.clone())))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
        handle.remove()
        key, out = seen[0]
        bias = getattr(part.projection, "bias", None)
        torch.testing.assert_close(out, key @ part.weight.T + (0 if bias is None else bias), rtol=1e-9, atol=1e-9)


@each_family
def test_the_key_is_the_input_at_the_subjects_last_token(kind: str) -> None:
    model, tokenizer = tiny_model(kind)
    workspace = Workspace.of(model.double().requires_grad_(False), tokenizer, CONTEXTS)
    keys = compute_keys(workspace, requests(), [1], BareKey())[1]
    seen: list[Tensor] = []
    handle = workspace.architecture[1].projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for i, request in enumerate(requests()):
        ids, _, last = tokens(tokenizer, "", request)
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        alone = seen[0].reshape(len(ids), -1)[last]
        torch.testing.assert_close(keys[:, i], alone.float(), rtol=1e-4, atol=1e-5)
    handle.remove()


@each_family
def test_cut_passes_equal_complete_ones(kind: str) -> None:
    model, tokenizer = tiny_model(kind)
    workspace = Workspace.of(model.double().requires_grad_(False), tokenizer, CONTEXTS)
    parts = workspace.architecture.layers
    batch = workspace.prompter.collate([r for q in requests() for r in workspace.rewriting_rows(q)], "cpu")
    assert supported(model, [part.block for part in parts], batch.input_ids.shape[1])
    rows = torch.arange(len(batch.input_ids))
    delta = torch.randn(len(rows), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = (rows, batch.subject_last)
    last = batch.attention_mask.sum(1) - 1
    with torch.no_grad():
        with change_outputs(
            {parts[2].projection: lambda out: out.index_put(at, out[at] + delta)}, batch.input_ids.shape[1]
        ):
            whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        found, _ = cut(model, parts, batch, [2])
        # A norm behind the MLP is what keeps a change from arriving as it is.
        assert found.behind == (set() if any("post_f" in name for name, _ in model.named_modules()) else {2})
        suffixes = found.select(rows.tolist(), [2] * len(rows))
        changes: Any = [(p, lambda out, which: out + delta[which]) for p in suffixes.places(2, rows.tolist())]
        part = suffixes.logits(rows, last - batch.subject_last, changes)
    # Gemma's norms compute in float32 whatever comes in.
    torch.testing.assert_close(part, whole[rows, last], rtol=1e-9, atol=1e-6 if "gemma" in kind else 1e-9)


@each_family
def test_values_in_float32_are_those_of_complete_passes(kind: str) -> None:
    model, tokenizer = tiny_model(kind)
    workspace = Workspace.of(model.requires_grad_(False), tokenizer, CONTEXTS)
    problems = [ValueProblem(0, (1,)), ValueProblem(1, (0, 2))]
    plain, quick = (
        ValueOptimizer(steps=3, lr=0.05, complete_passes=complete).optimise(workspace, requests(), problems, MeanKey())
        for complete in (True, False)
    )
    assert quick.loss == pytest.approx(plain.loss, rel=1e-5)
    for one, other in zip(quick.targets, plain.targets, strict=True):
        for layer, value in one.items():
            assert float((value - other[layer]).norm() / other[layer].norm()) < 1e-5


@each_family
@pytest.mark.parametrize("method", ["rome", "mose"])
def test_an_edit_makes_the_new_target_likelier(kind: str, method: str) -> None:
    model, tokenizer = tiny_model(kind)
    before = weights(model)
    editor = one_layer_editor(method)
    fact = EditRequest("1", "The capital of France is", "France", "Oslo")
    model, journal = edit(model, tokenizer, [fact], editor, corpus=TEXTS, corpus_tokens=4000)
    # Random models of four layers cannot be brought to say anything whatever; what counts is that it gets likelier.
    assert min(journal[0].p_value, journal[0].p_target) > first_guess(kind)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {Architecture(model)[layer].name for layer in journal[0].layers}


def first_guess(kind: str) -> float:
    """p(target) of the untouched model."""
    model, tokenizer = tiny_model(kind)
    ids = tokenizer("The capital of France is Oslo")["input_ids"]
    start = len(tokenizer("The capital of France is")["input_ids"])
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return float(sum(log_p[t - 1, ids[t]] for t in range(start, len(ids))).exp())


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_description_passes_the_check_of_those_that_users_give(kind: str, dtype: torch.dtype) -> None:
    assert len(Architecture(tiny_model(kind)[0].to(dtype), FAMILIES[kind])) == 4


@each_family
def test_the_finder_finds_what_is_described(kind: str) -> None:
    model, _ = tiny_model(kind)
    assert find_family(model) == FAMILIES[kind]
    assert not any(module._forward_hooks for module in model.modules())


def bloom() -> Any:
    return AutoModelForCausalLM.from_config(
        BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=12, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    )


def test_an_unknown_family_is_described_as_found_and_taken_when_confirmed() -> None:
    model = bloom()
    with pytest.raises(UnsupportedModelError, match="'bloom' are not described yet") as error:
        Architecture(model)
    said = re.search(
        r"confirm it: --model.family='\{blocks: (\S+), down_projection: (\S+), transposed: (\w+)\}'", str(error.value)
    )
    assert said
    family = Family(said[1], said[2], said[3] == "true")
    assert family == Family("transformer.h", "mlp.dense_4h_to_h")
    assert Architecture(model, family)[1].weight.shape == (16, 64)


class TwoMLPs(nn.Module):
    """Beside its own MLP a block's second one, that adds to it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.one, self.two = mlp, copy.deepcopy(mlp)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.one(hidden) + self.two(hidden)


def test_where_several_would_do_each_is_offered_as_an_option() -> None:
    model, _ = tiny_model("llama")
    model.config.model_type = "twofold"
    for block in model.model.layers:
        block.mlp = TwoMLPs(block.mlp)
    with pytest.raises(
        UnsupportedModelError, match=r"'twofold' are not described yet.*cannot be told: 2 would"
    ) as error:
        Architecture(model)
    options = re.findall(r"--model\.family='(\{.*?\})'", str(error.value))
    assert "lit_edit/architectures.py" not in str(error.value)
    families = [Family(**yaml.safe_load(option)) for option in options]
    assert families == [Family("model.layers", f"mlp.{one}.down_proj") for one in ("one", "two")]
    for family in families:
        assert Architecture(model, family)[1].weight.shape == (32, 32)


def test_a_model_that_cannot_be_run_is_refused_in_one_line() -> None:
    model, _ = tiny_model("llama")
    model.config.model_type = "own"

    def refuse(**_: Any) -> None:
        raise RuntimeError("no\nkernel")

    model.forward = refuse
    with pytest.raises(UnsupportedModelError, match=r"cannot be run on three tokens .*: no kernel"):
        Architecture(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_for_images_takes_as_much_text_as_its_text_part() -> None:
    model, tokenizer = tiny_model("gemma3")
    assert not hasattr(model.config, "max_position_embeddings")
    assert Prompter.of(model, tokenizer).max_length == 128
    modules = {"one": Architecture(model)[1].projection}
    with pytest.raises(StatisticsError, match="sequence_length is 129, the model takes 128 tokens at most"):
        collect(KeyCollector(modules), model, tokenizer, TEXTS, max_tokens=1000, sequence_length=129)


def test_a_mixture_of_experts_is_not_guessed_either() -> None:
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, vocab_size=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"mixture of 2 experts.*Take a dense model"):
        Architecture(AutoModelForCausalLM.from_config(config))
