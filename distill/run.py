"""Run a distillation: a store's statistics and a backbone in, a directory of images out."""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sfm.atomic import require_folder_is_not_link
from sfm.backbones.build import Backbone
from sfm.backbones.execution.cpu_threads import limit_cpu_threads
from sfm.backbones.execution.wait_policy import CoreContentionMonitor
from sfm.distill.backbone_entries import open_entries_and_backbones
from sfm.distill.config import DistillConfig
from sfm.distill.distilled_images import (
    compute_images_digest,
    iterate_decoded_pixels,
    make_class_folder_names,
    write_images,
)
from sfm.distill.distiller import Distiller
from sfm.distill.execution_choice import require_no_unwanted_fallback
from sfm.distill.objective import ClassCentres
from sfm.distill.preview import draw_preview_png, gather_growth_sheet_levels, write_growth_sheet
from sfm.distill.process_group import DistributedEnv, ProcessGroup, init_process_group, read_distributed_env
from sfm.distill.record import (
    list_reproducibility_notes,
    make_run_record_without_result,
    read_peak_memory_bytes,
    read_run_record,
)
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.run_checkpoints import (
    RunCheckpoint,
    delete_old_checkpoints,
    find_newest_intact_checkpoint,
    read_state_dict,
    require_resumable_config,
    save_checkpoint_and_delete_old,
)
from sfm.distill.run_files import (
    log_write_errors_as_warnings,
    translate_run_write_errors,
    write_run_file,
    write_run_folder,
)
from sfm.distill.run_labels import require_classifier_for_soft_labels, write_soft_labels_and_update_record
from sfm.distill.stop_signals import DistillInterrupt as DistillInterrupt
from sfm.distill.stop_signals import catch_stop_signals
from sfm.distill.target_estimate import estimate_targets
from sfm.distill.target_file import TARGET_FILE, encode_targets, read_target_file
from sfm.distill.training_history import append_and_flush_history_row, open_truncated_history, sync_history
from sfm.distill.worker_processes import spawn_workers
from sfm.errors import InputError
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.locking import lock_output_folder
from sfm.paths import is_hidden_or_system_file
from sfm.text import escape_non_utf8_in_json


@dataclass(frozen=True)
class DistillResult:
    """A finished run.

    Attributes
    ----------
    out : Path
        Its directory.
    record : dict
        What its ``run.json`` holds.
    """

    out: Path
    record: dict[str, Any]


def distill(config: DistillConfig, progress: ProgressCallback = no_progress) -> DistillResult:
    """Distil a dataset into a few images per class, from the statistics in a store.

    Reads the store and the backbone, and no image. Resuming a finished run returns it as it is; resuming
    where there is nothing yet starts from the beginning. :class:`~sfm.distill.distiller.Distiller` does the
    same one step at a time, without files.

    Parameters
    ----------
    config : DistillConfig
        What to distil, how, and into which directory.
    progress : ProgressCallback
        Called after every step.

    Returns
    -------
    DistillResult

    Raises
    ------
    InputError
        If the store holds no such entry or not what the run needs, the backbones' entries are not of the same
        data, the directory holds something else, the run to resume is another one, the loss is not finite, or
        the directory cannot be written or is being written by another process; or if `dry_run` is set.
    DistillInterrupt
        If SIGINT or SIGTERM came (main thread only); the run can be resumed.
    """
    if config.dry_run:
        raise InputError("dry_run is set: call sfm.distill.run_estimate.estimate_distillation")
    env = read_distributed_env()
    if env:
        config = config.model_copy(update={"devices": env.world_size})
    elif config.devices > 1:
        return spawn_workers(partial(distill_in_process, config), config.devices, progress)
    return distill_in_process(config, env, progress)


