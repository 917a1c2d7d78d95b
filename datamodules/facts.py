"""Anybody's own facts: a JSON, JSON Lines or CSV file, or a Hugging Face data set."""

from lit_edit.datamodules.base import EditDataModule, OnBadRecord
from lit_edit.datamodules.records import FLAT


class FactsDataModule(EditDataModule):
    """A file of facts to write into a model.

    Each record needs ``prompt`` (with ``{}`` or containing the subject), ``subject`` and ``target_new``. It may have
    ``target_true`` (or ``ground_truth``), ``rephrase_prompt`` (or ``rephrases``) and ``locality_prompt`` with
    ``locality_ground_truth``, each one text or a list (in CSV: separated by ``" | "``); other columns are ignored.

    Args:
        path: the file, as for `EditDataModule`; it must be given.
        n_edits: how many facts to take; all of them by default.
        batch_size: as for `EditDataModule`.
        seed: as for `EditDataModule`.
        offset: as for `EditDataModule`.
        on_bad_record: as for `EditDataModule`.

    Raises:
        ValueError: if no path is given or an argument is out of range.
    """

    forms = (FLAT,)

    def __init__(
        self,
        path: str | None = None,
        n_edits: int | None = None,
        batch_size: int = 1,
        seed: int | None = None,
        offset: int = 0,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        super().__init__(path, n_edits, batch_size, seed, offset, on_bad_record)
