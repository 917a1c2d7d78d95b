"""Anybody's own facts: a JSON, JSON Lines or CSV file, or a Hugging Face data set."""

from lit_edit.datamodules.base import EditDataModule, OnBadRecord
from lit_edit.datamodules.records import FLAT, FLAT_FIELDS


class FactsDataModule(EditDataModule):
    """A file of facts to write into a model.

    Each record needs ``prompt`` (with ``{}`` or containing the subject), ``subject`` and ``target_new``. It may have
    ``target_true`` (or ``ground_truth``), ``rephrase_prompt`` (or ``rephrases``) and ``locality_prompt`` with
    ``locality_ground_truth``, each one text or a list (in CSV: separated by ``" | "``), a ``case_id`` to be known by,
    and a ``relation`` (or ``relation_id``): two facts about one subject in one relation are then known to contradict
    each other, in whatever words. ``Target New`` or ``Subject`` are the same columns. Others are left unused, which a
    warning says.

    Args:
        path: File, as for `EditDataModule`; it must be given.
        n_edits: Number of facts to take; all by default.
        batch_size: As for `EditDataModule`.
        seed: As for `EditDataModule`.
        offset: As for `EditDataModule`.
        on_bad_record: As for `EditDataModule`.

    Raises:
        ValueError: if no path is given or an argument is out of range.
    """

    forms = (FLAT,)
    fields = FLAT_FIELDS

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