def distill_in_process(
    config: DistillConfig, env: DistributedEnv | None, progress: ProgressCallback
) -> DistillResult:
    """Distil in this process: all classes, or those of its rank.

    Every process returns the result; the first one writes it and reports progress.

    Raises
    ------
    InputError, DistillInterrupt
        See :func:`distill`. If a process is lost, the others raise :class:`LostProcessError`.
    """
    with (
        init_process_group(env, config.device) as group,
        lock_output_folder(config.out) if group.is_rank0 else nullcontext(),
    ):
        return distill_in_group(group, config, progress if group.is_rank0 else no_progress)


def distill_in_group(group: ProcessGroup, config: DistillConfig, progress: ProgressCallback) -> DistillResult:
    """Distil as one process of a group."""
    saved = find_resumable_checkpoint(config.out, config.resume)
    entries, backbones = open_entries_and_backbones(config, progress)
    require_classifier_for_soft_labels(config, entries[0])
    resume_from = saved[1].config if saved else None
    targets = read_saved_targets(config.out, resume_from, backbones)
    perf_counter_start = time.perf_counter()
    distiller = Distiller(config, entries, backbones, group, resume_from, targets, progress)
    if resume_from:
        require_resumable_config(resume_from, distiller.config, config.out)
        if (config.out / "run.json").exists():
            record = read_run_record(config.out / "run.json")
            return DistillResult(
                config.out,
                add_target_estimates_and_soft_labels(config, distiller, backbones[0], record, progress),
            )
    with limit_cpu_threads(distiller.config.threads):
        checkpoint = prepare_and_load_or_save_checkpoint(config, distiller, saved, perf_counter_start)
        checkpoint = run_remaining_steps(config, distiller, checkpoint, progress)
    levels = distiller.gather_levels()
    peak = read_peak_memory_bytes(distiller.backbone.device) + distiller.count_cuda_graph_bytes()
    peak = group.all_reduce_max(peak)
    record = {}
    if group.is_rank0:
        digest = compute_images_digest(
            levels, distiller.config.canvas_pixels, distiller.config.color_decorrelation
        )
        record = make_run_record_without_result(config, distiller, digest)
        record |= {"loss": checkpoint.loss, "wall_seconds": checkpoint.seconds, "peak_memory_bytes": peak}
        # Paths may hold bytes that are not UTF-8; readers of JSON refuse them.
        record = escape_non_utf8_in_json(record)
        write_results_and_delete_old_checkpoints(config.out, distiller, levels, record)
    record = group.broadcast_object(record)
    # After the broadcast: no other process waits, which could exceed its time limit.
    return DistillResult(
        config.out, add_target_estimates_and_soft_labels(config, distiller, backbones[0], record, progress)
    )


