"""Passes from the subject's last token on give what complete passes give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import make_workspace, requests
from torch import Tensor, nn

from lit_edit.editors.keys import MeanKey
from lit_edit.editors.values import ValueOptimizer, ValueProblem
from lit_edit.model.families import Layer
from lit_edit.model.hooks import change_outputs
from lit_edit.model.passes import (
    CannotCutError,
    CompletePasses,
    Known,
    New,
    Passes,
    Place,
    Site,
    Suffixes,
    cut,
    supported,
)
from lit_edit.model.workspace import Workspace


def rows_of(workspace: Workspace) -> Any:
    """Texts of different lengths with the changed token at different places, at the very first among them."""
    rows = [row for request in requests() for row in workspace.rewriting_rows(request)]
    rows += [workspace.essence_row(request) for request in requests()]
    return workspace.prompter.collate(rows, workspace.device)


def layers_of(workspace: Workspace) -> list[Layer]:
    return list(workspace.architecture.layers)


def blocks_of(workspace: Workspace) -> list[nn.Module]:
    return [layer.block for layer in layers_of(workspace)]


def shifts(passes: Passes, layers: list[int], delta: Tensor, rows: list[int] | None = None) -> list[tuple[Place, New]]:
    """Adds (layers, rows, d) to the outputs at the subject's last token of rows, of all if none are said."""
    rows = list(range(delta.shape[1])) if rows is None else rows

    def adding(shift: Tensor) -> New:
        return lambda out, which: out + shift[which].to(out.dtype)

    return [(place, adding(delta[i, rows])) for i, layer in enumerate(layers) for place in passes.places(layer, rows)]


def everything(workspace: Workspace, batch: Any, first: int) -> Suffixes:
    """All rows, all from one block on."""
    rows = range(len(batch.input_ids))
    return cut(workspace.model, layers_of(workspace), batch, [first])[0].select(rows, [first] * len(rows))


