"""The distillation stage: a store's statistics and a backbone in, a directory of images out."""

import json
import platform
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.spec import parse_spec
from sfm.distill import checkpoint as checkpoints
from sfm.distill.centres import Centres, read_centres
from sfm.distill.checkpoint import Checkpoint
from sfm.distill.classes import chosen_classes
from sfm.distill.config import DistillConfig
from sfm.distill.directory import whole_folder, write_file, writing
from sfm.distill.engine import Plan, State, advance, begin, even_growth
from sfm.distill.flow import decoupled_loss, flow, sfm_loss
from sfm.distill.gradient import Objective
from sfm.distill.growth import write_sheet
from sfm.distill.history import append, open_history, sync
from sfm.distill.images import class_folders, pixels, preview, write_images
from sfm.distill.memory import activation_bytes, free_bytes, micro_batch_for
from sfm.errors import InputError
from sfm.events import Listener, Progress, nobody
from sfm.stats_store.digest import stream_digest
from sfm.stats_store.history import known_summaries
from sfm.stats_store.select import match, narrow
from sfm.stats_store.store import Entry, open_store

PACKAGES = ("sfm-distill", "torch", "timm", "numpy")


class Interrupted(Exception):  # noqa: N818 - stopping on request is not an error
    """A run was asked to stop (SIGINT, SIGTERM) and has saved where it stands.

    Attributes
    ----------
    step, total : int
        Steps done, and steps in all.
    out : Path
        The run's directory.
    """

    def __init__(self, step: int, total: int, out: Path) -> None:
        super().__init__(
            f"interrupted after step {step} of {total}, all saved in {out}: "
            "repeat the same command with --resume to go on"
        )
        self.step, self.total, self.out = step, total, out


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


def distill(config: DistillConfig, progress: Listener = nobody) -> DistillResult:
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
        run to resume is another one, the loss is not finite, or the directory cannot be written.
    Interrupted
        If SIGINT or SIGTERM came (main thread only); the run can be resumed.
    """
    saved = find_run(config.out, config.resume)
    store = open_store(config.store)
    model = parse_spec(config.backbone).model
    known = known_summaries(store, config.dataset)
    candidates = narrow(known, dataset=config.dataset, model=model, image_size=config.image_size)
    backbone = load_backbone(config.backbone, image_size=candidates[0].image_size, device=config.device)
    entry = match(store, candidates, backbone.card)
    chosen = chosen_classes(config.classes, entry.dataset)
    centres = read_centres(entry, config.ipc, chosen, apart=config.centres == "sub-class")
    plan = plan_of(config, len(chosen), backbone, saved[1].recipe if saved else {})
    threads = saved[1].recipe["threads"] if saved else torch.get_num_threads()
    recipe = recipe_of(config, plan, entry, chosen, backbone, threads)

    if saved:
        path, checkpoint = saved
        checkpoints.require_same(checkpoint.recipe, recipe, config.out)
        finished = config.out / "run.json"
        if finished.exists():
            return DistillResult(config.out, json.loads(finished.read_bytes()))
        state = checkpoints.load(path, checkpoint, plan, backbone.device)
    else:
        state = begin(plan, backbone.device)
        checkpoint = Checkpoint(recipe=recipe, step=0, loss=None, seconds=0.0)
        with writing(config.out):
            config.out.mkdir(parents=True, exist_ok=True)
        checkpoints.save(config.out / "checkpoint", checkpoint, state)

    objective = objective_of(config, centres, backbone.device)
    with computing_with(threads):
        checkpoint = run_steps(config, plan, backbone, objective, state, checkpoint, progress)
    record = {
        "command": "distill",
        "config": config.model_dump(mode="json") | {"store": store.url},
        "store": store.url,
        "entry_digest": entry.summary.entry_digest,
        "fingerprint": entry.summary.fingerprint,
        "dataset": entry.dataset.name,
        "licence": entry.dataset.licence,
        "train_samples": train_samples(entry, chosen),
        "backbone": backbone.card.model_dump(mode="json"),
        "image_size": plan.image_size,
        "canvas": plan.canvas,
        "ipc": plan.ipc,
        "seed": plan.seed,
        "micro_batch": plan.micro_batch,
        "threads": recipe["threads"],
        "images": images_digest(state, plan),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": device_name(backbone.device),
        "loss": checkpoint.loss,
        "wall_seconds": checkpoint.seconds,
        "peak_memory_bytes": peak_memory(backbone.device),
    }
    publish(config.out, entry, chosen, plan, state, record)
    return DistillResult(config.out, record)


def find_run(out: Path, resume: bool) -> tuple[Path, Checkpoint] | None:
    """Return the checkpoint to go on from, or None to start in a directory that is new or empty.

    Raises
    ------
    InputError
        If the directory holds a run and `resume` is not set, or something that is not a run.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a directory")
    saved = checkpoints.find(out / "checkpoint")
    if saved and not resume:
        state = "a finished run" if (out / "run.json").exists() else f"a run saved at step {saved[1].step}"
        raise InputError(f"--out {out} holds {state}: choose another directory, or go on with --resume")
    if not saved and any(path.is_file() for path in out.rglob("*")):
        raise InputError(f"--out {out} is not empty and holds no run to resume: choose another directory")
    return saved


