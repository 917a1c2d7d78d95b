"""MEND: factors and edits against plain autograd, the training of its hyper-network, and its file."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import REPOSITORY
from helpers.references import changed, hooks_left, make_workspace, matrix_of, projection_of, requests, tokens, weights
from helpers.runs import asked, write_facts
from torch import Tensor

from lit_edit import load_model
from lit_edit.editors import MEND
from lit_edit.editors.mend.network import (
    FILE_NAME,
    FORMAT_VERSION,
    HyperNetwork,
    HyperNetworkError,
    TokenFactors,
    gradient_factors,
)
from lit_edit.editors.mend.training import MendTraining, _parser, gather_statistics, main, train
from lit_edit.files import load_tensors, save_tensors
from lit_edit.model.trial import edit_batch
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest, Probe
from lit_edit.session import EditSession, Preparation

LAYERS = [1, 2]
families = pytest.mark.parametrize("family", ["gpt2", "llama"], indirect=True)


def new_network(workspace: Workspace, rank: int = 8, edit_lr: float = 1e-2, random_up: bool = False) -> HyperNetwork:
    """A fresh network in the model's precision; with ``random_up`` one that is not the identity."""
    torch.manual_seed(3)
    parts = [workspace.architecture[layer] for layer in LAYERS]
    network = HyperNetwork({part.index: tuple(part.weight.shape) for part in parts}, rank, edit_lr=edit_lr)
    if random_up:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name != "edit_lr":
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            network.edit_lr.mul_(torch.tensor([1.0, -0.5]))
    return network.to(workspace.architecture[0].weight.dtype)


def saved(network: HyperNetwork, workspace: Workspace, folder: Path) -> MEND:
    network.save(folder, workspace.model)
    return MEND(str(folder))


def plain_gradients(workspace: Workspace, batch: list[EditRequest]) -> dict[int, Tensor]:
    """∂/∂W (d, p) of the summed loss, one text at a time, on a copy whose weights are ordinary parameters."""
    model: Any = copy.deepcopy(workspace.model)
    free = {layer: projection_of(model, layer).weight.requires_grad_(True) for layer in LAYERS}
    for request in batch:
        ids, start, _ = tokens(workspace.tokenizer, "", request)
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        (-torch.stack([log_p[t - 1, ids[t]] for t in range(start, len(ids))]).mean()).backward()
    transposed = model.config.model_type == "gpt2"
    return {layer: (w.grad.T if transposed else w.grad) for layer, w in free.items()}


# The gradient and its factors


@families
@pytest.mark.parametrize("size", [1, 10])
def test_the_factors_make_up_the_gradient(tiny, size: int) -> None:
    workspace, batch = make_workspace(tiny), [*asked(6), *requests()][-size:]
    workspace.model.requires_grad_(True)
    before = weights(workspace.model)
    found = gradient_factors(workspace, LAYERS, edit_batch(workspace, batch))
    for layer, wanted in plain_gradients(workspace, batch).items():
        gradient = torch.einsum("rtd,rtp->dp", found[layer].delta, found[layer].u)
        assert float(wanted.norm()) > 0
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    assert changed(before, workspace.model) == set()
    assert all(p.grad is None for p in workspace.model.parameters())
    assert hooks_left(workspace.model) == 0


@families
def test_an_untrained_network_takes_a_step_of_plain_gradient_descent(tiny, tmp_path: Path) -> None:
    workspace, batch = make_workspace(tiny), requests()
    network = new_network(workspace)
    with torch.no_grad():
        network.edit_lr.copy_(torch.tensor([0.25, 0.125]))  # exact in every precision
    editor = saved(network, workspace, tmp_path)
    gradients = plain_gradients(workspace, batch)
    old = {layer: matrix_of(workspace.model, layer) for layer in LAYERS}
    editor.apply(workspace, editor.plan(workspace, batch))
    for layer, rate in zip(LAYERS, (0.25, 0.125), strict=True):
        wanted = old[layer] - rate * gradients[layer]
        torch.testing.assert_close(matrix_of(workspace.model, layer), wanted, rtol=1e-9, atol=1e-12)


