"""Batches of edit requests in order, and the place in them at which a resumed run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from lit_edit.requests import EditRequest


class EditBatch:
    """The requests that are edited together.

    Deliberately no `collections.abc.Sequence`: Lightning looks for tensors inside sequences and dataclasses, in order
    to move them to a device or to convert them (``precision="bf16-true"``), and refuses the frozen `EditRequest` it
    finds there. A plain container with the same use passes through untouched. `EditDataModule` hands it to the
    hooks of the module as a list.

    Args:
        requests: Requests, in the order of editing.
    """

    __slots__ = ("_requests",)

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        self._requests = tuple(requests)

    def __iter__(self) -> Iterator[EditRequest]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    @overload
    def __getitem__(self, place: int) -> EditRequest: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[EditRequest, ...]: ...
    def __getitem__(self, place: int | slice) -> EditRequest | tuple[EditRequest, ...]:
        return self._requests[place]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (EditBatch, list, tuple)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._requests)

    def __repr__(self) -> str:
        return f"EditBatch({', '.join(request.case_id for request in self)})"


class EditLoader:
    """Hands out requests in order, in batches, each exactly once; the last batch may be shorter.

    Not a ``torch.utils.data.DataLoader``: into one of those Lightning puts a sampler when several processes run, which
    gives each process other requests and repeats some to make the counts even. Here every process sees every
    batch, so that all of them can solve the same update.

    It keeps its place: Lightning saves `state_dict` with a checkpoint made in the middle of an epoch, and gives it to
    `load_state_dict` before the resumed epoch. The length stays that of the whole epoch, because Lightning counts the
    batches already done towards it.

    Args:
        requests: Requests, in the order of editing.
        batch_size: Number of requests edited together.
        batches_done: Counts the finished batches of the current epoch, if somebody does; otherwise a
            batch counts as done when it has been handed out, which is one too many if the batch then fails.

    Raises:
        ValueError: if the batch size is below 1.
    """

    def __init__(
        self, requests: Sequence[EditRequest], batch_size: int = 1, batches_done: Callable[[], int] | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.requests = list(requests)
        self.batch_size = batch_size
        self._batches_done = batches_done
        self._handed_out = 0
        self._start = 0

    def __len__(self) -> int:
        """The number of batches in a whole epoch, resumed or not."""
        return -(-len(self.requests) // self.batch_size)

    def __iter__(self) -> Iterator[EditBatch]:
        # A generator: Lightning calls `iter` more often than it fetches, and only a fetch uses up the saved place.
        start, self._start = self._start, 0
        for number in range(start, len(self)):
            self._handed_out = number + 1
            yield EditBatch(self.requests[number * self.batch_size : (number + 1) * self.batch_size])

    def _digest(self, batches: int) -> str:
        """A fingerprint of the requests in the first batches, by which a resumed run knows them again."""
        done = self.requests[: batches * self.batch_size]
        facts = [[request.case_id, request.prompt, request.subject, request.target_new] for request in done]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, as plain numbers and text."""
        done = self._handed_out if self._batches_done is None else self._batches_done()
        return {"batches_done": done, "batch_size": self.batch_size, "digest": self._digest(done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next epoch begin after the batches that are done.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: if the batch size differs, or the requests already edited are not the first ones here: going on
                would skip some requests and edit others twice. Further requests may have been added at the end.
        """
        done, size = state_dict["batches_done"], state_dict["batch_size"]
        if size != self.batch_size:
            raise ValueError(
                f"The checkpoint was made with batch_size {size}, the data now has batch_size {self.batch_size}; "
                "resume with the same."
            )
        if done > len(self) or state_dict["digest"] != self._digest(done):
            raise ValueError(
                f"The checkpoint was made after {done} batches of other edit requests than the data now begins with; "
                "resume with the same path, seed and offset, and at least as many edits."
            )
        # At the end of an epoch the next one begins anew.
        self._start = self._handed_out = done % len(self) if len(self) else 0
