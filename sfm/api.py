"""The library: the verbs of the command line, and the models that configure them."""

from sfm.distill.config import DistillConfig
from sfm.distill.run import DistillResult, distill
from sfm.eval.config import EvaluateConfig, EvaluateRunsConfig
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.run import Exported, export
from sfm.eval.matrix import matrix
from sfm.eval.report.config import ReportConfig
from sfm.eval.report.page import report
from sfm.eval.run import Evaluation, evaluate, evaluate_runs
from sfm.pipeline.dry_run import ExtractionEstimate, estimate_extraction
from sfm.pipeline.extract import ExtractionResult, extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.stats_store.store import Entry, Store, open_store

__all__ = [
    "DistillConfig",
    "DistillResult",
    "Entry",
    "EvaluateConfig",
    "EvaluateRunsConfig",
    "Evaluation",
    "ExportConfig",
    "Exported",
    "ExtractConfig",
    "ExtractionEstimate",
    "ExtractionResult",
    "ReportConfig",
    "Store",
    "distill",
    "estimate_extraction",
    "evaluate",
    "evaluate_runs",
    "export",
    "extract",
    "matrix",
    "open_store",
    "report",
]
