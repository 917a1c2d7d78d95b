"""What all data modules share: a file of facts becomes checked requests, and these become batches."""

from __future__ import annotations

import difflib
import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from lit_edit.datamodules.files import Located, Record, plain_name, read_records
from lit_edit.datamodules.loader import EditBatch, EditLoader
from lit_edit.datamodules.records import ALL_FORMS, LIST_FIELDS, Form, read_request

from lit_edit.model.loading import EMBEDDED
from lit_edit.requests import EditRequest, RequestError, refusal

OnBadRecord = Literal["raise", "skip"]
CHOOSE = "choose"  # what the field `split` says of records on which settings are chosen


class EditDataModule(LightningDataModule):
    """A file of edit requests, checked before the first edit and handed out in order.

    This class reads a record in any of the known forms (see `lit_edit.datamodules.records`); its subclasses know one
    data set each. The hooks of the LightningModule receive each batch as a ``list[EditRequest]``. A run that was
    interrupted in the middle of an epoch goes on with the first batch that was not finished.

    Args:
        path: File, in one of the kinds of `read_records`; ``None`` or ``embedded`` takes the embedded file of the
            data set.
        n_edits: Number of requests to take; ``None`` takes all from ``offset`` on.
        batch_size: Number of requests edited at once; the last batch may be smaller.
        seed: Seed that shuffles the records of the file, before ``offset`` counts; ``None`` keeps their order. Records
            whose field ``split`` says ``choose``, on which settings are chosen, come after all others still.
        offset: Number of requests to leave out at the beginning.
        on_bad_record: What to do with records that cannot be edited: ``raise`` ends in an error that names them;
            ``skip`` leaves them out, lists them in `refused` and warns. A file that cannot be read as such is always an
            error.

    Attributes:
        requests: Requests of this run, in the order of editing; filled by `setup`.
        refused: Why each record was left out, with file, record and field; filled by `setup`.
        for_choosing: Identifiers of the records whose field ``split`` says ``choose``; filled by `setup`.
        unused: Fields of the file that mean nothing here, where the data set's own are known; filled by `setup`.

    Raises:
        ValueError: if an argument is out of range, or no path is given and there is no embedded file.
    """

    forms: ClassVar[Sequence[Form]] = ALL_FORMS
    embedded: ClassVar[str | None] = None
    fields: ClassVar[Collection[str]] = ()
    """All fields that are read, for data whose other fields deserve a warning; empty where they are no mistake."""

    def __init__(
        self,
        path: str | None = None,
        n_edits: int | None = 100,
        batch_size: int = 1,
        seed: int | None = None,
        offset: int = 0,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        super().__init__()
        if path in (None, EMBEDDED) and self.embedded_file() is None:
            raise ValueError(f"{type(self).__name__} needs a path: the file of facts to edit.")
        if n_edits is not None and n_edits < 1:
            raise ValueError(f"n_edits is {n_edits}; it must be at least 1, or null for all.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        if offset < 0:
            raise ValueError(f"offset is {offset}; it must not be negative.")
        if on_bad_record not in ("raise", "skip"):
            raise ValueError(f"on_bad_record is {on_bad_record!r}; it must be 'raise' or 'skip'.")
        self.path = path
        self.n_edits = n_edits
        self.batch_size = batch_size
        self.seed = seed
        self.offset = offset
        self.on_bad_record = on_bad_record
        self.requests: list[EditRequest] = []
        self.refused: list[str] = []
        self.unused: list[str] = []
        self.for_choosing: set[str] = set()
        self._is_set_up = False

    def embedded_file(self) -> str | None:
        """The name of the embedded file that is read when no path is given, if there is one."""
        return self.embedded

    def read_record(self, record: Record, source: str, default_id: str) -> EditRequest:
        """Turn one record of the file into a request; subclasses may refine it.

        Args:
            record: Fields of the record.
            source: Words that locate it in an error message.
            default_id: Identifier to use if the record has none.

        Raises:
            RequestError: if the record cannot be edited.
        """
        return read_request(record, source, default_id, self.forms)

    def setup(self, stage: str | None = None) -> None:
        """Read and check the file; a second call does nothing.

        Args:
            stage: Lightning's name for what is about to run; the requests are the same for all.

        Raises:
            RequestError: if the file cannot be read, or (with ``on_bad_record="raise"``) records cannot be edited.
            ValueError: if there are fewer usable records than asked for.

        Warns:
            UserWarning: naming fields that are not used, with the one that may be meant; counting records left out.
        """
        if self._is_set_up:
            return
        records = self._as_spelt(self._read_file())
        self.unused = self._unused(records)
        requests, self.refused = self._read_all(records)
        self.requests = self._select(requests)
        self._is_set_up = True

    def _read_file(self) -> list[Located]:
        if self.path is not None and self.path != EMBEDDED:
            return read_records(self._resolve(self.path), LIST_FIELDS)
        name = self.embedded_file()
        if name is None:
            raise ValueError(f"{type(self).__name__} needs a path: the file of facts to edit.")
        with as_file(files("lit_edit.world") / "data" / name) as file:
            return read_records(file, LIST_FIELDS)

    def _resolve(self, path: str) -> str | Path:
        """The file that a path means."""
        return path

    def _as_spelt(self, records: list[Located]) -> list[Located]:
        """Records whose fields are as they are read: ``Target New`` is ``target_new``, where nothing else is."""
        found = {str(field) for _, record in records if not isinstance(record, RequestError) for field in record}
        plain = {field: plain_name(field) for field in found}
        meant = {field: name for field, name in plain.items() if name in self.fields and name not in found}
        twice = {name for name in meant.values() if list(meant.values()).count(name) > 1}
        names = {field: name for field, name in meant.items() if name not in twice}
        if not names:
            return records
        return [
            (source, record)
            if isinstance(record, RequestError)
            else (source, {names.get(str(field), field): value for field, value in record.items()})
            for source, record in records
        ]

    def _unused(self, records: Sequence[Located]) -> list[str]:
        """The fields of the file that nothing reads, said in a warning."""
        if not self.fields:
            return []
        found = dict.fromkeys(
            str(field) for _, record in records if not isinstance(record, RequestError) for field in record
        )
        unused = [field for field in found if field not in self.fields]
        meant = [field for field in self.fields if field not in found]
        named = []
        for field in unused:
            close = difflib.get_close_matches(field.casefold(), meant, 1, cutoff=0.7)
            named.append(f"{field} (did you mean {close[0]}?)" if close else field)
        if named:
            rank_zero_warn(f"{self.path or self.embedded_file()}: columns not used: {', '.join(named)}.")
        return unused

    def _read_all(self, records: Sequence[Located]) -> tuple[list[EditRequest], list[str]]:
        """All records as requests, with identifiers that differ, and the reasons for those left out."""
        requests: list[EditRequest] = []
        chosen_on: list[bool] = []
        refused: list[str] = []
        for number, (source, record) in enumerate(records, start=1):
            try:
                if isinstance(record, RequestError):
                    raise record
                requests.append(self.read_record(record, source, str(number)))
                chosen_on.append(record.get("split") == CHOOSE)
            except RequestError as error:
                refused.append(str(error))
        if refused and self.on_bad_record == "raise":
            refusals = refusal(refused, len(records))
            raise RequestError(f"{refusals} (--data.on_bad_record=skip leaves such records out and lists them.)")
        if refused:
            more = f"; {len(refused) - 3} more are in `refused`" if len(refused) > 3 else ""
            rank_zero_warn(
                f"{len(refused)} of {len(records)} records cannot be edited and are left out: "
                + " ".join(refused[:3])
                + more
            )
        requests = unique_ids(requests)
        self.for_choosing = {r.case_id for r, chosen in zip(requests, chosen_on, strict=True) if chosen}
        return requests, refused

    def _select(self, requests: list[EditRequest]) -> list[EditRequest]:
        """The requests of this run: shuffled if there is a seed, from the offset on, as many as asked for."""
        if self.seed is not None:
            requests = list(requests)
            random.Random(self.seed).shuffle(requests)
            requests.sort(key=lambda request: request.case_id in self.for_choosing)
        available = max(len(requests) - self.offset, 0)
        wanted = available if self.n_edits is None else self.n_edits
        if available == 0 or wanted > available:
            after = f" after offset {self.offset}" if self.offset else ""
            refused = f" ({len(self.refused)} records were left out)" if self.refused else ""
            asked = "all" if self.n_edits is None else f"n_edits={self.n_edits}"
            raise ValueError(
                f"{asked} edits are asked for, but {self.path or self.embedded_file()} has {available} usable "
                f"records{after}{refused}{'' if self.n_edits is None else '; n_edits: null takes all there are'}."
            )
        return requests[self.offset : self.offset + wanted]

    def train_dataloader(self) -> EditLoader:
        """The batches of this run, in order, each request once.

        Raises:
            RequestError: as `setup`, if it has not been called yet.
            ValueError: likewise.
        """
        self.setup("fit")
        trainer = self.trainer
        if trainer is None:
            return EditLoader(self.requests, self.batch_size)
        # What Lightning's own loop goes by on resuming: this count leaves out a batch that failed, and includes the one
        # after which a callback saves. A loader that counted for itself would be one off in one of the two.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        return EditLoader(
            self.requests,
            self.batch_size,
            lambda: progress.current.processed,  # type: ignore[attr-defined]  # declared as a base class without it
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Pass requests on as a list, since they hold no tensors, and move anything else as usual."""
        if isinstance(batch, EditBatch):
            return list(batch)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


def unique_ids(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Make identifiers differ: the second request called ``7`` becomes ``7#2``."""
    taken = {request.case_id for request in requests}
    seen: set[str] = set()
    result = []
    for request in requests:
        case_id = request.case_id
        if case_id in seen:
            count = 2
            while (case_id := f"{request.case_id}#{count}") in taken:
                count += 1
            taken.add(case_id)
        seen.add(case_id)
        result.append(request if case_id == request.case_id else replace(request, case_id=case_id))
    return result
