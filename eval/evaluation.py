"""``sfm evaluate``: distilled images + statistics -> accuracies."""

import functools
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.cpu_threads import limit_cpu_threads
from sfm.backbones.execution.preparation import optimize_for_cpu_inference
from sfm.errors import InputError
from sfm.eval.caveats import list_caveats
from sfm.eval.combined_results import combine_evaluations, read_evaluation_if_exists
from sfm.eval.config import EvaluateConfig, EvaluateOptions, EvaluateRunsConfig
from sfm.eval.dd_ranking import add_label_robust_scores
from sfm.eval.distilled_run import UNKNOWN_BACKBONE, DistilledRun, ForeignRecord, read_distilled_run
from sfm.eval.evaluation_job import EvaluationJob, prepare_evaluation_job, require_same_held_out_data
from sfm.eval.foreign_run import (
    ForeignRun,
    open_foreign_run_directory,
    prepare_foreign_run,
    require_path_exists,
    write_foreign_run,
)
from sfm.eval.image_set_labels import ImageSetLabeller
from sfm.eval.image_sets import (
    ImageSet,
    make_neighbour_image_set,
    make_random_and_nearest_image_sets,
    read_exemplars,
)
from sfm.eval.output_files import make_parent_and_require_writable, write_output
from sfm.eval.partial_results import get_work_folder_path
from sfm.eval.recorded_config import make_recorded_config
from sfm.eval.result import (
    AccuracyRow,
    EntryRecord,
    Evaluation,
    FullDataRow,
    NotWrittenError,
    Provenance,
    SourceEntryRecord,
    format_evaluation_json,
    mark_unseen_rows,
)
from sfm.eval.row_training import KeyedViewFeatures, RowTrainer, WriteFailure, compute_image_set_features
from sfm.eval.scores import load_held_out_samples, make_full_data_rows
from sfm.eval.view_features import LabelledImages
from sfm.eval.work_folder import WorkFolder
from sfm.events import ProgressCallback, no_progress
from sfm.foreign_images import ForeignImages, ReadForeignImages
from sfm.locking import lock_output_folder, lock_output_path
from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.store import open_store
from sfm.text import escape_non_utf8

__all__ = ["Evaluation", "NotWrittenError", "evaluate_runs_with_reader", "evaluate_with_reader"]

EVALUATION_PACKAGES = ("sfm-distill", "torch", "timm", "numpy", "pillow")


def refuse_foreign_images(path: Path, _canvas_pixels: int) -> ForeignImages:
    """Refuse to read images of another program: :func:`evaluate_with_reader` without a reader does.

    Raises
    ------
    InputError
        Always.
    """
    raise InputError(f"no run directory at {path}: give the --out of a `sfm distill`")


def evaluate_with_reader(
    config: EvaluateConfig,
    progress: ProgressCallback = no_progress,
    read_foreign_images: ReadForeignImages = refuse_foreign_images,
) -> Evaluation:
    """Train on distilled images, test on the held-out features in the store, write ``evaluation.json``.

    Earlier rows of the file stay, unless they are measured again. Features of views and finished rows are
    kept beside it until the command completes: an interrupted evaluation resumes, and ends with the same
    numbers.

    The features of all augmented views are computed once per image set and backbone; all epochs and modes
    train on them. Heads of different seeds share no view; projectors of all seeds share theirs. The last
    epoch counts. No test image is decoded.

    Parameters
    ----------
    config : EvaluateConfig
    progress : ProgressCallback
        Called with the number of views computed, and of epochs and blocks trained.
    read_foreign_images : callable
        Reads images that are no run directory, see :mod:`sfm.eval.foreign_run`. The functions of `sfm.api`
        and the command line have a reader.

    Returns
    -------
    Evaluation
        The rows of this evaluation alone.

    Raises
    ------
    InputError
        If the directory is not a complete run, images of another program cannot be read or matched, the store
        is another one or lacks an entry, a backbone differs from that of its entry, or the result cannot be
        written, which is tried before anything is trained.
    NotWrittenError
        If the result cannot be written in the end; holds it.
    """
    (evaluation,) = evaluate_runs_with_reader(
        EvaluateRunsConfig.model_validate(config.model_dump()), progress, read_foreign_images
    )
    return evaluation


