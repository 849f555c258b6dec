"""The public library: one function and one config per command of ``sfm``.

A function takes its config and an optional progress callback, and returns what it wrote. It raises
:class:`sfm.errors.InputError` where the command line exits with status 2, and
:class:`sfm.errors.DamageError` where it exits with status 1.

The library changes no setting of your process. The command line does, because it owns its process. Call these
in your program for the same speed, memory and bits:

``sfm.backbones.execution.process_settings.configure_process(threads)``
    Before torch is imported, and so before a function is imported from here. It lets threads sleep while they
    wait if the machine is busy (``OMP_WAIT_POLICY``), reuses freed memory (``mallopt``), and makes cuBLAS
    deterministic (``CUBLAS_WORKSPACE_CONFIG``).
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

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULE_BY_NAME = {
    "DistillConfig": "sfm.distill.config",
    "DistillResult": "sfm.distill.run",
    "DistillationEstimate": "sfm.distill.run_estimate",
    "Distiller": "sfm.distill.distiller",
    "Entry": "sfm.stats_store.store",
    "EvaluateConfig": "sfm.eval.config",
    "EvaluateRunsConfig": "sfm.eval.config",
    "Evaluation": "sfm.eval.result",
    "ExportConfig": "sfm.eval.export.config",
    "ExportResult": "sfm.eval.export.run_export",
    "ExtractConfig": "sfm.pipeline.extract_config",
    "ExtractionEstimate": "sfm.pipeline.dry_run",
    "ExtractionResult": "sfm.pipeline.extract",
    "ReportConfig": "sfm.eval.report.config",
    "ResolvedDistillConfig": "sfm.distill.resolved_config",
    "StepOutput": "sfm.distill.train_step",
    "Store": "sfm.stats_store.store",
    "distill": "sfm.distill.run",
    "estimate_distillation": "sfm.distill.run_estimate",
    "estimate_extraction": "sfm.pipeline.dry_run",
    "evaluate": "sfm.image_evaluation",
    "evaluate_runs": "sfm.image_evaluation",
    "export": "sfm.eval.export.run_export",
    "extract": "sfm.pipeline.extract",
    "make_matrix": "sfm.eval.backbone_matrix",
    "open_entries_and_backbones": "sfm.distill.backbone_entries",
    "open_entry_and_backbone": "sfm.distill.backbone_entries",
    "open_store": "sfm.stats_store.store",
    "report": "sfm.eval.report.page",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and the stages are slow to import."""
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_BY_NAME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names too, which may not have been imported yet."""
    return sorted({*globals(), *__all__})
