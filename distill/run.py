"""The distillation stage: a store's statistics and a backbone in, a directory of images out."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfm.atomic import require_no_link
from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.execution.cpu_threads import limit_threads
from sfm.backbones.execution.determinism import deterministic_if_supported, tf32_disabled
from sfm.backbones.execution.preparation import count_graph_bytes, optimize_backbone
from sfm.backbones.execution.wait_policy import CoreWatch
from sfm.backbones.spec import parse_spec
from sfm.distill import checkpoint as checkpoints
from sfm.distill.activation_memory import (
    choose_graph_count,
    choose_micro_batch,
    measure_activation_bytes,
    measure_free_memory,
)
from sfm.distill.centres import Centres, read_centres
from sfm.distill.checkpoint import Checkpoint
from sfm.distill.config import DistillConfig
from sfm.distill.directory import not_essential, whole_folder, write_file, writing
from sfm.distill.engine import Plan, State, advance, begin, even_growth
from sfm.distill.execution_choice import (
    choose_execution,
    describe_execution,
    read_saved_execution,
    require_execution,
    should_compile,
)
from sfm.distill.flow import decoupled_loss, flow, sfm_loss
from sfm.distill.gradient import Objective
from sfm.distill.group import Group, Place, joined, launched
from sfm.distill.growth import first_images, write_sheet
from sfm.distill.history import append, open_history, sync
from sfm.distill.images import class_folders, pixels, preview, write_images
from sfm.distill.mixed_precision import convert_precision
from sfm.distill.portable import select_classes
from sfm.distill.processes import side_by_side
from sfm.distill.record import notes_of, peak_memory, read_record, recipe_of, record_of
from sfm.distill.stopping import Interrupted as Interrupted
from sfm.distill.stopping import stop_requests
from sfm.errors import InputError
from sfm.events import Progress, ProgressCallback, no_progress
from sfm.locking import lock_folder
from sfm.paths import is_clutter
from sfm.stats_store.digests import compute_stream_digest
from sfm.stats_store.entry_selection import NotExtractedError, filter_summaries, select_entry
from sfm.stats_store.extract_command import format_extract_command
from sfm.stats_store.history import summaries_for
from sfm.stats_store.store import Entry, open_store
from sfm.text import escape_non_utf8_values


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

    Opens the store and the backbone, nothing else. Resuming a finished run returns it as it is; resuming
    where there is nothing yet starts from the beginning.

    Parameters
    ----------
    config : DistillConfig
        What to distil, how, and into which directory.
    progress : Listener
        Told of every step.

    Returns
    -------
    DistillResult

    Raises
    ------
    InputError
        If the store holds no such entry or not what the run needs, the directory holds something else, the
        run to resume is another one, the loss is not finite, or the directory cannot be written or is being
        written by another process.
    Interrupted
        If SIGINT or SIGTERM came (main thread only); the run can be resumed.
    """
    place = launched()
    if place:
        config = config.model_copy(update={"devices": place.size})
    elif config.devices > 1:
        return side_by_side(partial(distill_at, config), config.devices, progress)
    return distill_at(config, place, progress)


def distill_at(config: DistillConfig, place: Place | None, progress: ProgressCallback) -> DistillResult:
    """Distil in this process: for all classes, or for those that fall to its place among several.

    Every process has the result; the first one writes it and reports progress.

    Raises
    ------
    InputError, Interrupted
        See :func:`distill`. Where some are lost, the other processes raise :class:`LostProcess`.
    """
    with (
        joined(place, config.device) as group,
        lock_folder(config.out) if group.first else nullcontext(),
    ):
        return distill_in(group, config, progress if group.first else no_progress)