def add_target_estimates_and_soft_labels(
    config: DistillConfig,
    distiller: Distiller,
    backbone: Backbone,
    record: dict[str, Any],
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Add to a finished run what it lacks: the estimate of its targets, and soft labels if asked for.

    Parameters
    ----------
    config : DistillConfig
    distiller : Distiller
    backbone : Backbone
        The first one, as it was loaded.
    record : dict
        Content of ``run.json``.
    progress : ProgressCallback

    Returns
    -------
    dict
        The new content of ``run.json`` in rank 0; in others, which do nothing, `record`.

    Raises
    ------
    InputError
        See :func:`write_soft_labels_and_update_record`; or if ``run.json`` cannot be written.
    """
    if not distiller.group.is_rank0:
        return record
    targets = record.get("targets")
    if distiller.computed_targets and targets and "backbones" not in targets:
        estimates = estimate_targets(distiller.entries, distiller.computed_targets, distiller.config)
        targets = targets | {"backbones": [each and asdict(each) for each in estimates]}
        record = record | {"targets": targets}
        write_run_file(config.out / "run.json", json.dumps(record, indent=1).encode())
    if config.soft_labels:
        record = write_soft_labels_and_update_record(
            config, distiller.config, distiller.entry, backbone, record, progress
        )
    return record


def prepare_and_load_or_save_checkpoint(
    config: DistillConfig,
    distiller: Distiller,
    saved: tuple[Path, RunCheckpoint] | None,
    perf_counter_start: float,
) -> RunCheckpoint:
    """Prepare the distiller and load the saved state into it, or save its first one.

    Parameters
    ----------
    config : DistillConfig
    distiller : Distiller
    saved : tuple of Path and RunCheckpoint, or None
        The checkpoint to resume from.
    perf_counter_start : float
        Time of ``time.perf_counter`` before the distiller was made.

    Returns
    -------
    RunCheckpoint
        The checkpoint of the distiller's state; its seconds include the targets and the preparation.

    Raises
    ------
    InputError
        If the backbone cannot be computed as the run was begun or as the user asked, or the saved state is
        of another config, or the first one cannot be written.
    """
    choices = [each.execution for each in distiller.config.matched_backbones]
    for prepared, choice in zip(distiller.prepare(), choices, strict=True):
        require_no_unwanted_fallback(prepared, choice, is_resumed=saved is not None)
    if saved:
        path, checkpoint = saved
        require_resumable_config(checkpoint.config, distiller.config, config.out)
        distiller.load_state_dict(
            read_state_dict(path, checkpoint, distiller.feature_counts, distiller.group)
        )
        checkpoint = checkpoint.model_copy(update={"config": distiller.config})
    else:
        checkpoint = RunCheckpoint(config=distiller.config, step=0, loss=None, seconds=0.0)
        state_dict = distiller.state_dict()
        if distiller.group.is_rank0:
            with translate_run_write_errors(config.out):
                config.out.mkdir(parents=True, exist_ok=True)
            save_checkpoint_and_delete_old(config.out / "checkpoint", checkpoint, state_dict)
    target_file = config.out / TARGET_FILE
    if distiller.group.is_rank0 and distiller.computed_targets and not target_file.exists():
        write_run_file(target_file, encode_targets(distiller.computed_targets))
    seconds = checkpoint.seconds + time.perf_counter() - perf_counter_start
    return checkpoint.model_copy(update={"seconds": seconds})


def run_remaining_steps(
    config: DistillConfig, distiller: Distiller, checkpoint: RunCheckpoint, progress: ProgressCallback
) -> RunCheckpoint:
    """Do the remaining steps; write history, growth sheets and checkpoints.

    Returns
    -------
    RunCheckpoint
        Checkpoint of the last step.

    Raises
    ------
    DistillInterrupt, InputError
        See :func:`distill`.
    """
    resolved, group = distiller.config, distiller.group
    done, total = distiller.state.step, resolved.steps
    progress(Progress("distil", done, total, "steps", note="; ".join(list_reproducibility_notes(resolved))))
    core_watch = CoreContentionMonitor(resolved.threads)
    start = time.perf_counter() - checkpoint.seconds
    opened = open_truncated_history(config.out / "history.csv", done) if group.is_rank0 else nullcontext()
    with opened as history, catch_stop_signals() as stop_requested:
        for output in distiller:
            seconds = time.perf_counter() - start
            if history:
                append_and_flush_history_row(history, output, seconds)
            figures = {"loss": output.loss}
            progress(Progress("distil", output.step, total, "steps", figures, core_watch.advise_once()))
            is_last = output.step == total
            if is_last or resolved.count_levels_at(output.step) > len(distiller.state.levels):
                levels = gather_growth_sheet_levels(
                    distiller.state.levels, len(resolved.classes), resolved.ipc, group
                )
                if group.is_rank0:
                    write_growth_sheet(
                        config.out / "growth",
                        output.step,
                        levels,
                        resolved.canvas_pixels,
                        resolved.color_decorrelation,
                    )
            stop = group.all_reduce_max(stop_requested())
            if stop or is_last or output.step % config.checkpoint_every == 0:
                update = {"step": output.step, "loss": output.loss, "seconds": seconds}
                checkpoint = checkpoint.model_copy(update=update)
                state_dict = distiller.state_dict()
                if history:
                    sync_history(history)
                    save_checkpoint_and_delete_old(config.out / "checkpoint", checkpoint, state_dict)
            if stop and not is_last:
                raise DistillInterrupt(output.step, total, config.out)
    return checkpoint


def write_results_and_delete_old_checkpoints(
    out: Path, distiller: Distiller, levels: Sequence[Tensor], record: dict[str, Any]
) -> None:
    """Write images, class list, and the record that marks the run as finished; then the preview.

    Raises
    ------
    InputError
        If they cannot be written.
    """
    resolved, card = distiller.config, distiller.entry.dataset
    names_by_id = dict(zip(card.class_ids, card.class_names, strict=True))
    names = [names_by_id[class_id] for class_id in resolved.classes]
    folders = make_class_folder_names(resolved.classes, names)
    with write_run_folder(out / "images") as partial_folder:
        images = iterate_decoded_pixels(levels, resolved.canvas_pixels, resolved.color_decorrelation)
        write_images(partial_folder, images, folders, resolved.ipc)
    classes = [
        {"index": index, "class_id": class_id, "name": name}
        for index, (class_id, name) in enumerate(zip(resolved.classes, names, strict=True))
    ]
    write_run_file(out / "classes.json", json.dumps(classes, indent=1, ensure_ascii=False).encode())
    write_run_file(out / "run.json", json.dumps(record, indent=1).encode())
    delete_old_checkpoints(out / "checkpoint", 1)
    specs = " + ".join(each["backbone"]["spec"] for each in record["backbones"])
    title = f"{card.name}, distilled on {specs}"
    with log_write_errors_as_warnings(out / "preview.png"):
        write_run_file(out / "preview.png", draw_preview_png(out / "images", folders, names, title))


def find_resumable_checkpoint(out: Path, allow_resume: bool) -> tuple[Path, RunCheckpoint] | None:
    """Return the checkpoint to resume from, or None to start in a directory that is new or empty.

    Raises
    ------
    InputError
        If the directory holds a run and `allow_resume` is not set, or something else; or a link in
        the place of a folder in which a run deletes what it no longer needs.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a directory")
    for name in ("checkpoint", "growth"):
        require_folder_is_not_link(out / name)
    saved = find_newest_intact_checkpoint(out / "checkpoint")
    if saved and not allow_resume:
        state = "a finished run" if (out / "run.json").exists() else f"a run saved at step {saved[1].step}"
        raise InputError(f"--out {out} holds {state}: choose another directory, or resume it with --resume")
    # Hidden files are the lock of this run and clutter of file managers.
    if not saved and holds_user_files(out):
        raise InputError(f"--out {out} is not empty and holds no run to resume: choose another directory")
    return saved


def read_saved_targets(
    out: Path, resume_from: ResolvedDistillConfig | None, backbones: Sequence[Backbone]
) -> list[ClassCentres] | None:
    """Read the targets that a run to resume computed; None if there are none, or their file is lost.

    Raises
    ------
    DamageError
        If the file is another one.
    """
    if resume_from is None or not resume_from.targets:
        return None
    feature_counts = [backbone.card.features for backbone in backbones]
    return read_target_file(out / TARGET_FILE, resume_from, feature_counts)


def holds_user_files(folder: Path) -> bool:
    """Return whether a folder holds files other than clutter, or too many folders to search."""
    try:
        return any(path.is_file() and not is_hidden_or_system_file(path.name) for path in folder.rglob("*"))
    except RecursionError:
        return True


def describe_resume_hint(out: Path) -> str:
    """Describe what an interrupted run can be resumed from, if anything."""
    if any((out / "checkpoint").glob("step_*")):
        return f"; {out} holds a checkpoint: repeat the same command with --resume to continue from it"
    return " before anything was saved: the same command starts again"