def both(
    workspace: Workspace, layers: list[int], chosen: list[int] | None = None, site: Site = "mlp"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits at every place from the changed token on, and their gradients: complete passes, then cut ones.

    The complete ones are the model's own, with the change written by a hook of this file.
    """
    batch, model, parts = rows_of(workspace), workspace.model, layers_of(workspace)
    kept = list(range(len(batch.input_ids))) if chosen is None else chosen
    suffixes = cut(model, parts, batch, layers[:1], site)[0].select(kept, [layers[0]] * len(kept))
    lengths = (batch.attention_mask.sum(1) - batch.subject_last)[kept]
    places = [(row, column) for row, n in enumerate(lengths.tolist()) for column in range(n)]
    rows, columns = torch.tensor(places).T
    delta = torch.randn(
        len(layers), len(kept), 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_(True)
    ids, mask, start = batch.input_ids[kept], batch.attention_mask[kept], batch.subject_last[kept]

    def adding(i: int) -> Callable[[Tensor], Tensor]:
        at = (torch.arange(len(kept)), start)
        return lambda out: out.index_put(at, out[at] + delta[i].to(out.dtype))

    modules = [parts[layer].block if site == "block" else parts[layer].projection for layer in layers]
    with change_outputs({module: adding(i) for i, module in enumerate(modules)}):
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    whole = whole[rows, start[rows] + columns]
    part = suffixes.logits(rows, columns, shifts(suffixes, layers, delta))
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = [torch.autograd.grad((x.double() * weights).sum(), delta)[0] for x in (whole, part)]
    return whole, part, gradients[0], gradients[1]


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_logits_and_gradients_are_those_of_a_complete_pass(tiny, first: int, dtype, accuracy: float) -> None:
    workspace = make_workspace(tiny, dtype=dtype)
    whole, part, g_whole, g_part = both(workspace, list(range(first, 4)))
    torch.testing.assert_close(part, whole, rtol=accuracy, atol=accuracy)
    torch.testing.assert_close(g_part, g_whole, rtol=accuracy, atol=accuracy)
    assert float(g_whole.abs().max()) > 1e-2


@pytest.mark.parametrize("layer", [2, 3])
def test_changes_of_whole_blocks_too(tiny, layer: int) -> None:
    workspace = make_workspace(tiny)
    whole, part, g_whole, g_part = both(workspace, [layer], site="block")
    torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(g_part, g_whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chosen", [[0], [13, 2], [3, 4, 5, 15]])
def test_a_selection_of_rows_gives_what_they_give_among_all(tiny, chosen: list[int]) -> None:
    workspace = make_workspace(tiny)
    whole, part, _, _ = both(workspace, [1], chosen)
    torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-10)


def test_eager_attention_too(tiny) -> None:
    workspace = make_workspace(tiny)
    workspace.model.set_attn_implementation("eager")  # Llama's takes the softmax in float32
    whole, part, _, _ = both(workspace, [1])
    torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was_whatever_happens(tiny) -> None:
    workspace = make_workspace(tiny)
    model, batch = workspace.model, rows_of(workspace)
    before = copy.deepcopy(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    suffixes = everything(workspace, batch, 2)
    at = torch.zeros(1, dtype=torch.long)

    def broken(_: Tensor, __: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        suffixes.logits(at, at, [(suffixes.places(3, [0])[0], broken)])
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    after = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_repeated_passes_do_not_add_to_what_was_kept(tiny) -> None:
    workspace = make_workspace(tiny)
    suffixes = everything(workspace, rows_of(workspace), 1)
    rows, columns = torch.arange(len(suffixes)), torch.zeros(len(suffixes), dtype=torch.long)
    first = suffixes.logits(rows, columns, [])
    torch.testing.assert_close(suffixes.logits(rows, columns, []), first, rtol=0, atol=0)


def test_blocks_that_return_tuples_are_answered_with_tuples(tiny) -> None:
    workspace = make_workspace(tiny)

    class InTuple(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return (self.block(*args, **kwargs), "more")

    body = workspace.model.base_model
    body_forward = body.forward
    name = "h" if hasattr(body, "h") else "layers"
    for i, block in enumerate(getattr(body, name)):
        getattr(body, name)[i] = InTuple(block)

    # A body of the older kind takes the first entry of what its blocks return.
    class First:
        def __init__(self, block: nn.Module) -> None:
            self.block = block

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.block(*args, **kwargs)[0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        blocks = list(getattr(body, name))
        handles = [
            b.register_forward_hook(lambda _, __, out: out[0] if isinstance(out, tuple) else out) for b in blocks
        ]
        try:
            return body_forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    body.forward = forward
    layers = [replace(layer, block=getattr(body, name)[i]) for i, layer in enumerate(layers_of(workspace))]
    batch = rows_of(workspace)
    plain = workspace.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    for first in (1, 3):
        chosen = range(len(batch.input_ids))
        suffixes = cut(workspace.model, layers, batch, [first])[0].select(chosen, [first] * len(chosen))
        assert suffixes.tuples
        rows, columns = torch.arange(len(suffixes)), torch.zeros(len(suffixes), dtype=torch.long)
        part = suffixes.logits(rows, columns, [])
        torch.testing.assert_close(part, plain[rows, batch.subject_last], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 40},
        {"layer_types": ["linear_attention"]},
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"sliding_window": 40},
        {"alibi": True},
    ],
)
def test_what_cannot_be_cut_is_said_so(tiny, changes: dict[str, Any]) -> None:
    model, blocks = tiny[0], [nn.Identity()]
    assert supported(model, blocks, 40)
    settings = {"_attn_implementation": "sdpa", "layer_types": None, "sliding_window": None, "alibi": False} | changes
    other = SimpleNamespace(config=SimpleNamespace(**settings), get_output_embeddings=model.get_output_embeddings)
    assert not supported(other, blocks, 40)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 41},
        {"layer_types": ["full_attention"], "sliding_window": 8},  # which no layer has
        {"sliding_window": 4096},
    ],
)
def test_windows_that_no_text_fills_do_no_harm(tiny, changes: dict[str, Any]) -> None:
    settings = {"_attn_implementation": "sdpa", "layer_types": None, "sliding_window": None} | changes
    other = SimpleNamespace(config=SimpleNamespace(**settings), get_output_embeddings=tiny[0].get_output_embeddings)
    assert supported(other, [nn.Identity()], 40)  # type: ignore[arg-type]


def test_a_model_that_does_not_bear_it_is_found_out(tiny) -> None:
    workspace = make_workspace(tiny)
    blocks = blocks_of(workspace)

    def nearer(_: nn.Module, args: Any, output: Any) -> Any:
        """What a bias by the distance to the first token of a pass does, which is another one in a cut pass."""
        state = output[0] if isinstance(output, tuple) else output
        moved = state * torch.linspace(1, 2, state.shape[1], dtype=state.dtype)[:, None]
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    for block in blocks:
        block.register_forward_hook(nearer)
    with pytest.raises(CannotCutError, match="optimised on complete passes"):
        cut(workspace.model, layers_of(workspace), rows_of(workspace), [1])
    values = ValueOptimizer(steps=1)
    problems = [ValueProblem(0, (1,))]
    with pytest.warns(UserWarning, match="optimised on complete passes"):
        found = values.optimise(workspace, requests(), problems, MeanKey())
    again = values.optimise(workspace, requests(), problems, MeanKey())  # without a warning
    complete = ValueOptimizer(steps=1, complete_passes=True).optimise(workspace, requests(), problems, MeanKey())
    for other in (again, complete):
        torch.testing.assert_close(other.targets[0][1], found.targets[0][1], rtol=0, atol=0)


@pytest.mark.parametrize("chosen", [list(range(16)), [5, 1, 1]])
def test_complete_passes_read_the_same_places(tiny, chosen: list[int]) -> None:
    workspace = make_workspace(tiny)
    batch, layers = rows_of(workspace), layers_of(workspace)
    found = []
    for passes in (CompletePasses(workspace.model, layers, batch), cut(workspace.model, layers, batch, [2])[0]):
        taken = passes.select(chosen, [2] * len(chosen))
        rows = torch.arange(len(chosen))
        delta = torch.ones(1, len(rows), 32, dtype=torch.float64)
        found.append(taken.logits(rows, torch.zeros_like(rows), shifts(taken, [2], delta)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 1, 3, 0], [3, 3, 2], [1, 1], [3, 0]])
def test_rows_join_at_their_own_blocks(tiny, order: list[int], arrives: bool, site: Site) -> None:
    """Each row is changed from its own block on; what comes out is what each gives alone in a complete pass.

    Also where rows join some blocks in front and others behind.
    """
    workspace = make_workspace(tiny)
    batch, layers, model = rows_of(workspace), layers_of(workspace), workspace.model
    known = Known() if arrives else Known(arrives={0: True, 1: False, 2: True, 3: False})
    chosen = [(5 * i) % len(batch.input_ids) for i in range(len(order))]
    delta = torch.randn(4, len(order), 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    delta.requires_grad_(True)
    results = []
    for passes in (CompletePasses(model, layers, batch, site), cut(model, layers, batch, order, site, known)[0]):
        taken = passes.select(chosen, order)
        changes = []
        for layer in range(4):
            mine = [i for i, first in enumerate(order) if first <= layer]
            changes += shifts(taken, [layer], delta[layer : layer + 1], mine)
        rows = torch.arange(len(order))
        logits = taken.logits(rows.repeat(2), torch.cat([torch.zeros_like(rows), torch.ones_like(rows)]), changes)
        results.append((logits, torch.autograd.grad(logits.square().sum(), delta)[0]))
    for cut_, whole in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(cut_, whole, rtol=1e-9, atol=1e-9)


def test_values_in_place_of_outputs_are_set_behind_the_block_too(tiny) -> None:
    """What replaces an output is worth the difference to what the projection would have put out."""
    workspace = make_workspace(tiny)
    batch, layers = rows_of(workspace), layers_of(workspace)
    rows, found = torch.arange(len(batch.input_ids)), []
    value = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for passes in (CompletePasses(workspace.model, layers, batch), cut(workspace.model, layers, batch, [1])[0]):
        taken = passes.select(rows.tolist(), [1] * len(rows))
        changes = [(place, lambda out, _: value.expand_as(out)) for place in taken.places(1, rows.tolist())]
        found.append(taken.logits(rows, torch.zeros_like(rows), changes))
    assert isinstance(taken, Suffixes)
    assert taken.behind == {1}
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_blocks_run_only_the_rows_that_take_part(tiny) -> None:
    """From the block behind the first one that is changed."""
    workspace = make_workspace(tiny)
    batch, layers, model = rows_of(workspace), layers_of(workspace), workspace.model
    taken = cut(model, layers, batch, [0, 1, 2])[0].select([0, 1, 2, 3, 4], [2, 0, 1, 0, 2])
    seen: list[tuple[int, int]] = []
    handles = [
        part.projection.register_forward_pre_hook(lambda _, args, i=i: seen.append((i, args[0].shape[0])))
        for i, part in enumerate(layers)
    ]
    taken.logits(torch.arange(5), torch.zeros(5, dtype=torch.long), [])
    for handle in handles:
        handle.remove()
    assert seen == [(1, 2), (2, 3), (3, 5)]


def test_a_row_cannot_be_changed_below_its_first_block(tiny) -> None:
    workspace = make_workspace(tiny)
    taken = cut(workspace.model, layers_of(workspace), rows_of(workspace), [2])[0].select([0], [2])
    with pytest.raises(ValueError, match="changed from block 2 on cannot be in 1"):
        taken.places(1, [0])


class NormBehind(nn.Module):
    """An MLP with a norm behind it, as Gemma's have: what is added in it does not arrive as it is."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.inner(hidden)
        return 3 * nn.functional.normalize(out, dim=-1)


def test_whether_a_change_arrives_is_found_out_by_trying() -> None:
    model, tokenizer = tiny_model("llama")
    workspace = Workspace.of(model.double().requires_grad_(False), tokenizer, ["{}", "Indeed. {}"])
    workspace.model.model.layers[2].mlp = NormBehind(workspace.model.model.layers[2].mlp)
    known, batch, layers = Known(), rows_of(workspace), layers_of(workspace)
    found = cut(workspace.model, layers, batch, [1, 2, 3], known=known)[0]
    assert known.arrives == {1: True, 2: False, 3: True}
    assert found.behind == {1, 3}
    whole, part, g_whole, g_part = both(workspace, [2, 3])
    torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(g_part, g_whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("site", ["mlp", "block"])
def test_hooks_of_others_on_blocks_do_their_work_once(tiny, site: Site) -> None:
    """Such as those that steer a model: also where rows bring along what a block put out."""
    workspace = make_workspace(tiny)
    parts = layers_of(workspace)

    def steer(_: nn.Module, __: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        return (state + 0.5, *output[1:]) if isinstance(output, tuple) else state + 0.5

    handles = [part.block.register_forward_hook(steer) for part in parts[1:3]]
    whole, part, g_whole, g_part = both(workspace, [1, 3] if site == "mlp" else [1], site=site)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(g_part, g_whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_hide_it(dtype: torch.dtype) -> None:
    model, tokenizer = tiny_model("llama")
    workspace = Workspace.of(model.to(dtype).requires_grad_(False), tokenizer, ["{}"])
    workspace.model.model.layers[2].mlp = NormBehind(workspace.model.model.layers[2].mlp)
    known = Known()
    cut(workspace.model, layers_of(workspace), rows_of(workspace), [1, 2], known=known)
    assert known.arrives == {1: True, 2: False}


def test_one_complete_pass_serves_all_blocks_and_what_is_known_is_not_tried_again(tiny) -> None:
    workspace = make_workspace(tiny)
    batch, layers, known = rows_of(workspace), layers_of(workspace), Known()
    ran: list[int] = []
    handle = workspace.model.get_input_embeddings().register_forward_hook(lambda _, __, out: ran.append(len(out)))
    cut(workspace.model, layers, batch, [0, 1, 3], known=known)
    # One row for each block to see what arrives; and two to compare, which join at the first block and at the last.
    assert ran == [len(batch.input_ids), 1, 1, 1, 2]
    ran.clear()
    cut(workspace.model, layers, batch, [0, 1, 3], known=known)
    assert ran == [len(batch.input_ids)]
    ran.clear()
    known.checked[3] = 1  # of a shorter text
    cut(workspace.model, layers, batch, [0, 1, 3], known=known)
    assert ran == [len(batch.input_ids), 1]
    handle.remove()


def test_logits_before_any_change_come_from_the_same_pass(tiny) -> None:
    workspace = make_workspace(tiny)
    batch, read = rows_of(workspace), torch.tensor([3, 0])
    _, logits = cut(workspace.model, layers_of(workspace), batch, [1], read=read)
    plain = workspace.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    torch.testing.assert_close(logits, plain[read, batch.attention_mask.sum(1)[read] - 1], rtol=1e-10, atol=1e-10)