def evaluate_runs_with_reader(
    config: EvaluateRunsConfig,
    progress: ProgressCallback = no_progress,
    read_foreign_images: ReadForeignImages = refuse_foreign_images,
) -> list[Evaluation]:
    """Evaluate several runs of the same data on the same backbones, see :func:`evaluate_with_reader`.

    All runs are checked before the first is trained on; a backbone is loaded once.

    Returns
    -------
    list of Evaluation
        The rows of this command alone, one evaluation per run;
        :func:`~sfm.eval.backbone_matrix.make_matrix` arranges them. The files also hold rows of earlier
        commands, see :func:`~sfm.eval.combined_results.combine_evaluations`.

    Raises
    ------
    InputError
        As :func:`evaluate_with_reader`; or if runs are of different data, or another process is writing one.
    NotWrittenError
        If all was evaluated and a result cannot be written; holds the results.
    """
    run_configs = config.split_by_run()
    for run_config in run_configs:
        require_path_exists(run_config.run)
    with ExitStack() as locks:
        locks.enter_context(limit_cpu_threads(config.threads))
        for run_config in run_configs:
            if not run_config.is_run_directory:
                locks.enter_context(lock_output_folder(run_config.result_path.parent))
            elif run_config.out:
                locks.enter_context(lock_output_path(run_config.result_path))
            elif run_config.run.is_dir():
                locks.enter_context(lock_output_folder(run_config.run))
        return evaluate_locked_runs(run_configs, config, progress, read_foreign_images)


def evaluate_locked_runs(
    run_configs: Sequence[EvaluateConfig],
    shared_options: EvaluateOptions,
    progress: ProgressCallback,
    read_foreign_images: ReadForeignImages = refuse_foreign_images,
) -> list[Evaluation]:
    """Evaluate runs whose result files are locked, see :func:`evaluate_runs_with_reader`."""
    run_directories = {c.run: read_distilled_run(c.run) for c in run_configs if c.is_run_directory}
    require_use_of_foreign_options(shared_options, list(run_directories.values()), len(run_configs))
    store = open_store(shared_options.store)
    summaries = store.list_summaries()
    own_records = [
        run.record for run in run_directories.values() if not isinstance(run.record, ForeignRecord)
    ]
    foreign_runs: dict[Path, ForeignRun] = {}
    for run_config in run_configs:
        run_directory = run_directories.get(run_config.run)
        if run_directory is None:
            foreign_runs[run_config.run] = prepare_foreign_run(
                run_config, store, summaries, own_records, read_foreign_images
            )
        elif isinstance(run_directory.record, ForeignRecord):
            foreign_runs[run_config.run] = open_foreign_run_directory(
                run_config, run_config.run, run_directory, store, summaries
            )
    runs = [foreign_runs[c.run].run if c.run in foreign_runs else run_directories[c.run] for c in run_configs]
    run_configs = [foreign_runs[c.run].config if c.run in foreign_runs else c for c in run_configs]

    @functools.cache
    def load_cached(spec: str, image_size: int | None) -> Backbone:
        backbone = load_backbone(spec, image_size=image_size, device=shared_options.device, progress=progress)
        return optimize_for_cpu_inference(backbone)

    jobs = [
        prepare_evaluation_job(run_config, run, store, summaries, load_cached)
        for run_config, run in zip(run_configs, runs, strict=True)
    ]
    jobs = [
        replace(job, notes=[*foreign_runs[job.config.run].notes, *job.notes])
        if job.config.run in foreign_runs
        else job
        for job in jobs
    ]
    require_same_held_out_data(jobs)
    work_folders = [WorkFolder(get_work_folder_path(run_config.result_path)) for run_config in run_configs]
    for run_config, run in zip(run_configs, runs, strict=True):
        make_parent_and_require_writable(run_config.result_path)
        require_replaceable_result(run_config, run)
    for foreign_run in foreign_runs.values():
        write_foreign_run(foreign_run)
    evaluations: list[Evaluation] = []
    write_failures: list[str] = []
    for job, work_folder in zip(jobs, work_folders, strict=True):
        job_progress = progress if len(jobs) == 1 else prefix_progress_stage(progress, job.config.run.name)
        evaluation, job_failures = run_evaluation_job(job, work_folder, job_progress)
        evaluations.append(evaluation)
        write_failures += job_failures
    if write_failures:
        raise NotWrittenError("; ".join(dict.fromkeys(write_failures)), evaluations)
    for work_folder in work_folders:
        work_folder.delete_used_files()
    return evaluations