@families
@torch.no_grad()
def test_the_formula_token_by_token(tiny, tmp_path: Path) -> None:
    workspace, batch = make_workspace(tiny), requests()
    editor = saved(new_network(workspace, random_up=True), workspace, tmp_path)
    state = {name: tensor.double() for name, tensor in editor.network.state_dict().items()}
    with torch.enable_grad():
        plan = editor.plan(workspace, batch)
    old = {layer: matrix_of(workspace.model, layer) for layer in LAYERS}
    factors = gradient_factors(workspace, LAYERS, edit_batch(workspace, batch))
    editor.apply(workspace, plan)
    for mode, layer in enumerate(LAYERS):
        change = torch.zeros_like(old[layer])
        d, p = change.shape
        for u, delta in zip(*(part.flatten(0, 1) for part in factors[layer]), strict=True):
            if not delta.any():
                continue
            z = torch.cat([u, delta])
            for step in (0, 1):
                at = f"networks.{d}x{p}.{step}."
                inner = state[at + "up"] @ (state[at + "down"] @ z) + state[at + "bias"]
                z = z + (state[at + "scale"][mode] * inner + state[at + "offset"][mode]).clamp(min=0)
            change -= state["edit_lr"][mode] * torch.outer(z[p:], z[:p])
        torch.testing.assert_close(matrix_of(workspace.model, layer) - old[layer], change, rtol=1e-8, atol=1e-12)


@families
def test_a_batch_is_the_sum_of_its_requests(tiny, tmp_path: Path) -> None:
    workspace = make_workspace(tiny)
    editor = saved(new_network(workspace, random_up=True), workspace, tmp_path)
    whole = editor.plan(workspace, requests()).data
    single = [editor.plan(workspace, [request]).data for request in requests()]
    for layer in LAYERS:
        total = sum(change[layer].left @ change[layer].right for change in single)
        torch.testing.assert_close(whole[layer].left @ whole[layer].right, total, rtol=1e-9, atol=1e-12)


@families
def test_the_plan_says_what_the_edited_model_then_does_and_changes_nothing(tiny, tmp_path: Path) -> None:
    workspace = make_workspace(tiny)
    editor = saved(new_network(workspace, edit_lr=0.05), workspace, tmp_path)
    before = weights(workspace.model)
    start = editor.plan(workspace, requests())
    assert changed(before, workspace.model) == set()
    assert start.layers == [(1, 2)] * 4
    assert start.steps == [1] * 4
    editor.apply(workspace, start)
    assert changed(before, workspace.model) == {workspace.architecture[layer].name for layer in LAYERS}
    with torch.no_grad():
        editor.network.edit_lr.zero_()
    after = editor.plan(workspace, requests())  # a change of nothing
    assert after.loss == pytest.approx(start.loss, rel=1e-8)
    assert after.probability == pytest.approx(start.probability, rel=1e-7)
    assert hooks_left(workspace.model) == 0


@families
def test_statistics_bring_every_feature_to_mean_zero_and_spread_one(tiny) -> None:
    workspace = make_workspace(tiny)
    network, batch = new_network(workspace), asked(6)
    gather_statistics(workspace, network, batch, batch_size=4)
    factors = gradient_factors(workspace, LAYERS, edit_batch(workspace, batch))
    for layer, found in factors.items():
        left, right = network.step(layer, found)
        delta = left.mT[found.counts] / -network.edit_lr[LAYERS.index(layer)]
        for part in (delta.detach(), right[found.counts].detach()):
            torch.testing.assert_close(part.mean(0), torch.zeros_like(part[0]), rtol=0, atol=1e-6)
            torch.testing.assert_close(part.std(0), torch.ones_like(part[0]), rtol=0, atol=1e-6)


