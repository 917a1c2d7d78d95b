"""Values v*: what the edited layers should put out at the subject's last token, found by gradient."""

from lit_edit.editors.values.constraints import Constraint, NormClamp, NormMatched
from lit_edit.editors.values.elastic_net import ElasticNet
from lit_edit.editors.values.optimizer import ValueOptimizer, ValueProblem, Values, block_outputs
from lit_edit.editors.values.penalties import OEdit, Penalty
from lit_edit.editors.values.schedules import EAC, Descent, Plain, Schedule, Stage, anchors

__all__ = [
    "EAC",
    "Constraint",
    "Descent",
    "ElasticNet",
    "NormClamp",
    "NormMatched",
    "OEdit",
    "Penalty",
    "Plain",
    "Schedule",
    "Stage",
    "ValueOptimizer",
    "ValueProblem",
    "Values",
    "anchors",
    "block_outputs",
]
