"""Context managers on forward hooks: read the input of a projection, replace or shift an output at chosen positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _EnoughError(Exception):
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def read_inputs(
    modules: dict[int, nn.Module], tokens: int | None = None, stop: bool = False
) -> Iterator[dict[int, Tensor]]:
    """Collects each module's latest input under its key while the block runs; hooks are removed whatever happens.

    Args:
        modules: Modules by key.
        tokens: Length of a text in the batch; some models (OPT) flatten batch and sequence before the MLP, and with it
            their inputs come out (rows, tokens, features) all the same.
        stop: End the forward pass, and with it the block, as soon as every module was seen: nothing after them is
            needed.
    """
    seen: dict[int, Tensor] = {}
    handles = []
    try:
        for key, module in modules.items():

            def hook(_: nn.Module, args: tuple[Any, ...], key: int = key) -> None:
                seen[key] = _unflattened(args[0], tokens)
                if stop and len(seen) == len(modules):
                    raise _EnoughError

            handles.append(module.register_forward_pre_hook(hook))
        yield seen
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def read_outputs(modules: dict[int, nn.Module], tokens: int | None = None) -> Iterator[dict[int, Tensor]]:
    """Collects each module's output under its key and ends the forward pass, and the block, with the last of them.

    Args:
        modules: Modules by key.
        tokens: As for `read_inputs`.
    """
    seen: dict[int, Tensor] = {}

    def keep(key: int) -> Callable[[Tensor], Tensor]:
        def look(output: Tensor) -> Tensor:
            seen[key] = output
            if len(seen) == len(modules):
                raise _EnoughError
            return output

        return look

    try:
        with change_outputs({module: keep(key) for key, module in modules.items()}, tokens):
            yield seen
    except _EnoughError:
        pass


@contextmanager
def change_outputs(changes: dict[nn.Module, Callable[[Tensor], Tensor]], tokens: int | None = None) -> Iterator[None]:
    """Passes each module's output through a function while the block runs.

    Blocks of some `transformers` versions return a tuple whose first entry is the hidden state; the rest is kept.

    Args:
        changes: A function of its output, by module.
        tokens: As for `read_inputs`; the functions then see (rows, tokens, features) whatever the model does.
    """
    handles = []
    try:
        for module, change in changes.items():

            def hook(_: nn.Module, __: Any, output: Any, change: Callable[[Tensor], Tensor] = change) -> Any:
                state = output[0] if isinstance(output, tuple) else output
                changed = change(_unflattened(state, tokens)).reshape(state.shape)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head, whose input are the last hidden states; None if the model has none."""
    find: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


@contextmanager
def logits_only_at(model: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Lets the head see only some places of the hidden states: logits come out as (1, n, vocabulary).

    Over a large vocabulary logits take more memory than all the rest of a pass, and most of them nobody reads.

    Args:
        model: A causal language model.
        rows: (n,), of the places to read.
        columns: (n,), likewise.

    Raises:
        ValueError: if the model has no head.
    """

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, columns][None], *args[1:])

    head = output_embeddings(model)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: it gives no logits.")
    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _unflattened(state: Tensor, tokens: int | None) -> Tensor:
    return state.unflatten(0, (-1, tokens)) if tokens is not None and state.ndim == 2 else state
