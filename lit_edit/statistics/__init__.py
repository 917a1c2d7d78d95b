"""Statistics of a model over a corpus: key covariances, and the gradient of the language-model loss.

Each is kept in verified files, and used again only for what it was made from.
"""

from lit_edit.statistics.collecting import Collector, StatisticsError, collect, sequences_of
from lit_edit.statistics.covariance import ENOUGH, KeyCollector, KeyCovariance, warn_if_few
from lit_edit.statistics.gradient import GradientCollector, WeightGradient
from lit_edit.statistics.store import Header, Statistics, cache_folder

__all__ = [
    "ENOUGH",
    "Collector",
    "GradientCollector",
    "Header",
    "KeyCollector",
    "KeyCovariance",
    "Statistics",
    "StatisticsError",
    "WeightGradient",
    "cache_folder",
    "collect",
    "sequences_of",
    "warn_if_few",
]
