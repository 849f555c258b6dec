"""The public library: one function and one config per command of ``sfm``.

A function takes its config and an optional progress callback, and returns what it wrote. It raises
:class:`sfm.errors.InputError` where the command line exits with status 2, and
:class:`sfm.errors.DamageError` where it exits with status 1.

The library changes no setting of your process. The command line does, because it owns its process. Call these
in your program for the same speed, memory and bits:

``sfm.backbones.execution.process_settings.configure_process(threads)``
    Before torch is imported, and so before this module is. It lets threads sleep while they wait if the
    machine is busy (``OMP_WAIT_POLICY``), reuses freed memory (``mallopt``), and makes cuBLAS deterministic
    (``CUBLAS_WORKSPACE_CONFIG``).
``sfm.backbones.execution.allocator.configure_malloc_single_heap()``
    Before :func:`extract` with inputs above 128 px on a CPU.

Examples
--------
>>> from sfm.backbones.execution.process_settings import configure_process
>>> configure_process()  # doctest: +SKIP
>>> from sfm.api import DistillConfig, distill
>>> config = DistillConfig(store="./store", backbone="lite0", dataset="birds", out="birds-1")
>>> distill(config)  # doctest: +SKIP
"""

from sfm.distill.backbone_entries import open_entries_and_backbones, open_entry_and_backbone
from sfm.distill.config import DistillConfig
from sfm.distill.distiller import Distiller
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.run import DistillResult, distill
from sfm.distill.run_estimate import DistillationEstimate, estimate_distillation
from sfm.distill.train_step import StepOutput
from sfm.eval.backbone_matrix import make_matrix
from sfm.eval.config import EvaluateConfig, EvaluateRunsConfig
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.run_export import ExportResult, export
from sfm.eval.report.config import ReportConfig
from sfm.eval.report.page import report
from sfm.eval.result import Evaluation
from sfm.image_evaluation import evaluate, evaluate_runs
from sfm.pipeline.dry_run import ExtractionEstimate, estimate_extraction
from sfm.pipeline.extract import ExtractionResult, extract
from sfm.pipeline.extract_config import ExtractConfig
from sfm.stats_store.store import Entry, Store, open_store

__all__ = [
    "DistillConfig",
    "DistillResult",
    "DistillationEstimate",
    "Distiller",
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
    "ResolvedDistillConfig",
    "StepOutput",
    "Store",
    "distill",
    "estimate_distillation",
    "estimate_extraction",
    "evaluate",
    "evaluate_runs",
    "export",
    "extract",
    "make_matrix",
    "open_entries_and_backbones",
    "open_entry_and_backbone",
    "open_store",
    "report",
]
