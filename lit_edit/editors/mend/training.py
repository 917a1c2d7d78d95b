"""Training of MEND's hyper-network: `python -m lit_edit.editors.mend.training --out folder`.

Unlike an edit this is ordinary training by gradient, with Lightning's automatic optimisation. Every request of a batch
is an edit of its own, tried on the unedited model: the gradient of its edit prompt goes through the hyper-network, and
the changed weights are judged by the new target under a rephrasing and by the answers out of scope.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_edit.datamodules import CounterFactDataModule, EditDataModule
from lit_edit.editors import MEND
from lit_edit.editors.mend.network import HyperNetwork, TokenFactors, gradient_factors
from lit_edit.evaluation.evaluate import figures
from lit_edit.model.loading import EMBEDDED, embedded_path, load_model, on_terminal
from lit_edit.model.prompts import Row
from lit_edit.model.trial import Factors, edit_batch, low_rank_change, target_nll
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest


class MendTraining(L.LightningModule):
    """Trains a hyper-network with ``edit_weight · NLL(target | rephrasing) + locality_weight · KL(before ‖ after)``.

    The model's weights are never written to and get no gradient. Which rephrasing and which locality prompt of a
    request a step takes depends on the seed and the step alone. The edit prompt counts as one of its rephrasings.

    Args:
        workspace: Unedited model.
        network: The network to train, its statistics already gathered.
        lr: Learning rate of the network (published: 1e-6, for billions of parameters and 100,000 edits).
        lr_lr: Learning rate of the learned step sizes (published: 1e-4).
        edit_weight: Weight of the edit loss (published: 0.1).
        locality_weight: Weight of the locality loss (published: 1).
        seed: Seed of the choices.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        workspace: Workspace,
        network: HyperNetwork,
        lr: float = 1e-6,
        lr_lr: float = 1e-4,
        edit_weight: float = 0.1,
        locality_weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (lr > 0 and lr_lr > 0 and edit_weight > 0 and locality_weight >= 0):
            raise ValueError("MEND's training needs lr, lr_lr and edit_weight > 0 and locality_weight >= 0.")
        network.check(workspace.architecture)
        self.workspace, self.network = workspace, network.requires_grad_(True)
        self.lr, self.lr_lr, self.edit_weight, self.locality_weight = lr, lr_lr, edit_weight, locality_weight
        self.seed = seed

    def losses(self, requests: Sequence[EditRequest], rng: random.Random) -> tuple[Tensor, Tensor]:
        """The edit loss and the KL out of scope, each the mean over requests.

        Raises:
            ValueError: if a request has no locality prompt.
        """
        workspace, prompter = self.workspace, self.workspace.prompter
        factors = gradient_factors(workspace, self.network.layers, edit_batch(workspace, requests))
        changes = {layer: self.network.step(layer, found) for layer, found in factors.items()}
        rephrased, distant = [], []
        for request in requests:
            prompt = rng.choice([request.prompt, *(p.prompt for p in request.probes_of("generalization"))])
            rephrased.append(prompter.row(prompt, request.target_new, source=request.source))
            distant.append(_locality_row(workspace, request, rng))
        batch = prompter.collate([*rephrased, *distant], workspace.device)
        twice = {layer: Factors(*(torch.cat([f, f]) for f in change)) for layer, change in changes.items()}
        n = len(requests)
        with low_rank_change(workspace, twice):
            logits = _logits(workspace.model, batch.input_ids, batch.attention_mask)
        with torch.no_grad():
            before = _logits(workspace.model, batch.input_ids[n:], batch.attention_mask[n:])
        edit = target_nll(logits[:n], batch.labels[:n]).mean()
        return edit, _kl(before, logits[n:], batch.labels[n:])

    def training_step(self, batch: list[EditRequest], batch_idx: int) -> Tensor:
        """The weighted sum of both losses."""
        edit, kl = self.losses(batch, random.Random(f"{self.seed}|{self.global_step}"))
        self.log_dict({"edit": edit.detach(), "kl": kl.detach()}, prog_bar=True, batch_size=len(batch))
        return self.edit_weight * edit + self.locality_weight * kl

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Requests hold no tensors."""
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, with a rate of its own for the step sizes."""
        inner = [p for name, p in self.network.named_parameters() if name != "edit_lr"]
        return torch.optim.Adam(
            [{"params": inner, "lr": self.lr}, {"params": [self.network.edit_lr], "lr": self.lr_lr}]
        )


