"""Data modules: files of edit requests in their published forms.

`CounterFactDataModule`, `ZsREDataModule` and `ConceptEditDataModule` read the published benchmarks (or, without a path,
the small embedded files of the same form), `FactsDataModule` reads anybody's own facts, and `EditDataModule` is what
they share: it reads a file, checks every record before the first edit, and hands out batches that a run resumed in
the middle of an epoch takes up where it left off.
"""

if __name__ != "lit_edit.datamodules":
    raise ImportError(
        "Import 'lit_edit.datamodules' instead of 'datamodules': the folder at the top of the repository is installed "
        "as part of lit_edit, and a second copy of its classes would not be the same classes."
    )

from lit_edit.datamodules.base import EditDataModule
from lit_edit.datamodules.conceptedit import ConceptEditDataModule
from lit_edit.datamodules.counterfact import CounterFactDataModule
from lit_edit.datamodules.facts import FactsDataModule
from lit_edit.datamodules.files import read_records
from lit_edit.datamodules.loader import EditBatch, EditLoader
from lit_edit.datamodules.records import (
    CONCEPTEDIT,
    COUNTERFACT,
    FLAT,
    MEND,
    Form,
    conceptedit_request,
    counterfact_request,
    flat_request,
    mend_request,
    without_nq_prefix,
)
from lit_edit.datamodules.zsre import ZsREDataModule

__all__ = [
    "CONCEPTEDIT",
    "COUNTERFACT",
    "FLAT",
    "MEND",
    "ConceptEditDataModule",
    "CounterFactDataModule",
    "EditBatch",
    "EditDataModule",
    "EditLoader",
    "FactsDataModule",
    "Form",
    "ZsREDataModule",
    "conceptedit_request",
    "counterfact_request",
    "flat_request",
    "mend_request",
    "read_records",
    "without_nq_prefix",
]
