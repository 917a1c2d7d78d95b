from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.references import hooks_left, make_workspace, matrix_of, projection_of
from torch import Tensor, nn

from lit_edit.model.hooks import change_outputs, read_inputs, read_outputs

IDS = torch.tensor([[5, 6, 7, 8]])


class Pair(nn.Module):
    """Returns its input and a second thing, as blocks of some versions do."""

    def forward(self, x: Tensor) -> tuple[Tensor, str, int]:
        return x, "rest", 3


@torch.no_grad()
def test_inputs_read_are_those_the_projections_worked_on(tiny) -> None:
    workspace = make_workspace(tiny)
    modules = {layer: projection_of(workspace.model, layer) for layer in (0, 2, 3)}
    outputs: dict[int, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, layer=layer: outputs.update({layer: out}))
        for layer, module in modules.items()
    ]
    with read_inputs(modules) as seen:
        workspace.model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    assert set(seen) == {0, 2, 3}
    for layer, module in modules.items():
        bias = getattr(module, "bias", None)
        expected = seen[layer] @ matrix_of(workspace.model, layer).T + (0 if bias is None else bias)
        torch.testing.assert_close(outputs[layer], expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_latest_input_counts(tiny) -> None:
    model = make_workspace(tiny).model
    with read_inputs({1: projection_of(model, 1)}) as seen:
        model(input_ids=IDS)
        first = seen[1]
        model(input_ids=IDS.flip(1))
        second = seen[1]
        model(input_ids=IDS)
    assert not torch.equal(first, second)
    torch.testing.assert_close(seen[1], first, rtol=0, atol=0)


@torch.no_grad()
def test_a_changed_output_is_what_the_rest_of_the_model_sees(tiny) -> None:
    model = make_workspace(tiny).model
    module, bump = projection_of(model, 1), torch.linspace(-1, 1, 32, dtype=torch.float64)
    plain = model(input_ids=IDS).logits
    with change_outputs({module: lambda out: out + bump}):
        shifted = model(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, plain, rtol=0, atol=0)
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros(32, dtype=torch.float64))
    module.bias.add_(bump)
    torch.testing.assert_close(model(input_ids=IDS).logits, shifted, rtol=1e-9, atol=1e-9)
    assert (shifted - plain).abs().max() > 1e-3


def test_the_rest_of_a_tuple_is_kept() -> None:
    module, x = Pair(), torch.ones(2)
    with change_outputs({module: lambda out: out * 5}):
        changed, *rest = module(x)
    assert rest == ["rest", 3]
    assert changed.tolist() == [5.0, 5.0]
    assert module(x)[0] is x


def fail(_: Tensor) -> Tensor:
    raise KeyError("on purpose")


def test_hooks_are_removed_after_the_body_fails(tiny) -> None:
    model = tiny[0]
    projection = projection_of(model, 0)
    for tap in (read_inputs({0: projection}), change_outputs({projection: torch.neg})):
        with pytest.raises(KeyError, match="on purpose"), tap:  # noqa: PT012 - the hooks have to be counted inside
            assert hooks_left(model) == 1
            fail(IDS)
        assert hooks_left(model) == 0


def test_hooks_are_removed_after_a_change_fails(tiny) -> None:
    model = tiny[0]
    changes: dict[nn.Module, Callable[[Tensor], Tensor]] = {
        projection_of(model, 0): torch.neg,
        projection_of(model, 1): fail,
    }
    with pytest.raises(KeyError, match="on purpose"), change_outputs(changes):
        model(input_ids=IDS)
    assert hooks_left(model) == 0


def test_hooks_are_removed_when_one_cannot_be_set(tiny) -> None:
    model = tiny[0]
    projection = projection_of(model, 0)
    with pytest.raises(AttributeError), read_inputs({0: projection, 1: None}):  # type: ignore[dict-item]
        pass
    with pytest.raises(AttributeError), change_outputs({projection: torch.neg, None: torch.neg}):  # type: ignore[dict-item]
        pass
    assert hooks_left(model) == 0


def test_gradients_flow_through_a_change(tiny) -> None:
    model = make_workspace(tiny).model
    shift = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    with change_outputs({projection_of(model, 1): lambda out: out + shift}):
        loss = model(input_ids=IDS).logits.square().sum()
    loss.backward()
    # The same derivative with respect to a bias of the projection.
    module = projection_of(model, 1)
    start = torch.zeros(32, dtype=torch.float64) if module.bias is None else module.bias.detach()
    module.bias = nn.Parameter(start)
    model(input_ids=IDS).logits.square().sum().backward()
    torch.testing.assert_close(shift.grad, module.bias.grad, rtol=1e-6, atol=1e-6)
    assert module.bias.grad.norm() > 0


def test_a_pass_ends_with_the_last_module_that_is_read(tiny) -> None:
    workspace = make_workspace(tiny)
    model, parts = workspace.model, workspace.architecture.layers
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    ran: list[int] = []
    handles = [part.block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, part in enumerate(parts)]
    with torch.no_grad():
        with read_inputs({0: parts[0].projection, 1: parts[1].projection}, 2, stop=True) as inputs:
            model(input_ids=ids)
        assert ran == [0]
        with read_outputs({1: parts[1].block, 2: parts[2].block}, 2) as outputs:
            model(input_ids=ids)
        assert ran[1:] in ([0, 1], [0, 1, 2])  # what is counted behind the hook that ends the pass is not
        with read_inputs({0: parts[0].projection, 1: parts[1].projection}) as whole:
            model(input_ids=ids)
        for key, found in whole.items():
            torch.testing.assert_close(inputs[key], found, rtol=0, atol=0)
        seen = []
        last = parts[2].block.register_forward_hook(lambda _, __, o: seen.append(o[0] if isinstance(o, tuple) else o))
        model(input_ids=ids)
    torch.testing.assert_close(outputs[2], seen[0], rtol=0, atol=0)
    for handle in [*handles, last]:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_errors_in_a_pass_are_not_swallowed(tiny) -> None:
    parts = make_workspace(tiny).architecture.layers
    for tap in (read_inputs({0: parts[3].projection}, stop=True), read_outputs({0: parts[3].block})):
        with pytest.raises(KeyError, match="mine"), tap:
            raise KeyError("mine")
