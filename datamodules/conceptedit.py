"""ConceptEdit (Wang et al. 2024): the definition of a concept is replaced by that of another."""

from pathlib import Path
from typing import Literal, get_args

from lit_edit.datamodules.base import EditDataModule, OnBadRecord
from lit_edit.datamodules.records import CONCEPTEDIT

from lit_edit.requests import RequestError

ConceptModule = Literal["intra", "inter"]


class ConceptEditDataModule(EditDataModule):
    """ConceptEdit, published as files ``final_<model>_<module>.json``; without a path, the embedded one of that form.

    Args:
        module: Where the new definition was taken from: a concept of the same superordinate concept (``intra``) or of
            another (``inter``). It chooses between the embedded files, or between those in the folder ``path``; a
            ``path`` that is a file is read whatever ``module`` says.
        path: As for `EditDataModule`, or a folder with one ``final_*_<module>.json``.
        n_edits: Number of concepts to take; all by default.
        batch_size: As for `EditDataModule`.
        seed: As for `EditDataModule`.
        offset: As for `EditDataModule`.
        on_bad_record: As for `EditDataModule`.

    Raises:
        ValueError: if an argument is out of range.
    """

    forms = (CONCEPTEDIT,)

    def __init__(
        self,
        module: ConceptModule = "inter",
        path: str | None = None,
        n_edits: int | None = None,
        batch_size: int = 1,
        seed: int | None = None,
        offset: int = 0,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        if module not in get_args(ConceptModule):
            raise ValueError(f"module is {module!r}; it must be 'intra' or 'inter'.")
        self.module = module
        super().__init__(path, n_edits, batch_size, seed, offset, on_bad_record)

    def embedded_file(self) -> str:
        """The name of the embedded file for this module."""
        return f"final_world_{self.module}.json"

    def _resolve(self, path: str) -> str | Path:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            return path
        pattern = f"final_*_{self.module}.json"
        found = sorted(folder.glob(pattern))
        if len(found) != 1:
            names = f" ({', '.join(file.name for file in found)})" if found else ""
            raise RequestError(f"{folder}: the folder has {len(found)} files {pattern}{names}; name the file to read.")
        return found[0]
