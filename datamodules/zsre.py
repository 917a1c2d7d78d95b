"""ZsRE (Levy et al. 2017): questions about a subject, as prepared for editing by Mitchell et al. 2022 and KnowEdit."""

from lit_edit.datamodules.base import EditDataModule, OnBadRecord
from lit_edit.datamodules.files import Record
from lit_edit.datamodules.records import FLAT, MEND, without_nq_prefix

from lit_edit.requests import EditRequest


class ZsREDataModule(EditDataModule):
    """ZsRE, in MEND's form or in KnowEdit's; without a path, the embedded file of MEND's form.

    Args:
        path: As for `EditDataModule`.
        n_edits: As for `EditDataModule`.
        batch_size: As for `EditDataModule`.
        seed: As for `EditDataModule`.
        offset: As for `EditDataModule`.
        on_bad_record: As for `EditDataModule`.
        keep_loc_prefix: Keep the ``nq question: `` that MEND's files put before the locality questions. Models that
            were not trained on it are asked the question itself, so it is taken off by default.
    """

    forms = (MEND, FLAT)
    embedded = "zsre.json"

    def __init__(
        self,
        path: str | None = None,
        n_edits: int | None = 100,
        batch_size: int = 1,
        seed: int | None = None,
        offset: int = 0,
        on_bad_record: OnBadRecord = "raise",
        keep_loc_prefix: bool = False,
    ) -> None:
        super().__init__(path, n_edits, batch_size, seed, offset, on_bad_record)
        self.keep_loc_prefix = keep_loc_prefix

    def read_record(self, record: Record, source: str, default_id: str) -> EditRequest:
        """Turn one record into a request, without MEND's prefix unless it is to be kept."""
        request = super().read_record(record, source, default_id)
        return request if self.keep_loc_prefix else without_nq_prefix(request)