def require_use_of_foreign_options(
    options: EvaluateOptions, run_directories: Sequence[DistilledRun], run_count: int
) -> None:
    """Refuse options for images of other programs where there are only runs of `sfm distill`.

    Raises
    ------
    InputError
        If they are given for nothing.
    """
    own = [run for run in run_directories if not isinstance(run.record, ForeignRecord)]
    given = {"--dataset": options.dataset, "--distilled-on": options.distilled_on}
    named = [name for name, value in given.items() if value]
    if named and len(own) == run_count:
        raise InputError(
            f"{' and '.join(named)}: for images of other programs; a run of `sfm distill` names its own"
        )


def require_replaceable_result(config: EvaluateConfig, run: DistilledRun) -> None:
    """Refuse to replace a file that is no result, or, with `--out`, the result of other images.

    In the run directory itself, rows of images that were replaced since are dropped, see
    :func:`~sfm.eval.combined_results.combine_evaluations`.

    Raises
    ------
    InputError
        If the result file is one of those.
    """
    previous = read_evaluation_if_exists(config.result_path)
    if config.out and previous and previous.provenance.images != compute_array_digest(run.pixels):
        raise InputError(
            f"--out {config.out}: {config.result_path} holds the result of other images than those in "
            f"{config.run}: give another place"
        )


def prefix_progress_stage(progress: ProgressCallback, run_name: str) -> ProgressCallback:
    """Return a progress callback that puts the name of a run before every stage."""
    return lambda event: progress(replace(event, stage=f"{run_name}: {event.stage}"))