def test_a_feature_that_never_varied_does_not_outweigh_the_others() -> None:
    network = HyperNetwork({0: (2, 3)}, rank=1)
    u = torch.tensor([[[1.0, 0.0, 0.5], [-1.0, 0.0, 1.5], [9.0, 9.0, 9.0]]])
    delta = torch.tensor([[[1.0, 2.0], [2.0, 1.0], [0.0, 0.0]]])  # the last token does not count
    network.gather({0: TokenFactors(u, delta)})
    spread = network.get_buffer("spread_0")
    mean = (2**0.5 + 0 + 0.5**0.5) / 3
    torch.testing.assert_close(spread, torch.tensor([2**0.5, 0.01 * mean, 0.5**0.5, 0.5**0.5, 0.5**0.5]))
    with pytest.raises(ValueError, match="layer 0 need at least two tokens"):
        network.gather({0: TokenFactors(u[:, 2:], delta[:, 2:])})


# Training


@families
def test_training_losses_are_those_of_single_edits_with_written_weights(tiny) -> None:
    workspace, batch = make_workspace(tiny), asked(4)
    for request in batch:  # one prompt each, so that there is nothing to choose
        object.__setattr__(request, "probes", (Probe("generalization", request.prompt), *request.probes_of("locality")))
    network = new_network(workspace, random_up=True)
    edit, kl = MendTraining(workspace, network).losses(batch, random.Random(0))
    edits, kls = [], []
    for request in batch:
        model: Any = copy.deepcopy(workspace.model)
        factors = gradient_factors(workspace, LAYERS, edit_batch(workspace, [request]))
        ids, start, _ = tokens(workspace.tokenizer, "", request)
        probe = request.probes_of("locality")[0]
        far = workspace.tokenizer(f"{probe.prompt} {probe.target}")["input_ids"]
        begin = len(workspace.tokenizer(probe.prompt)["input_ids"])
        with torch.no_grad():
            p = model(input_ids=torch.tensor([far])).logits[0, begin - 1 : -1].log_softmax(-1)
            for layer, found in factors.items():
                left, right = network.step(layer, found)
                change = left[0] @ right[0]
                projection_of(model, layer).weight += change.T if model.config.model_type == "gpt2" else change
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            edits.append(-sum(log_p[t - 1, ids[t]] for t in range(start, len(ids))) / (len(ids) - start))
            q = model(input_ids=torch.tensor([far])).logits[0, begin - 1 : -1].log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(edit.detach(), torch.stack(edits).mean().to(edit.dtype), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kl.detach(), torch.cat(kls).mean().to(kl.dtype), rtol=1e-4, atol=1e-7)


@families
def test_training_lowers_the_loss_and_leaves_the_model_alone(tiny) -> None:
    workspace, batch = make_workspace(tiny, dtype=torch.float32), asked(7)
    before, state = weights(workspace.model), torch.random.get_rng_state()

    def loss(network: HyperNetwork) -> float:
        module = MendTraining(workspace, network)
        with torch.no_grad():
            values = [module.losses(batch, random.Random(seed)) for seed in range(3)]
        return sum(float(0.1 * edit + kl) for edit, kl in values)

    start = train(workspace, batch, LAYERS, rank=4, steps=1, batch_size=4, lr=1e-9, lr_lr=1e-9, edit_lr=1e-3)
    settings: dict[str, Any] = {"rank": 4, "steps": 20, "batch_size": 4, "lr": 1e-2, "lr_lr": 1e-3, "edit_lr": 1e-3}
    done = train(workspace, batch, LAYERS, **settings)
    assert loss(done) < loss(start) - 0.01  # a random model has little to give
    assert changed(before, workspace.model) == set()
    assert all(p.grad is None and not p.requires_grad for p in workspace.model.parameters())
    assert hooks_left(workspace.model) == 0
    assert not torch.equal(done.edit_lr, start.edit_lr)
    again = train(workspace, batch, LAYERS, **settings)
    for name, tensor in done.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_hidden_layers_and_the_longest_gradient_are_what_is_asked_for(tiny) -> None:
    workspace, batch = make_workspace(tiny, dtype=torch.float32), asked(3)

    def moved(hidden: int, **settings: float) -> float:
        network = train(workspace, batch, LAYERS, rank=4, steps=1, batch_size=2, lr_lr=1e-3, hidden=hidden, **settings)
        assert network.hidden == hidden
        assert [len(steps) for steps in network.networks.values()] == [hidden + 1]  # type: ignore[arg-type]
        return float((network.edit_lr - 1e-4).norm())

    free = moved(1)
    # Adam divides a gradient by its own length plus 1e-8, so that only a far shorter one shows.
    assert moved(1, clip=1e-12) < 0.01 * free
    assert moved(0, clip=1e6) == pytest.approx(moved(0), rel=1e-3)
    with pytest.raises(ValueError, match="needs a clip > 0 for its gradients, not 0; 100 is published"):
        moved(1, clip=0)


