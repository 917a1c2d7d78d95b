"""Where keys, values and hidden states lie before and after, in two dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lit_edit.model.prompts import Prompter, Row
from lit_edit.requests import EditRequest
from lit_edit.runs.pictures import Picture, Points

from .every_n import as_found, count_edits
from .perplexity import read_texts
from .pictures import show
from .watched import Watched, owner_of

Method = Literal["pca", "tsne"]
_KINDS = ("keys", "values", "hidden")
_TITLES = {"keys": "Keys", "values": "Values", "hidden": "Hidden states"}
_METHODS = {"pca": "PCA", "tsne": "t-SNE"}
_BATCH = 32
_FEWEST = 3  # points of which two principal components say something


class RepresentationDrift(Watched):
    """Follows the representations of the same inputs through a run (MOSE Fig. 5 and 22, EAC Fig. 3, PRUNE Fig. 5).

    Of each input: *keys*, what goes into the module that holds a watched matrix; *values*, what comes out of it; and
    the *hidden* state at the end of the network. In a module with ``model`` and ``tokenizer`` inputs are prompts; keys
    and values are those at the last token of an edit's subject, or of any other prompt, hidden states those of the last
    layer at the prompt's last token. In any other module inputs are the first batch, which goes through
    ``predict_step`` (by default ``forward``); what has more dimensions than two is averaged over those in the middle.

    Logs ``representation/<keys|values|hidden>``: how far a representation moved from that before the first edit,
    relative to its length, mean over inputs and matrices. For edits, ``.../<kind>_since_edit`` is the same from right
    after their own edit: what later edits did to them. At the end pictures in two dimensions, fitted to all clouds
    together, go to ``pictures/``, TensorBoard and the report: hidden states, and keys and values of the matrix whose
    values moved most.

    Needs scikit-learn: ``pip install 'lit-edit[analysis]'``.

    Cost: a forward pass over all inputs at every measurement, for edits one of their own prompts after each batch, and
    t-SNE at the end (seconds for 200 inputs). Keeps three times ``n_inputs · (p + d)`` numbers per matrix, two of them
    in checkpoints.

    Args:
        parameters: Names or patterns of the matrices, see `Watched`.
        prompts: ``edits``, the edit prompts of the run's requests; ``embedded``, the embedded model's held-out text; a
            file with a prompt in each line; or the prompts. Ignored in a module without ``model`` and ``tokenizer``.
        n_inputs: Number of inputs at most.
        methods: How points are brought to two dimensions: ``pca``, ``tsne``.
        every_n: Edits between two measurements, or the counts to measure at.
        at_end: Also measure the last count of the run.
        seed: Seed of t-SNE.

    Raises:
        ImportError: If scikit-learn is missing.
        ValueError: For unknown methods, fewer than three inputs, or no prompts.
        TypeError: At the first batch, if a module has neither a language model nor a ``forward`` for the batch.
    """

    needs_start = False

    def __init__(
        self,
        parameters: list[str] | None = None,
        prompts: str | list[str] = "edits",
        n_inputs: int = 200,
        methods: list[Method] | None = None,
        every_n: int | list[int] = 100,
        at_end: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(parameters, every_n, at_start=True, at_end=at_end)
        self.methods: list[Method] = list(get_args(Method)) if methods is None else list(methods)
        if not self.methods or not set(self.methods) <= set(get_args(Method)):
            raise ValueError(f"Methods are {' and '.join(get_args(Method))}, not {methods}.")
        if n_inputs < _FEWEST:
            raise ValueError(f"n_inputs should be at least {_FEWEST}, it is {n_inputs}.")
        try:
            import sklearn  # noqa: F401
        except ImportError as error:
            raise ImportError("RepresentationDrift needs scikit-learn: pip install 'lit-edit[analysis]'") from error
        self.prompts, self.n_inputs, self.seed = prompts, n_inputs, seed
        self._texts = None if prompts == "edits" else read_texts(prompts)[:n_inputs]
        self._batch: Any = None
        self._before: dict[str, Tensor] = {}  # by place, such as "keys net.0.weight"
        self._own: dict[str, dict[int, Tensor]] = {}  # right after an input's own edit: by place, then input
        self._now: dict[str, Tensor] = {}
        self._written: list[EditRequest] = []

    @override
    def reset(self) -> None:
        super().reset()
        self._batch, self._before, self._own, self._now, self._written = None, {}, {}, {}, []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._batch is None and not _is_language_model(pl_module):
            self._batch = batch
        self._look_at_written(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._texts is None and isinstance(batch, list) and all(isinstance(item, EditRequest) for item in batch):
            self._written = batch

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_at_written(trainer, pl_module)
        super().on_train_end(trainer, pl_module)
        edits = count_edits(trainer, pl_module)
        if edits and self._before and self._now:
            show(trainer, self._pictures(), edits)

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        self._now = self._represent(pl_module, self._inputs(trainer, pl_module))
        if not self._before:  # at 0 edits; later ones are compared with what a resumed run found first
            self._before = self._now
        figures: dict[str, float] = {}
        for kind in _KINDS:
            places = [place for place in self._now if place.split(" ")[0] == kind]
            if not places:
                continue
            moved = [_moved(self._before[place], self._now[place]) for place in places]
            figures[f"representation/{kind}"] = torch.cat(moved).mean().item()
            since = [_moved(*self._since_edit(place)) for place in places if self._own.get(place)]
            if since:
                figures[f"representation/{kind}_since_edit"] = torch.cat(since).mean().item()
        return figures

    # What is looked at

    def _requests(self, trainer: Trainer) -> list[EditRequest]:
        found: list[EditRequest] = list(getattr(getattr(trainer, "datamodule", None), "requests", []))
        if len(found) < _FEWEST:
            raise ValueError(
                f"RepresentationDrift has {len(found)} edit prompts, of which two dimensions say nothing: edit more, "
                "or give `prompts`."
            )
        return found[: self.n_inputs]

    def _inputs(self, trainer: Trainer, pl_module: LightningModule) -> list[EditRequest] | list[str] | None:
        if not _is_language_model(pl_module):
            return None
        return self._requests(trainer) if self._texts is None else self._texts

    def _look_at_written(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the representations of requests right after they were written."""
        written, self._written = self._written, []
        if not written or not _is_language_model(pl_module):
            return
        place_of = {_name(request): i for i, request in enumerate(self._requests(trainer))}
        known = [request for request in written if _name(request) in place_of]
        if not known:
            return
        with as_found(pl_module):
            found = self._represent(pl_module, known)
        for place, rows in found.items():
            own = self._own.setdefault(place, {})
            own.update({place_of[_name(request)]: row for request, row in zip(known, rows, strict=True)})

    def _represent(self, pl_module: LightningModule, inputs: Sequence[EditRequest] | Sequence[str] | None) -> Any:
        """Keys, values and hidden states, ``(n, dim)`` each in float32 on the CPU, by place."""
        found: dict[str, list[Tensor]] = {}
        owners = {name: owner_of(pl_module, weight) for name, weight in self.select(pl_module).items()}
        modules = {name: owner for name, owner in owners.items() if owner is not None}
        if inputs is None:
            with _watching(modules) as seen:
                try:
                    hidden = pl_module.predict_step(self._batch, 0)
                except NotImplementedError as error:
                    raise TypeError(
                        f"RepresentationDrift runs the first batch through {type(pl_module).__name__}.predict_step, by "
                        "default `forward`, which is not there: write one of the two, or give the module `model` and "
                        "`tokenizer`."
                    ) from error
            if isinstance(hidden, Tensor) and hidden.ndim > 1:
                seen["hidden"] = hidden
            return {place: _flat(tensor)[: self.n_inputs].float().cpu() for place, tensor in seen.items()}
        model: Any = pl_module.model
        prompter = getattr(pl_module, "prompter", None)
        prompter = prompter if isinstance(prompter, Prompter) else Prompter.of(model, pl_module.tokenizer)
        rows = [_row(prompter, item) for item in inputs]
        device = next(model.parameters()).device
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            batch = prompter.collate(some, device)
            with _watching(modules) as seen:
                said = model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True,
                    use_cache=False,
                )  # fmt: skip
            each = torch.arange(len(some), device=device)
            at = torch.tensor([row.subject_last for row in some], device=device)
            end = torch.tensor([len(row.ids) - 1 for row in some], device=device)
            for place, tensor in seen.items():
                found.setdefault(place, []).append(tensor[each, at].float().cpu())
            found.setdefault("hidden", []).append(said.hidden_states[-1][each, end].float().cpu())
        return {place: torch.cat(parts) for place, parts in found.items()}

    # What is shown

    def _since_edit(self, place: str) -> tuple[Tensor, Tensor]:
        """Right after their own edit, and now, of the inputs that were written."""
        own = dict(sorted(self._own[place].items()))
        return torch.stack(list(own.values())), self._now[place][list(own)]

    def _pictures(self) -> list[Picture]:
        values = [place for place in self._now if place.startswith("values ")]
        moved = {place: float(_moved(self._before[place], self._now[place]).mean()) for place in values}
        places = [place for place in ("hidden",) if place in self._now]
        if moved:
            name = max(moved, key=moved.__getitem__).removeprefix("values ")
            places = [f"keys {name}", f"values {name}", *places]
        return [self._picture(place, method) for place in places for method in self.methods]

    def _picture(self, place: str, method: Method) -> Picture:
        kind, _, name = place.partition(" ")
        clouds = {"before": self._before[place]}
        if self._own.get(place):
            clouds["right after its edit"] = self._since_edit(place)[0]
        clouds["now"] = self._now[place]
        points = flattened(torch.cat(list(clouds.values())), method, self.seed).split([len(c) for c in clouds.values()])
        series: dict[str, Points] = {label: part.tolist() for label, part in zip(clouds, points, strict=True)}
        return Picture(
            name=f"representation-{kind}-{method}",
            title=f"{_TITLES[kind]}{f' of {name}' if name else ''}, {_METHODS[method]}",
            note="The same inputs each time; two dimensions fitted to all points together.",
            kind="scatter",
            series=series,
            across="first dimension",
            up="second dimension",
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": self._before, "own": self._own, "batch": self._batch}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._before = dict(state_dict["before"])
        self._own = {place: dict(own) for place, own in state_dict["own"].items()}
        self._batch = state_dict["batch"]


def flattened(points: Tensor, method: Method, seed: int = 0) -> Tensor:
    """Points in two dimensions.

    Args:
        points: ``(n, dim)``.
        method: ``pca``, the first two principal components; or ``tsne``, started from these.
        seed: Seed of t-SNE.

    Returns:
        ``(n, 2)``; all NaN if a point is not finite.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if not bool(torch.isfinite(points).all()):
        return torch.full((len(points), 2), float("nan"))
    if not bool((points != points[:1]).any()):  # all are one point
        return torch.zeros(len(points), 2, dtype=torch.float64)
    matrix = points.double().numpy()
    if method == "pca":
        found = PCA(min(2, *matrix.shape), svd_solver="full").fit_transform(matrix)
    else:
        perplexity = min(30.0, (len(points) - 1) / 3)
        found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(matrix)
    flat = torch.as_tensor(found, dtype=torch.float64)
    return torch.nn.functional.pad(flat, (0, 2 - flat.shape[1]))


def _name(request: EditRequest) -> tuple[str, str, str]:
    """What a request is known by: Lightning may hand out copies."""
    return request.case_id, request.prompt, request.target_new


def _row(prompter: Prompter, item: EditRequest | str) -> Row:
    """A prompt with the place of its key: its subject's last token, or its own."""
    if isinstance(item, EditRequest):
        return prompter.row(item.prompt, "", item.subject, item.source)
    ids = tuple(prompter.encode(item)[0][: prompter.max_length])
    return Row(ids, len(ids), len(ids) - 1)


@contextmanager
def _watching(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What goes into modules and comes out of them while the block runs, by place."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                seen[f"keys {name}"] = args[0].detach()
            if isinstance(output, Tensor):
                seen[f"values {name}"] = output.detach()

        return see

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_language_model(pl_module: LightningModule) -> bool:
    return hasattr(pl_module, "model") and hasattr(pl_module, "tokenizer")


def _flat(tensor: Tensor) -> Tensor:
    """``(n, dim)`` of ``(n, ..., dim)``."""
    tensor = tensor.detach()
    return tensor if tensor.ndim < 3 else tensor.flatten(1, -2).mean(dim=1)


def _moved(before: Tensor, now: Tensor) -> Tensor:
    """``‖now − before‖ / ‖before‖`` of each row; rows of zeros that stayed did not move."""
    size = before.norm(dim=1)
    moved = (now - before).norm(dim=1)
    return torch.where((size == 0) & (moved == 0), torch.zeros_like(moved), moved / size)
