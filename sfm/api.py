"""The library: the verbs of the command line, and the models that configure them."""

from sfm.distill.config import DistillConfig
from sfm.distill.run import DistillResult, distill
from sfm.eval.config import EvaluateConfig
from sfm.eval.run import Evaluation, evaluate
from sfm.pipeline.config import ExtractConfig
from sfm.pipeline.extract import Extraction, extract
from sfm.stats_store.store import Entry, Store, open_store

__all__ = [
    "DistillConfig",
    "DistillResult",
    "Entry",
    "EvaluateConfig",
    "Evaluation",
    "ExtractConfig",
    "Extraction",
    "Store",
    "distill",
    "evaluate",
    "extract",
    "open_store",
]