def test_the_card_trains_with_the_published_constants() -> None:
    card = (REPOSITORY / "docs" / "methods" / "mend.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split()[3:] for line in card.splitlines() if "python -m lit_edit.editors.mend.training --" in line]
    given = {settings.model: settings for settings in map(_parser().parse_args, lines)}
    assert set(given) == {"embedded", "openai-community/gpt2-xl", "meta-llama/Meta-Llama-3-8B"}
    published = {"rank": 1920, "hidden": 1, "lr": 1e-6, "lr_lr": 1e-4, "edit_lr": 1e-4, "edit_weight": 0.1, "clip": 100}
    published |= {"batch_size": 10, "steps": 10_000}
    layers = {"openai-community/gpt2-xl": [45, 46, 47], "meta-llama/Meta-Llama-3-8B": [29, 30, 31]}
    for model, wanted in layers.items():
        assert {name: getattr(given[model], name) for name in published} == published
        assert given[model].layers == wanted


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_request_without_a_locality_prompt_cannot_be_trained_on(tiny) -> None:
    workspace = make_workspace(tiny)
    with pytest.raises(ValueError, match=r"facts.json, record 2: has no locality prompt"):
        MendTraining(workspace, new_network(workspace)).losses(
            [EditRequest("2", "Maria works in", "Maria", "Rome", source="facts.json, record 2")], random.Random(0)
        )


def test_the_command_trains_saves_and_scores(tmp_path: Path, tiny_folder, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mend"
    model = str(tiny_folder("llama"))
    given = [
        "--model",
        model,
        "--data",
        str(write_facts(tmp_path)),
        "--offset",
        "1",
        "--held-out",
        "2",
        "--out",
        str(out),
    ]
    main([*given, "--layers", "1", "3", "--rank", "4", "--steps", "2", "--batch-size", "2"])
    said = capsys.readouterr().out
    assert "2 held-out single edits: reliability " in said
    assert "locality " in said
    editor = MEND(str(out))
    assert editor.network.layers == [1, 3]
    training = editor.header["figures"]["training"]
    assert (training["requests"], training["hidden"], training["clip"]) == (3, 1, 100)
    assert {"reliability", "generalization", "locality"} <= set(editor.header["figures"]["held_out"])
    loaded, tokenizer = load_model(model)
    session = EditSession(loaded, tokenizer, editor, Preparation(corpus=[]))
    session.check(asked(2), 2)
    (first, second) = session.apply(session.plan(asked(2)))
    assert first.layers == second.layers == [1, 3]


# The file


@families
def test_a_saved_network_edits_as_it_did(tiny, tmp_path: Path) -> None:
    workspace = make_workspace(tiny, dtype=torch.float32)
    network = new_network(workspace, random_up=True)
    gather_statistics(workspace, network, asked(4))
    first = saved(network, workspace, tmp_path / "one")
    second = saved(first.network, workspace, tmp_path / "two")  # half precision rounds once
    by_file = MEND(str(tmp_path / "two" / FILE_NAME))
    found = [editor.plan(workspace, requests()).data for editor in (first, second, by_file)]
    exact = {
        layer: network.step(layer, f)
        for layer, f in gradient_factors(workspace, LAYERS, edit_batch(workspace, requests())).items()
    }
    for layer in LAYERS:
        for other in found[1:]:
            assert torch.equal(other[layer].left, found[0][layer].left)
            assert torch.equal(other[layer].right, found[0][layer].right)
        wanted = torch.einsum("rdt,rtp->dp", *exact[layer]).detach()
        got = found[0][layer].left @ found[0][layer].right
        assert float((got - wanted).norm() / wanted.norm()) < 5e-3


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_another_model_is_refused_and_told_what_to_do(tiny, tmp_path: Path) -> None:
    workspace = make_workspace(tiny)
    editor = saved(new_network(workspace, random_up=True), workspace, tmp_path)
    editor.check(workspace, 1)
    editor.apply(workspace, editor.plan(workspace, requests()))
    how = r"python -m lit_edit\.editors\.mend\.training"
    with pytest.raises(HyperNetworkError, match="trained for another model, for this one after edits.*" + how):
        editor.check(workspace, 1)
    editor.plan(workspace, requests())  # a sequence goes on all the same
    shapes = {7: (32, 32)}
    with pytest.raises(HyperNetworkError, match="edits layer 7, the model has layers 0 to 3.*" + how):
        saved(HyperNetwork(shapes, 2), workspace, tmp_path / "deep").editable_layers(workspace)
    with pytest.raises(HyperNetworkError, match=r"shape \(32, 48\) in layer 1, the model's is \(32, 32\).*" + how):
        saved(HyperNetwork({1: (32, 48)}, 2), workspace, tmp_path / "wide").check(workspace, 1)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_missing_or_damaged_file_is_named(tiny, tmp_path: Path) -> None:
    workspace = make_workspace(tiny)
    with pytest.raises(HyperNetworkError, match=r"no hyper-network at .*nowhere\. Train one with"):
        MEND(str(tmp_path / "nowhere"))
    path = new_network(workspace).save(tmp_path, workspace.model)
    tensors, metadata = load_tensors(path)
    header = json.loads(metadata["hypernetwork"])

    def write(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        save_tensors(path, tensors, {"hypernetwork": json.dumps(header)})

    write({**header, "format_version": 99}, tensors)
    with pytest.raises(HyperNetworkError, match=f"format is version 99, this version reads {FORMAT_VERSION}"):
        MEND(str(path))
    write({**header, "rank": 3}, tensors)
    with pytest.raises(HyperNetworkError, match="does not hold a hyper-network"):
        MEND(str(path))
    write(header, {name: t for name, t in tensors.items() if name != "edit_lr"})
    with pytest.raises(HyperNetworkError, match="does not hold a hyper-network"):
        MEND(str(path))
    save_tensors(path, tensors, {})
    with pytest.raises(HyperNetworkError, match="does not hold a hyper-network"):
        MEND(str(path))
    path.write_bytes(b"nothing")
    with pytest.raises(HyperNetworkError, match="does not hold a hyper-network"):
        MEND(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HyperNetwork({}), "at least one layer"),
        (lambda: HyperNetwork({0: (2, 2)}, rank=0), "rank >= 1"),
        (lambda: HyperNetwork({0: (2, 2)}, edit_lr=0.0), "edit_lr > 0"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# The embedded one


def test_the_embedded_network_is_small_and_fits_the_embedded_model() -> None:
    from lit_edit.datamodules import CounterFactDataModule

    from lit_edit.model.loading import embedded_path

    assert embedded_path("model", "mend", FILE_NAME).stat().st_size < 1.5e6
    editor = MEND()
    for name, part in editor.network.named_parameters():  # every part was trained, not the step sizes alone
        assert part.any(), name
    model, tokenizer = load_model()
    session = EditSession(model, tokenizer, editor, Preparation(corpus=[]))
    data = CounterFactDataModule(n_edits=1)  # none of those it was trained on
    data.setup()
    session.check(data.requests, 1)
    plan = session.plan(data.requests)
    assert plan.probability[0] > 0.1
    (edit,) = session.apply(plan)
    assert edit.p_target == pytest.approx(plan.probability[0], rel=1e-3)
