"""The library: the verbs of the command line, and the models that configure them."""

from sfm.distill.config import DistillConfig
from sfm.distill.run import DistillResult, distill
from sfm.eval.backbone_matrix import make_matrix
from sfm.eval.config import EvaluateConfig, EvaluateRunsConfig
from sfm.eval.evaluation import Evaluation, evaluate, evaluate_runs
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.run_export import ExportResult, export
from sfm.eval.report.config import ReportConfig
from sfm.eval.report.page import report
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
    "ExportResult",
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
    "make_matrix",
    "open_store",
    "report",
]