def distill_in(group: Group, config: DistillConfig, progress: ProgressCallback) -> DistillResult:
    """Distil as one of a group of processes, or alone."""
    saved = find_run(config.out, config.resume)
    store = open_store(config.store)
    model = parse_spec(config.backbone).model
    known = summaries_for(store, config.dataset)
    try:
        candidates = filter_summaries(
            known, dataset=config.dataset, model=model, image_size=config.image_size
        )
    except NotExtractedError as error:
        line = format_extract_command(store, error.others, config.backbone, config.image_size)
        raise InputError(f"{error}; to add it: {line}") from None
    size = candidates[0].image_size
    backbone = load_backbone(
        config.backbone,
        image_size=size,
        device=config.device,
        fold_norms=config.execution != "eager",
        progress=progress,
    )
    entry = select_entry(store, candidates, backbone.card)
    backbone = convert_precision(backbone, config.precision)
    chosen = select_classes(config.classes, entry.dataset)
    centres = read_centres(entry, config.ipc, chosen, apart=config.centres == "sub-class")
    with ExitStack() as settings:
        threads = config.threads or (saved[1].recipe["threads"] if saved else torch.get_num_threads())
        settings.enter_context(limit_threads(threads))
        settings.enter_context(tf32_disabled())
        repeatable = settings.enter_context(deterministic_if_supported(backbone))
        views = config.steps * len(chosen) * config.ipc * config.views
        worth = should_compile(config.compile, views, backbone.device, group)
        eager = config.execution == "eager"
        lean = None if worth or eager else optimize_backbone(backbone, 1, "input-grad")
        counted = lean[0] if lean else backbone
        plan = plan_of(config, len(chosen), counted, saved[1].recipe if saved else {}, group)
        recipe = recipe_of(config, plan, entry, chosen, backbone, threads)
        if saved:
            checkpoints.require_same(saved[1].recipe, recipe, config.out)
            if (config.out / "run.json").exists():
                return DistillResult(config.out, read_record(config.out / "run.json"))

        began = time.perf_counter()
        if saved:
            choice = read_saved_execution(saved[1].recipe, config.execution)
        else:
            choice = choose_execution(plan, config.execution, config.compile, backbone.device, group)
        if lean and choice.mode == "input-grad":
            backbone, prepared = lean
        else:
            backbone, prepared = optimize_backbone(backbone, plan.micro_batch * plan.views, choice.mode)
        require_execution(prepared, choice, saved[1].recipe if saved else None)
        recipe |= {"repeatable": repeatable} | describe_execution(prepared, choice)
        if backbone.device.type == "cuda":
            # Do not count compilation and graph capture in peak memory.
            torch.cuda.reset_peak_memory_stats(backbone.device)
        state, checkpoint = state_of(config, plan, saved, recipe, backbone, group)
        seconds = checkpoint.seconds + time.perf_counter() - began
        checkpoint = checkpoint.model_copy(update={"seconds": seconds})
        objective = objective_of(config, centres, backbone.device)
        checkpoint = run_steps(config, plan, backbone, objective, state, checkpoint, progress, group)
    levels = checkpoints.levels_of(state, plan, group)
    peak = group.most(peak_memory(backbone.device) + count_graph_bytes(backbone))
    record: dict[str, Any] = {}
    if group.first:
        images = images_digest(levels, plan)
        record = record_of(
            config,
            plan,
            entry,
            chosen,
            backbone,
            checkpoint,
            store=store.url,
            images=images,
            prepared=prepared,
            peak_memory_bytes=peak,
        )
        # Paths may hold bytes that are not UTF-8; readers of JSON refuse them.
        record = escape_non_utf8_values(record)
        publish(config.out, entry, chosen, plan, levels, record)
    return DistillResult(config.out, group.told(record))