def run_evaluation_job(
    job: EvaluationJob, work_folder: WorkFolder, progress: ProgressCallback
) -> tuple[Evaluation, list[WriteFailure]]:
    """Train, score and write all rows of one run.

    Returns
    -------
    Evaluation
        The rows, whether they could be written or not.
    list of str
        Messages about files that could not be written.
    """
    started = time.perf_counter()
    config, run = job.config, job.run
    distilled = ImageSet("distilled", LabelledImages(run.pixels, run.labels), config.seeds)
    exemplars = read_exemplars(job.first_source_statistics)
    real_image_sets, missing_notes = make_random_and_nearest_image_sets(
        exemplars, run.images_per_class, config
    )
    writer = "they were read" if isinstance(run.record, ForeignRecord) else "sfm distill wrote them"
    edited_notes = (
        [f"The images are not as {writer}: they were edited since."] if job.has_edited_images else []
    )
    feature_cache: dict[str, KeyedViewFeatures] = {}

    def compute_distilled_features(backbone: Backbone) -> KeyedViewFeatures:
        if backbone.card.hash not in feature_cache:
            feature_cache[backbone.card.hash] = compute_image_set_features(
                backbone, distilled, config.mode, config, work_folder, progress
            )
        return feature_cache[backbone.card.hash]

    labeller = ImageSetLabeller(job.soft_labels, job.teacher, progress) if job.soft_labels else None
    rows: list[AccuracyRow] = []
    full_data: list[FullDataRow] = []
    write_failures: list[str] = []
    for eval_backbone in job.eval_backbones:
        samples = load_held_out_samples(eval_backbone)
        full_data_rows = make_full_data_rows(eval_backbone, samples)
        full_data += full_data_rows
        trainer = RowTrainer(
            job, eval_backbone, samples, full_data_rows[0].top1, work_folder, progress, labeller
        )
        for mode in dict.fromkeys(config.mode):
            rows.append(
                trainer.read_or_train_row(distilled, mode, compute_distilled_features, write_failures)
            )
        neighbour_set = make_neighbour_image_set(run, exemplars, eval_backbone.backbone, config, work_folder)
        for image_set in (*real_image_sets, *([neighbour_set] if neighbour_set else [])):
            rows += trainer.read_or_train_baseline_rows(image_set, write_failures)
    provenance = make_provenance(job, time.perf_counter() - started)
    caveats = list_caveats(rows, full_data, provenance.entries)
    evaluation = Evaluation(
        config=make_recorded_config(config, job.store.url),
        rows=rows,
        full_data=full_data,
        notes=[*edited_notes, *job.notes, *missing_notes, *caveats],
        provenance=provenance,
    )
    evaluation = add_label_robust_scores(mark_unseen_rows(evaluation))
    try:
        combined = combine_evaluations(
            evaluation, read_evaluation_if_exists(config.result_path), len(run.pixels)
        )
        write_output(config.result_path, format_evaluation_json(combined).encode())
        evaluation = evaluation.model_copy(update={"changes": combined.changes})
    except InputError as error:
        write_failures.append(str(error))
    return evaluation, write_failures


def make_provenance(job: EvaluationJob, elapsed_seconds: float) -> Provenance:
    """Return the provenance of the accuracies: store, entries, images, versions, device."""
    device = job.eval_backbones[0].backbone.device
    source_entry, record = job.first_source_statistics.entry, job.run.record
    is_known = record.knows_backbones
    foreign_record = record if isinstance(record, ForeignRecord) else None
    return Provenance(
        store=escape_non_utf8(job.store.url),
        dataset=source_entry.dataset.name,
        fingerprint=source_entry.summary.fingerprint,
        role=source_entry.summary.role,
        distilled_from=source_entry.summary.entry_digest,
        distilled_on=source_entry.backbone.spec if is_known else UNKNOWN_BACKBONE,
        distilled_on_known=is_known,
        image_source=foreign_record.source if foreign_record else None,
        ipc=record.ipc,
        images_per_class=foreign_record.images_per_class if foreign_record else None,
        images=compute_array_digest(job.run.pixels),
        edited=job.has_edited_images,
        entries=[
            EntryRecord(
                backbone=s.backbone.card.spec,
                backbone_hash=s.backbone.card.hash,
                image_size=s.backbone.card.preprocessing.input_size,
                entry_digest=s.statistics.entry.summary.entry_digest,
                held_out_samples=len(s.statistics.read_held_out_arrays().subset_labels),
                train_per_class=s.statistics.entry.dataset.train_samples
                / len(s.statistics.entry.dataset.class_ids),
            )
            for s in job.eval_backbones
        ],
        versions={"python": platform.python_version()}
        | {name: version(name) for name in EVALUATION_PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seconds=elapsed_seconds,
        distilled_on_hash=source_entry.backbone.hash if is_known else None,
        distilled_at=source_entry.backbone.preprocessing.input_size if is_known else None,
        distilled_from_entries=None
        if not is_known
        else [
            SourceEntryRecord(
                backbone=source.entry.backbone.spec,
                backbone_hash=source.entry.backbone.hash,
                image_size=source.entry.backbone.preprocessing.input_size,
                entry_digest=source.entry.summary.entry_digest,
            )
            for source in job.all_source_statistics
        ],
        evaluated_on=[s.backbone.card.hash for s in job.eval_backbones],
    )