def plan_of(config: DistillConfig, classes: int, backbone: Backbone, saved: dict[str, Any]) -> Plan:
    """Return what shapes the run, with the defaults filled in; those of a saved run are the ones it had."""
    image_size = backbone.card.preprocessing.input_size
    micro_batch = config.micro_batch or saved.get("micro_batch")
    if micro_batch is None:
        free = free_bytes(backbone.device)
        micro_batch = micro_batch_for(classes * config.ipc, config.views, activation_bytes(backbone), free)
    return Plan(
        classes=classes,
        ipc=config.ipc,
        views=config.views,
        image_size=image_size,
        learning_rate=config.learning_rate,
        grow_every=config.grow_every or even_growth(config.steps, image_size),
        seed=config.seed,
        micro_batch=min(micro_batch, classes * config.ipc),
        gradient=config.gradient,
    )


def recipe_of(
    config: DistillConfig,
    plan: Plan,
    entry: Entry,
    chosen: npt.NDArray[np.int64],
    backbone: Backbone,
    threads: int,
) -> dict[str, Any]:
    """Return all that shapes the images, by the name of the option that sets it, where there is one."""
    return {
        "dataset": entry.summary.entry_digest,
        "classes": [entry.dataset.class_ids[c] for c in chosen],
        "backbone": backbone.card.hash,
        "image_size": plan.image_size,
        "objective": config.objective,
        "alpha": config.alpha,
        "ipc": plan.ipc,
        "centres": config.centres,
        "views": plan.views,
        "steps": config.steps,
        "learning_rate": plan.learning_rate,
        "grow_every": plan.grow_every,
        "seed": plan.seed,
        "micro_batch": plan.micro_batch,
        "gradient": plan.gradient,
        "device": backbone.device.type,
        "threads": threads,
    }


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
    progress: Listener,
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
    progress(Progress("distil", state.step, config.steps, "steps"))
    started = time.perf_counter() - checkpoint.seconds
    with open_history(config.out / "history.csv", state.step) as history, stop_requests() as stop_requested:
        while state.step < config.steps:
            loss = advance(state, plan, backbone, objective)
            resolution = state.levels[-1].shape[-1]
            seconds = time.perf_counter() - started
            append(history, state.step, loss, plan.learning_rate, resolution, seconds)
            progress(Progress("distil", state.step, config.steps, "steps", {"loss": loss}))
            if plan.levels(state.step) > len(state.levels) or state.step == config.steps:
                sheets = config.out / "growth"
                write_sheet(sheets, state.step, state.levels, plan.classes, plan.ipc, plan.canvas)
            stop = stop_requested()
            if stop or state.step % config.checkpoint_every == 0 or state.step == config.steps:
                sync(history)
                checkpoint = checkpoint.model_copy(
                    update={"step": state.step, "loss": loss, "seconds": seconds}
                )
                checkpoints.save(config.out / "checkpoint", checkpoint, state)
            if stop and state.step < config.steps:
                raise Interrupted(state.step, config.steps, config.out)
    return checkpoint


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Let torch use so many CPU threads for a while: their number shapes sums, and so the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Note SIGINT and SIGTERM instead of dying of them; gives a function that says whether one came.

    A second one does what it would have done without this. Outside the main thread, where handlers cannot be
    set, nothing is noted.
    """
    requested = False
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield lambda: requested
    finally:
        restore()


def publish(
    out: Path,
    entry: Entry,
    chosen: npt.NDArray[np.int64],
    plan: Plan,
    state: State,
    record: dict[str, Any],
) -> None:
    """Write images, class list and preview, and the record last: with it the run is finished.

    Raises
    ------
    InputError
        If they cannot be written.
    """
    card = entry.dataset
    ids, names = ([values[c] for c in chosen] for values in (card.class_ids, card.class_names))
    folders = class_folders(ids, names)
    with whole_folder(out / "images") as partial_folder:
        write_images(partial_folder, pixels(state.levels, plan.canvas), folders, plan.ipc)
    classes = [
        {"index": index, "class_id": class_id, "name": name}
        for index, (class_id, name) in enumerate(zip(ids, names, strict=True))
    ]
    write_file(out / "classes.json", json.dumps(classes, indent=1, ensure_ascii=False).encode())
    title = f"{card.name}, distilled on {record['backbone']['spec']}"
    write_file(out / "preview.png", preview(out / "images", folders, names, title))
    write_file(out / "run.json", json.dumps(record, indent=1).encode())
    checkpoints.keep(out / "checkpoint", 1)


def train_samples(entry: Entry, chosen: npt.NDArray[np.int64]) -> int:
    """Return how many real images the chosen classes have."""
    if len(chosen) == len(entry.dataset.class_ids):
        return entry.dataset.train_samples
    return int(entry.read("train/count")[chosen].sum())


def images_digest(state: State, plan: Plan) -> str:
    """Return the digest of the images' pixels, by which images that were edited later are told."""
    shape = (plan.classes * plan.ipc, plan.canvas, plan.canvas, 3)
    parts = (image[None] for image in pixels(state.levels, plan.canvas))
    return stream_digest(parts, np.dtype(np.uint8), shape)


def device_name(device: torch.device) -> str:
    """Return what the run was computed on, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Return the most memory in use so far, in bytes: of the process, or allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