def state_of(
    config: DistillConfig,
    plan: Plan,
    saved: tuple[Path, Checkpoint] | None,
    recipe: dict[str, Any],
    backbone: Backbone,
    group: Group,
) -> tuple[State, Checkpoint]:
    """Return the state to go on from: the saved one, or a new one, which is saved.

    Raises
    ------
    InputError
        If the saved one is of another recipe, or a new one cannot be written.
    """
    if saved:
        path, checkpoint = saved
        checkpoints.require_same(checkpoint.recipe, recipe, config.out)
        checkpoint = checkpoints.with_threads(checkpoint, recipe["threads"])
        features = backbone.card.features
        return checkpoints.load(path, checkpoint, plan, features, backbone.device, group), checkpoint
    state = begin(plan, backbone.device, group)
    checkpoint = Checkpoint(recipe=recipe, step=0, loss=None, seconds=0.0)
    tensors = checkpoints.tensors_of(state, plan, group)
    if group.first:
        with writing(config.out):
            config.out.mkdir(parents=True, exist_ok=True)
        checkpoints.save(config.out / "checkpoint", checkpoint, tensors)
    return state, checkpoint


def find_run(out: Path, resume: bool) -> tuple[Path, Checkpoint] | None:
    """Return the checkpoint to go on from, or None to start in a directory that is new or empty.

    Raises
    ------
    InputError
        If the directory holds a run and `resume` is not set, or something that is not a run; or a link in
        the place of a folder in which a run deletes what it no longer needs.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a directory")
    for name in ("checkpoint", "growth"):
        require_no_link(out / name)
    saved = checkpoints.find(out / "checkpoint")
    if saved and not resume:
        state = "a finished run" if (out / "run.json").exists() else f"a run saved at step {saved[1].step}"
        raise InputError(f"--out {out} holds {state}: choose another directory, or go on with --resume")
    # Hidden are the lock of this very run, and what file managers leave everywhere.
    if not saved and holds_files(out):
        raise InputError(f"--out {out} is not empty and holds no run to resume: choose another directory")
    return saved


def holds_files(folder: Path) -> bool:
    """Say whether there is a file below a folder, but for clutter, or too many folders to look."""
    try:
        return any(path.is_file() and not is_clutter(path.name) for path in folder.rglob("*"))
    except RecursionError:
        return True


def describe_checkpoint(out: Path) -> str:
    """Say what a run that ended at once has left to go on from, if anything."""
    if any((out / "checkpoint").glob("step_*")):
        return f"; {out} holds a checkpoint: repeat the same command with --resume to go on from it"
    return " before anything was saved: the same command starts again"


def plan_of(
    config: DistillConfig, classes: int, backbone: Backbone, saved: dict[str, Any], group: Group
) -> Plan:
    """Return what shapes the run, with the defaults filled in; those of a saved run are the ones it had.

    Raises
    ------
    InputError
        If there are more processes than classes.
    """
    if group.size > classes:
        raise InputError(
            f"{classes} classes cannot be shared among {group.size} processes: use fewer --devices"
        )
    image_size = backbone.card.preprocessing.input_size
    images = group.shares(classes, config.ipc)[0].stop
    micro_batch = config.micro_batch or saved.get("micro_batch")
    graphs = saved.get("graphs") if config.graphs is None else config.graphs
    if micro_batch is None or graphs is None:
        # Processes on one CPU look at the same free memory.
        free = measure_free_memory(backbone.device) // (1 if backbone.device.type == "cuda" else group.size)
        room = (images, config.views, measure_activation_bytes(backbone), free, backbone.device.type)
        # What the process with the least room can do, all do.
        micro_batch = micro_batch or -group.most(-choose_micro_batch(*room))
        graphs = -group.most(-choose_graph_count(*room)) if graphs is None else graphs
    return Plan(
        classes=classes,
        ipc=config.ipc,
        views=config.views,
        image_size=image_size,
        steps=config.steps,
        learning_rate=config.learning_rate,
        final_rate=config.final_rate,
        grow_every=config.grow_every or even_growth(config.steps, image_size),
        seed=config.seed,
        micro_batch=min(micro_batch, images),
        gradient=config.gradient,
        graphs=min(graphs, images),
    )


def objective_of(config: DistillConfig, centres: Centres, device: torch.device) -> Objective:
    """Return the loss, with all that it needs of the real data on the device."""
    own, means = torch.from_numpy(centres.own), torch.from_numpy(centres.means)
    if config.objective == "sfm":
        return partial(sfm_loss, target=flow(own, means).float().to(device))
    return partial(
        decoupled_loss, own=own.float().to(device), means=means.float().to(device), alpha=config.alpha
    )


def run_steps(
    config: DistillConfig,
    plan: Plan,
    backbone: Backbone,
    objective: Objective,
    state: State,
    checkpoint: Checkpoint,
    progress: ProgressCallback,
    group: Group,
) -> Checkpoint:
    """Do the steps that are left, keeping history and checkpoints; `state` moves on.

    Returns
    -------
    Checkpoint
        The last one, of the finished steps.

    Raises
    ------
    Interrupted, InputError
        See :func:`distill`.
    """
    note = "; ".join(notes_of(checkpoint.recipe))
    progress(Progress("distil", state.step, config.steps, "steps", note=note))
    watch = CoreWatch(checkpoint.recipe["threads"])
    started = time.perf_counter() - checkpoint.seconds
    written = open_history(config.out / "history.csv", state.step) if group.first else nullcontext()
    with written as history, stop_requests() as stop_requested:
        while state.step < config.steps:
            loss = advance(state, plan, backbone, objective, group)
            seconds = time.perf_counter() - started
            if history:
                rate, side = plan.rate(state.step - 1), state.levels[-1].shape[-1]
                append(history, state.step, loss, rate, side, seconds)
            progress(Progress("distil", state.step, config.steps, "steps", {"loss": loss}, watch.check()))
            last = state.step == config.steps
            if last or plan.levels(state.step) > len(state.levels):
                shown = first_images(state.levels, plan.classes, plan.ipc, group)
                if group.first:
                    write_sheet(config.out / "growth", state.step, shown, plan.canvas)
            stop = group.most(stop_requested())
            if stop or last or state.step % config.checkpoint_every == 0:
                checkpoint = checkpoint.model_copy(
                    update={"step": state.step, "loss": loss, "seconds": seconds}
                )
                tensors = checkpoints.tensors_of(state, plan, group)
                if history:
                    sync(history)
                    checkpoints.save(config.out / "checkpoint", checkpoint, tensors)
            if stop and not last:
                raise Interrupted(state.step, config.steps, config.out)
    return checkpoint


def publish(
    out: Path,
    entry: Entry,
    chosen: npt.NDArray[np.int64],
    plan: Plan,
    levels: Sequence[Tensor],
    record: dict[str, Any],
) -> None:
    """Write images, class list and record: with it the run is finished. The preview comes after.

    Raises
    ------
    InputError
        If they cannot be written.
    """
    card = entry.dataset
    ids, names = ([values[c] for c in chosen] for values in (card.class_ids, card.class_names))
    folders = class_folders(ids, names)
    with whole_folder(out / "images") as partial_folder:
        write_images(partial_folder, pixels(levels, plan.canvas), folders, plan.ipc)
    classes = [
        {"index": index, "class_id": class_id, "name": name}
        for index, (class_id, name) in enumerate(zip(ids, names, strict=True))
    ]
    write_file(out / "classes.json", json.dumps(classes, indent=1, ensure_ascii=False).encode())
    write_file(out / "run.json", json.dumps(record, indent=1).encode())
    checkpoints.keep(out / "checkpoint", 1)
    title = f"{card.name}, distilled on {record['backbone']['spec']}"
    with not_essential(out / "preview.png"):
        write_file(out / "preview.png", preview(out / "images", folders, names, title))


def images_digest(levels: Sequence[Tensor], plan: Plan) -> str:
    """Return the digest of the images' pixels, by which images that were edited later are told."""
    shape = (plan.images, plan.canvas, plan.canvas, 3)
    parts = (image[None] for image in pixels(levels, plan.canvas))
    return compute_stream_digest(parts, np.dtype(np.uint8), shape)
