"""Context managers on forward hooks: read the input of a projection, replace or shift an output at chosen positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def read_inputs(modules: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Collects each module's latest input under its key while the block runs; hooks are removed whatever happens."""
    seen: dict[int, Tensor] = {}
    handles = []
    try:
        for key, module in modules.items():

            def hook(_: nn.Module, args: tuple[Any, ...], key: int = key) -> None:
                seen[key] = args[0]

            handles.append(module.register_forward_pre_hook(hook))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def change_outputs(changes: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Passes each module's output through a function while the block runs.

    Blocks of some `transformers` versions return a tuple whose first entry is the hidden state; the rest is kept.
    """
    handles = []
    try:
        for module, change in changes.items():

            def hook(_: nn.Module, __: Any, output: Any, change: Callable[[Tensor], Tensor] = change) -> Any:
                if isinstance(output, tuple):
                    return (change(output[0]), *output[1:])
                return change(output)

            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
