from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.references import CONTEXTS, hooks_left, make_workspace, reference_keys, requests

from lit_edit.algebra.updates import Additive
from lit_edit.editors.keys import KeyAverage, MeanKey, TypeMeanKey, compute_keys
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

WEIGHTS = {
    MeanKey: {1: [1.0], 2: [1 / 2, 1 / 2], 3: [1 / 3, 1 / 3, 1 / 3]},
    TypeMeanKey: {1: [1.0], 2: [1 / 2, 1 / 2], 3: [1 / 2, 1 / 4, 1 / 4]},
}


@pytest.mark.parametrize("average", [MeanKey, TypeMeanKey])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_keys_are_those_of_each_context_read_on_its_own(tiny, average: type[KeyAverage], n: int) -> None:
    workspace = make_workspace(tiny, CONTEXTS[:n])
    layers = [3, 0, 2]
    found = compute_keys(workspace, requests(), layers, average())
    assert set(found) == set(layers)
    share = torch.tensor(WEIGHTS[average][n], dtype=torch.float64)
    for layer in layers:
        expected = torch.stack([share @ reference_keys(workspace, r, layer) for r in requests()], dim=1)
        torch.testing.assert_close(found[layer].double(), expected, rtol=1e-5, atol=1e-6)
    assert hooks_left(workspace.model) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_company_do_not_matter(tiny, side: str) -> None:
    workspace = make_workspace(tiny)
    workspace.tokenizer.padding_side = side
    together = compute_keys(workspace, requests(), [1], MeanKey())[1]
    for i, request in enumerate(requests()):
        alone = compute_keys(workspace, [request], [1], MeanKey())[1]
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-6, atol=1e-7)


def test_a_context_too_long_for_the_model_is_left_out_of_the_mean(tiny) -> None:
    workspace = make_workspace(tiny, ["{}", "Zz " * 60 + ". {}", CONTEXTS[1]])
    short = make_workspace(tiny, ["{}", CONTEXTS[1]])
    request = requests()[0]
    assert len(workspace.rewriting_rows(request)) == 2
    found, expected = (compute_keys(w, [request], [1], MeanKey())[1] for w in (workspace, short))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("average", [MeanKey(), TypeMeanKey()])
def test_the_mean_of_equal_keys_is_the_key(average: KeyAverage) -> None:
    key = torch.arange(5.0)
    for n in (1, 2, 7):
        torch.testing.assert_close(average.average(key.expand(n, 5)), key)


def test_the_bare_prompt_weighs_one_half_whatever_the_number_of_contexts() -> None:
    for n in (2, 3, 11):
        keys = torch.eye(n)
        assert TypeMeanKey().average(keys)[0] == 0.5
        assert TypeMeanKey().average(keys).sum() == pytest.approx(1.0)
        torch.testing.assert_close(MeanKey().average(keys), torch.full((n,), 1 / n))


def test_keys_are_computed_once_until_a_weight_or_the_contexts_change(tiny) -> None:
    workspace, average = make_workspace(tiny), MeanKey()
    ran: list[int] = []
    embeddings = workspace.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, args, __: ran.append(len(args[0])))

    def computed(*asked: Any) -> int:
        before = len(ran)
        found = compute_keys(workspace, *asked)
        fresh = Workspace.of(workspace.model, workspace.tokenizer, workspace.contexts)
        count = len(ran) - before
        for layer, keys in compute_keys(fresh, *asked).items():
            torch.testing.assert_close(found[layer], keys, rtol=1e-6, atol=1e-7)
        return count

    assert computed(requests(), [0, 1, 3], average) == 1
    assert computed(requests(), [3, 1], average) == 0
    assert computed(requests()[2:0:-1], [1], average) == 0
    assert computed(requests(), [2], average) == 1  # another layer
    assert computed(requests(), [1], TypeMeanKey()) == 1  # another mean
    other = [EditRequest("x", "Somebody else is not", "Somebody else", "Oslo")]
    assert computed(other, [1], average) == 1
    workspace.site(0).write(Additive(torch.full(workspace.site(0).shape, 1e-3)))
    assert computed(requests(), [1], average) == 1  # another weight
    workspace.contexts = [*workspace.contexts, "Truly. {}"]
    assert computed(requests(), [1], average) == 1  # other contexts
    workspace.keys.clear()
    assert computed(requests(), [1], average) == 1
    handle.remove()