def gather_statistics(
    workspace: Workspace, network: HyperNetwork, requests: Sequence[EditRequest], batch_size: int = 16
) -> None:
    """Fills the network's statistics from the gradients of these requests.

    Raises:
        ValueError: if there are too few tokens.
    """
    found: dict[int, list[TokenFactors]] = {layer: [] for layer in network.layers}
    for start in range(0, len(requests), batch_size):
        batch = edit_batch(workspace, requests[start : start + batch_size])
        for layer, factors in gradient_factors(workspace, network.layers, batch).items():
            found[layer].append(TokenFactors(*(part.flatten(0, 1).unsqueeze(0) for part in factors)))
    network.gather(
        {
            layer: TokenFactors(torch.cat([f.u for f in parts], 1), torch.cat([f.delta for f in parts], 1))
            for layer, parts in found.items()
        }
    )


def held_out_scores(workspace: Workspace, editor: MEND, requests: Sequence[EditRequest]) -> dict[str, float]:
    """Reliability, generalization and locality of single edits, each made on the unedited model and taken back."""
    found = figures([outcome for _, outcome in editor.single_edits(workspace, requests)], ["exact_match"])
    return {name: found[name] for name in ("reliability", "generalization", "locality") if name in found}


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def _locality_row(workspace: Workspace, request: EditRequest, rng: random.Random) -> Row:
    probes = request.probes_of("locality")
    if not probes:
        raise ValueError(f"{request.source or 'request'}: has no locality prompt, which MEND's training needs.")
    probe = rng.choice(probes)
    return workspace.prompter.row(probe.prompt, probe.target or request.target_new, source=request.source)


