"""Statistics of a model over a corpus: key covariances, and the gradient of the language-model loss.

Each is kept in checked files, and used again only for what it was made from.
"""

from lit_edit.statistics.collect import sequences_of, spoken
from lit_edit.statistics.covariance import ENOUGH, KeyCovariance, collect_covariances
from lit_edit.statistics.files import (
    COMMAND,
    FORMAT_VERSION,
    Kind,
    StatisticsError,
    StatisticsHeader,
    corpus_sha256,
    load_covariances,
    load_gradients,
    model_fingerprint,
    save_covariances,
    save_gradients,
    tokenizer_fingerprint,
)
from lit_edit.statistics.gradient import WeightGradient, collect_gradients
from lit_edit.statistics.kept import GRADIENTS, KEY_COVARIANCES, Statistics, covariances, gradients

__all__ = [
    "COMMAND",
    "ENOUGH",
    "FORMAT_VERSION",
    "GRADIENTS",
    "KEY_COVARIANCES",
    "KeyCovariance",
    "Kind",
    "Statistics",
    "StatisticsError",
    "StatisticsHeader",
    "WeightGradient",
    "collect_covariances",
    "collect_gradients",
    "corpus_sha256",
    "covariances",
    "gradients",
    "load_covariances",
    "load_gradients",
    "model_fingerprint",
    "save_covariances",
    "save_gradients",
    "sequences_of",
    "spoken",
    "tokenizer_fingerprint",
]
