"""CounterFact (Meng et al. 2022): counterfactual statements about well-known subjects."""

from lit_edit.datamodules.base import EditDataModule
from lit_edit.datamodules.records import COUNTERFACT, FLAT


class CounterFactDataModule(EditDataModule):
    """CounterFact, in its original form or as the flat files of the editing toolkits.

    The arguments are those of `EditDataModule`; without a path, the embedded file of the original form is read.
    """

    forms = (COUNTERFACT, FLAT)
    embedded = "counterfact.json"
