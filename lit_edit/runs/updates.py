"""The updates of a run, kept one file per write: what undo, replay and the export of any point go by.

A write is an edit (or a batch of edits), a mending, or what a restraint does at the end. Its file holds the update of
every layer as thin factors (dense where the method makes it so). Weights after the latest N writes are kept as
*points*, so that taking something back need not begin with the unedited model. Files are only ever added: a write that
was taken back is named by a later file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_edit.algebra.updates import Update
from lit_edit.files import DamagedFileError, load_tensors, read_metadata, save_tensors
from lit_edit.model.edited_weight import EditedWeight, Written
from lit_edit.units import size_text

FOLDER = "updates"
LIMIT = 2 << 30
_SPACING = 2  # points are kept whenever the updates since the last one are this many times as large as it
_ENDING = ".safetensors"
_MARKS = ("undo", "point")
Kind = Literal["edit", "mend", "finish", "undo", "point"]


@dataclass(frozen=True)
class Write:
    """One time that weights were written.

    Attributes:
        index: Place among all files of the log, from 1.
        kind: What wrote.
        numbers: Edits that were written.
        kept_with: Earlier edits whose facts were written together with them.
        dropped: Writes that were taken back, where ``kind`` is ``undo``.
        edits: Edits handled by then.
        checksums: CRC-32 of every layer that was written, as it was stored afterwards.
    """

    index: int
    kind: Kind
    numbers: tuple[int, ...] = ()
    kept_with: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    edits: int = 0
    checksums: tuple[tuple[int, int], ...] = ()

    def metadata(self) -> dict[str, str]:
        """As strings, for the file."""
        return {name: json.dumps(value) for name, value in self.__dict__.items()}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Write:
        """From a file.

        Raises:
            ValueError: If they are not those of a write.
        """
        try:
            found = {name: json.loads(metadata[name]) for name in cls.__dataclass_fields__}
            numbers = {name: tuple(map(int, found[name])) for name in ("numbers", "kept_with", "dropped")}
            sums = tuple((int(layer), int(crc)) for layer, crc in found["checksums"])
            return cls(int(found["index"]), found["kind"], **numbers, edits=int(found["edits"]), checksums=sums)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"its metadata are not those of a write ({error!r})") from error


@dataclass(frozen=True, eq=False)
class Step:
    """What a write did to one layer.

    Attributes:
        layer: Index of the block.
        update: As it was applied.
        requests: Number of edits it wrote; 0 for what restrains a sum.
    """

    layer: int
    update: Update
    requests: int


class UpdateLog:
    """The writes of a session in a folder.

    Args:
        folder: Where; a temporary folder, gone with this object, if None.
        limit: Bytes to keep at most. The oldest writes are then merged into one point, and can be taken back only all
            together. 0 keeps nothing.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.limit = limit
        self._temporary: weakref.finalize[..., UpdateLog] | None = None
        self._folder = folder
        self._writes: dict[int, Write] = {}
        self._sizes: dict[int, int] = {}
        if folder is not None and folder.is_dir():
            self._scan()

    def __len__(self) -> int:
        """Number of the last file."""
        return max(self._writes, default=0)

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lit-edit-updates-"))
            self._temporary = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(self._sizes.values())

    def _scan(self) -> None:
        for path in sorted(self.folder.glob(f"[0-9]*{_ENDING}")):
            try:
                write = Write.of(read_metadata(path))
                if path != self.path(write.index):
                    raise ValueError(f"it is number {write.index}")
            except ValueError as error:
                raise DamagedFileError(f"{path} is no update of a run: {error}.") from error
            self._writes[write.index] = write
            self._sizes[write.index] = path.stat().st_size

    def path(self, index: int) -> Path:
        """The file of a write."""
        return self.folder / f"{index:06d}{_ENDING}"

    # What is in the weights

    @property
    def writes(self) -> list[Write]:
        """The writes that are in the weights, oldest first; those merged into the first point are not listed."""
        return self.standing(len(self))

    def standing(self, last: int) -> list[Write]:
        """Writes that were in the weights after file number ``last``."""
        base = self._base(last)
        seen = [write for index, write in sorted(self._writes.items()) if base < index <= last]
        gone = {index for write in seen for index in write.dropped}
        return [write for write in seen if write.index not in gone and write.kind not in _MARKS]

    def _points(self, last: int) -> list[int]:
        """Points up to file number ``last`` that no taking back had made void by then, oldest first."""
        points: list[int] = []
        for index, write in sorted(self._writes.items()):
            if index > last:
                break
            if write.kind == "point":
                points.append(index)
            elif write.kind == "undo":
                points = [point for point in points if point < min(write.dropped)]
        return points

    def _base(self, last: int) -> int:
        """Number of the point that nothing before is kept of, after file number ``last``; 0: the unedited model."""
        first = min(self._writes, default=0)
        if not first or (first == 1 and self._writes[1].kind != "point"):
            return 0
        reset = any(first in write.dropped for index, write in self._writes.items() if index <= last)
        return 0 if reset else first

    def affected(self, numbers: Collection[int]) -> tuple[list[Write], list[int]]:
        """What has to go for some edits to be taken back.

        Args:
            numbers: Of the edits.

        Returns:
            The writes that wrote one of them, or an edit written together with one of them; and the numbers of other
            edits that go with those, to be written again.

        Raises:
            ValueError: If one of them is older than what is kept.
        """
        wanted, found = set(numbers), []
        for write in self.writes:
            if wanted & {*write.numbers, *write.kept_with}:
                found.append(write)
        known = {number for write in found for number in write.numbers}
        older = sorted(set(numbers) - known)
        if older:
            raise ValueError(
                f"The update of edit {older[0]} is no longer kept by itself (only what "
                f"came last is, up to {size_text(self.limit)}): take all edits back, or keep more (--updates.limit)."
            )
        return found, sorted(known - wanted)

    def steps(self, write: Write) -> list[Step]:
        """What a write did, in order.

        Raises:
            lit_edit.files.DamagedFileError: If its file is not what was written.
        """
        tensors, _ = load_tensors(self.path(write.index))
        parts: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            place, field = name.split(".", 1)
            parts.setdefault(int(place), {})[field] = tensor
        steps = []
        for _, part in sorted(parts.items()):
            layer, requests = int(part.pop("layer")), int(part.pop("requests"))
            steps.append(Step(layer, Update.from_state_dict(part), requests))
        return steps

    # Adding

    def add(
        self,
        kind: Kind,
        written: Sequence[Written],
        sites: Mapping[int, EditedWeight],
        numbers: Iterable[int] = (),
        kept_with: Iterable[int] = (),
        edits: int = 0,
    ) -> None:
        """Keeps a write that is in the weights.

        Args:
            kind: What wrote.
            written: What was done, in order.
            sites: All layers by index, as they are now.
            numbers: Edits that were written.
            kept_with: Earlier edits written together with them.
            edits: Edits handled so far.
        """
        if not self.limit:
            return
        tensors: dict[str, Tensor] = {}
        for i, step in enumerate(written):
            state = {"layer": torch.tensor(step.layer), "requests": torch.tensor(step.requests)}
            state |= step.update.state_dict()
            tensors |= {f"{i:03d}.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        sums = tuple((layer, checksum_of(sites[layer].stored)) for layer in sorted({step.layer for step in written}))
        self._keep(Write(len(self) + 1, kind, tuple(numbers), tuple(kept_with), (), edits, sums), tensors)
        last = max(self._points(len(self)), default=0)
        since = sum(size for index, size in self._sizes.items() if index > last)
        content = sum(site.stored.nbytes for site in sites.values() if site.edited)
        if since > _SPACING * content or self.size > self.limit:
            self.add_point(sites, edits)

    def add_point(self, sites: Mapping[int, EditedWeight], edits: int) -> None:
        """Keeps the weights as they are, and makes room."""
        if not self.limit:
            return
        tensors: dict[str, Tensor] = {}
        for layer, site in sites.items():
            if site.edited:
                state = site.state_dict()
                found = {name: state[name].contiguous() for name in ("stored", "remainder") if name in state}
                tensors |= {f"{layer}.{name}": tensor for name, tensor in found.items()}
                tensors[f"{layer}.counts"] = state["counts"]
        self._keep(Write(len(self) + 1, "point", edits=edits), tensors)
        for point in self._points(len(self)):
            if self.size <= self.limit:
                break
            for index in [index for index in self._writes if index < point]:
                self._remove(index)

    def drop(self, writes: Sequence[Write], edits: int) -> None:
        """Notes that writes were taken back."""
        dropped = tuple(write.index for write in writes)
        if dropped:
            self._keep(Write(len(self) + 1, "undo", dropped=dropped, edits=edits), {})

    def drop_all(self, edits: int) -> None:
        """Notes that all edits were taken back: the weights are those before the first."""
        base = self._base(len(self))
        dropped = (*([base] if base else []), *(write.index for write in self.writes))
        if dropped:
            self._keep(Write(len(self) + 1, "undo", dropped=dropped, edits=edits), {})

    def _keep(self, write: Write, tensors: Mapping[str, Tensor]) -> None:
        path = self.path(write.index)
        save_tensors(path, tensors, write.metadata())
        self._writes[write.index], self._sizes[write.index] = write, path.stat().st_size

    def _remove(self, index: int) -> None:
        self.path(index).unlink(missing_ok=True)
        del self._writes[index], self._sizes[index]

    # Going back

    def compose(
        self,
        sites: Mapping[int, EditedWeight],
        without: Collection[int] = (),
        until: int | None = None,
        verify: bool = False,
    ) -> list[Write]:
        """Writes to the layers what the log says, from the nearest point on, in the order of the writes.

        Weights, remainders, counts and ranks are then what they were after these writes, bit by bit on the same
        machine; remembered keys are left alone.

        Args:
            sites: Layers by index. One that no write is left of is put back as it was before the first edit.
            without: Numbers of writes to leave out.
            until: Number of the last write to apply; all if None.
            verify: Begin with the oldest weights there are, and compare layers with the checksums noted when they were
                written; of writes that came after one that was taken back later there is none that could agree.

        Returns:
            The writes that were applied after the point.

        Raises:
            ValueError: If what is asked for lies before all that is kept.
            lit_edit.files.DamagedFileError: If a file is not what was written, or a layer does not become what it was.
        """
        last = len(self) if until is None else until
        left = [write for write in self.standing(last) if write.index not in without]
        first = min([*without, last + 1])
        base = self._base(last)
        if base >= first:
            raise ValueError(
                f"The weights of that point are no longer kept (the limit of {size_text(self.limit)} was reached)."
            )
        points = [point for point in self._points(last) if point < first]
        point = base if verify else max(points, default=0)
        tensors = load_tensors(self.path(point))[0] if point else {}
        states: dict[int, dict[str, Tensor]] = {layer: {} for layer in sites}
        for name, tensor in tensors.items():
            layer, field = name.split(".", 1)
            states[int(layer)][field] = tensor
        for index, site in sites.items():
            site.go_to(states[index])
        applied = [write for write in left if write.index > point]
        for write in applied:
            for step in self.steps(write):
                site = sites[step.layer]
                site.write(step.update)
                if step.requests:
                    site.count(step.requests, step.update.rank(site.weight))
            if verify and self._as_it_was(write, last):
                for place, checksum in write.checksums:
                    if checksum_of(sites[place].stored) != checksum:
                        raise DamagedFileError(
                            f"{self.path(write.index)} does not make layer {place} what it was: the unedited model is "
                            "another, or this machine computes otherwise."
                        )
        return applied

    def _as_it_was(self, write: Write, last: int) -> bool:
        """Whether nothing that was in the weights before a write was taken back after it."""
        undos = [found for index, found in self._writes.items() if write.index < index <= last and found.dropped]
        return not any(index < write.index for undo in undos for index in undo.dropped)

    def until(self, edits: int) -> int:
        """Number of the last write before the edit after the first ``edits``."""
        later = [i for i, w in self._writes.items() if w.kind == "edit" and min(w.numbers) > edits]
        return min(later, default=len(self) + 1) - 1

    # Another place

    def move_to(self, folder: Path) -> None:
        """Goes on in another folder, with all files so far; what is there is replaced."""
        if folder == self._folder:
            return
        shutil.rmtree(folder, ignore_errors=True)
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)
        for index in sorted(self._writes):  # a log without files has no folder yet
            shutil.copyfile(self.path(index), folder / self.path(index).name)
        if self._temporary is not None:
            self._temporary()
            self._temporary = None
        self._folder = folder

    @classmethod
    def resumed(cls, source: Path, target: Path, last: int, limit: int = LIMIT) -> UpdateLog:
        """The log of a run that goes on from a checkpoint.

        Args:
            source: Folder of the run that made the checkpoint; it stays as it is, unless it is the target.
            target: Folder to go on in. What else is there is replaced.
            last: Number of the last file that belongs to the checkpoint.
            limit: See above.

        Returns:
            With the files up to ``last``; empty if they are not all there.
        """
        found = cls(source, limit)
        if source.resolve() == target.resolve() and len(found) >= last:
            found.cut(last)
        else:
            found = found.up_to(last)
            found.move_to(target)
        return found

    def up_to(self, last: int) -> UpdateLog:
        """The same log as it was after file number ``last``, for reading; empty if not all files up to it are there."""
        found = UpdateLog(None, self.limit)
        if len(self) >= last:
            found._folder = self._folder
            found._writes = {index: write for index, write in self._writes.items() if index <= last}
            found._sizes = {index: self._sizes[index] for index in found._writes}
        return found

    def cut(self, last: int) -> None:
        """Forgets all files after number ``last``: a run goes on from an earlier checkpoint."""
        for index in [index for index in self._writes if index > last]:
            self._remove(index)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to know."""
        return {"last": len(self)}


def checksum_of(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