def _kl(before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """KL(before ‖ after) of the next token where an answer is predicted, the mean over these places."""
    mask = labels[:, 1:] != -100
    p, q = (x[:, :-1][mask].float().log_softmax(-1) for x in (before, after))
    return nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


class _Draws(Dataset[EditRequest]):
    """An endless shuffle of requests, cut at a length: every request once before any a second time."""

    def __init__(self, requests: Sequence[EditRequest], length: int, seed: int) -> None:
        self.requests, self.length, self.seed = requests, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> EditRequest:
        turn, place = divmod(index, len(self.requests))
        order = list(range(len(self.requests)))
        random.Random(f"{self.seed}|{turn}").shuffle(order)
        return self.requests[order[place]]


def train(
    workspace: Workspace,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    rank: int = 64,
    steps: int = 3000,
    batch_size: int = 8,
    lr: float = 3e-4,
    lr_lr: float = 1e-4,
    edit_lr: float = 1e-4,
    edit_weight: float = 0.1,
    statistics: int = 256,
    seed: int = 0,
    progress: bool = False,
    hidden: int = 1,
    clip: float = 100.0,
) -> HyperNetwork:
    """Trains a hyper-network for some layers of a model.

    Args:
        workspace: Unedited model.
        requests: Requests with a locality prompt each, and rephrasings if there are any.
        layers: Layers to edit.
        rank: Rank of the network's factors.
        steps: Number of Adam steps.
        batch_size: Edits in a step, each on its own.
        lr: Learning rate of the network.
        lr_lr: Learning rate of the step sizes.
        edit_lr: Start of the step sizes.
        edit_weight: Weight of the edit loss against the KL.
        statistics: Number of requests that give the statistics of the inputs.
        seed: Seed of initialisation, order and choices.
        progress: Show a progress bar.
        hidden: Number of hidden layers.
        clip: Largest norm of the network's gradient; longer ones are shortened to it.

    Raises:
        ValueError: if a layer does not exist, a request has no locality prompt or a number is out of range.
    """
    if not clip > 0:
        raise ValueError(f"MEND's training needs a clip > 0 for its gradients, not {clip}; 100 is published.")
    workspace.architecture.check(list(layers))
    shapes = {
        layer: (part.weight.shape[0], part.weight.shape[1])
        for layer in layers
        for part in [workspace.architecture[layer]]
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = HyperNetwork(shapes, rank, hidden, edit_lr).to(workspace.device)
    gather_statistics(workspace, network, requests[:statistics])
    # The loader draws from a generator, though nothing here depends on it: not from everybody's.
    data = DataLoader(
        _Draws(requests, steps * batch_size, seed),
        batch_size=batch_size,
        collate_fn=list,
        generator=torch.Generator(),
    )
    trainer = L.Trainer(
        accelerator=workspace.device.type,
        devices=1,
        max_epochs=1,
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        callbacks=[TQDMProgressBar(refresh_rate=10)] if progress else [],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The 'train_dataloader' does not have many workers")
        trainer.fit(MendTraining(workspace, network, lr, lr_lr, edit_weight, seed=seed), data)
    return network.requires_grad_(False).eval()


_SETTINGS = tuple("layers rank hidden steps batch_size lr lr_lr edit_lr edit_weight clip seed".split())


def _parser() -> argparse.ArgumentParser:
    """The options of the command; defaults are for the embedded model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="'embedded', a folder or a name on the hub")
    parser.add_argument("--data", help="a file of facts; by default the embedded records that no table is made of")
    parser.add_argument("--data-seed", type=int, help="shuffles the records, before --offset counts, as `fit` does")
    parser.add_argument("--offset", type=int, default=0, help="first record of the training data")
    parser.add_argument("--held-out", type=int, default=100, help="records kept for the final score, the last ones")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 6, 7])
    parser.add_argument("--rank", type=int, default=64, help="of the network's factors; published: 1920")
    parser.add_argument("--hidden", type=int, default=1, help="hidden layers of the network")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=8, help="edits a step")
    parser.add_argument("--lr", type=float, default=3e-4, help="of the network; published: 1e-6")
    parser.add_argument("--lr-lr", type=float, default=1e-4)
    parser.add_argument("--edit-lr", type=float, default=1e-4)
    parser.add_argument("--edit-weight", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=100.0, help="longest gradient of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for hypernetwork.safetensors")
    return parser


def _requests(given: argparse.Namespace) -> list[EditRequest]:
    """The records of the file; of the embedded ones, `multifact` and those on which settings are chosen."""
    files = [given.data] if given.data else [str(embedded_path("data", "multifact.json")), None]
    requests: list[EditRequest] = []
    for path in files:
        data = EditDataModule(path) if path else CounterFactDataModule()
        data.n_edits, data.seed = None, given.data_seed
        data.setup("fit")
        requests += data.requests if path else [r for r in data.requests if r.case_id in data.for_choosing]
    return requests[given.offset :]


def main(args: Sequence[str] | None = None) -> None:
    """Trains, saves and scores a hyper-network."""
    parser = _parser()
    given = parser.parse_args(args)

    requests = _requests(given)
    if not 0 < given.held_out < len(requests):
        parser.error(f"--held-out must be between 1 and {len(requests) - 1}, the records from --offset on less one.")
    training, held_out = requests[: -given.held_out], requests[-given.held_out :]
    model, tokenizer = load_model(given.model, device=given.device)
    workspace = Workspace.of(model.eval().requires_grad_(False), tokenizer)
    start = time.perf_counter()
    settings = {name: getattr(given, name) for name in _SETTINGS}
    used = settings | {"data_seed": given.data_seed, "offset": given.offset, "requests": len(training)}
    network = train(workspace, training, **settings, progress=on_terminal())
    minutes = (time.perf_counter() - start) / 60
    network.save(given.out, model, {"training": used})
    editor = MEND(str(given.out))
    scores = held_out_scores(workspace, editor, held_out)
    path = network.save(given.out, model, {"training": used, "held_out": scores})
    said = ", ".join(f"{kind} {score:.3f}" for kind, score in scores.items())
    print(f"{path}: {minutes:.1f} min; {len(held_out)} held-out single edits: {said}", flush=True)


if __name__ == "__main__":
    main()
