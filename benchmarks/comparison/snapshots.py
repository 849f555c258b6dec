"""Runs of LGM and of SFM that write their images at regular steps, and resume."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from comparison.training_steps import LGM_VIEWS, PEER_AUGMENTATION
from measurement import log_progress
from peers import lgm

from sfm.api import DistillConfig, ExtractConfig
from sfm.backbones.build import Backbone
from sfm.backbones.execution import optimize_backbone
from sfm.backbones.execution.determinism import deterministic_algorithms, tf32_disabled
from sfm.distill import run_checkpoints as checkpoints
from sfm.distill.config_resolution import resolve_distill_config
from sfm.distill.distilled_images import iterate_decoded_pixels, make_class_folder_names, write_images
from sfm.distill.objective import make_objective, read_target_centres
from sfm.distill.resolved_config import ResolvedDistillConfig, choose_growth_interval
from sfm.distill.run_checkpoints import RunCheckpoint
from sfm.distill.run_files import write_run_folder
from sfm.distill.state_dict import gather_state, make_state_from_tensors
from sfm.distill.train_step import DistillState, LossTerm, init_distill_state, train_step
from sfm.errors import InputError
from sfm.pipeline.entry_rows import draw_tuning_held_out_mask
from sfm.pipeline.selection import UNUSED_LABEL, select_samples_if_labels_known
from sfm.pipeline.sources import Source, open_source
from sfm.stats_store.store import Entry

TUNING_FRACTION = 0.2

Role = Literal["full", "tuning"]


@dataclass(frozen=True)
class AccuracyConfig:
    """Settings of the accuracy section.

    Attributes
    ----------
    spec : str
        Of the backbone.
    image_size : int
        In pixels.
    device : str
    source : str
        Spec of the real images.
    store : str or None
        URL of the store of their statistics; extracted there if missing. None: in `work`.
    work : Path
        Folder for the runs; finished ones are not repeated.
    seeds : int
        Number of distillations of each method.
    rates : list of float
        Learning rates that LGM chooses from.
    steps_lgm, steps_tune : int
        Steps of LGM, and of the runs that choose its learning rate.
    grow_lgm : int
        Steps of the run whose growth schedule LGM uses: the pyramid grows in the first half of them.
    steps : int or None
        Steps of SFM; None: the default of `sfm distill`.
    every, every_lgm : int
        Steps between snapshots of SFM and of LGM. The last step has a snapshot too.
    quick : bool
        Use few images and a short evaluation.
    """

    spec: str
    image_size: int
    device: str
    source: str
    store: str | None
    work: Path
    seeds: int
    rates: list[float]
    steps_lgm: int
    steps_tune: int
    grow_lgm: int
    steps: int | None
    every: int
    every_lgm: int
    quick: bool


@dataclass(frozen=True)
class AccuracyContext:
    """Backbone, store and folder that the runs of the accuracy section share.

    Attributes
    ----------
    backbone, frozen_backbone : Backbone
        As loaded, for LGM; and as `sfm distill` estimates its memory.
    spec : str
        Of the backbone.
    store : str
    entries : dict of str to Entry
        By role.
    work : Path
        Folder for the runs.
    evaluation_options : dict
        Options of `sfm evaluate`.
    """

    backbone: Backbone
    frozen_backbone: Backbone
    spec: str
    store: str
    entries: dict[Role, Entry]
    work: Path
    evaluation_options: dict[str, int]


def select_training_rows(config: ExtractConfig, source: Source, role: Role) -> npt.NDArray[np.int64]:
    """Return the ascending positions of the training images that the entry of a role was computed from."""
    selection = select_samples_if_labels_known(config, source)
    assert selection is not None
    labels = selection.labels_by_split["train"]
    used = labels != UNUSED_LABEL
    if role == "tuning":
        assert config.tune_fraction is not None
        used &= ~draw_tuning_held_out_mask(labels, selection.class_ids, config.tune_fraction, config.seed)
    return np.flatnonzero(used)


def decode_training_images(
    config: ExtractConfig, backbone: Backbone, canvas: int, role: Role
) -> lgm.RealImages:
    """Decode the training images that the entry of a role was computed from."""
    source = open_source(config.source)
    rows = select_training_rows(config, source, role)
    log_progress(f"decoding {len(rows)} real images at {canvas} px for LGM, role {role}")
    return lgm.decode_real_images(source, rows, backbone, canvas)


def run_with_snapshots(
    context: AccuracyContext,
    name: str,
    role: Role,
    run_config: ResolvedDistillConfig,
    every: int,
    step: Callable[[DistillState], float],
    setup_seconds: float = 0.0,
) -> list[Path]:
    """Run all steps of a config, and write snapshots of the images at regular intervals and at the end.

    A run that an earlier call began is resumed. Its time includes `setup_seconds`.

    Returns
    -------
    list of Path
        A directory per snapshot, readable by `sfm evaluate`.

    Raises
    ------
    InputError
        If an earlier call has passed a step without writing its snapshot.
    """
    folder = context.work / name
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        end: folder / f"step_{end:06d}" for end in (*range(every, run_config.steps, every), run_config.steps)
    }
    entry = context.entries[role]
    run_config = run_config.model_copy(
        update={"dataset": entry.summary.entry_digest, "classes": entry.dataset.class_ids}
    )
    state, seconds = resume_run(context, folder, run_config, paths) or (
        init_distill_state(run_config, context.backbone.device),
        setup_seconds,
    )
    for end in (end for end in paths if end > state.step):
        while state.step < end:
            start = time.perf_counter()
            loss = step(state)
            seconds += time.perf_counter() - start
        write_snapshot(paths[end], context, role, run_config, state, seconds)
        checkpoint = RunCheckpoint(config=run_config, step=end, loss=loss, seconds=seconds)
        checkpoints.save_checkpoint_and_delete_old(
            folder / "checkpoint", checkpoint, gather_state(state, run_config)
        )
        log_progress(f"{name}: step {end} of {run_config.steps}, loss {loss:.3f}, {seconds:.0f} s")
    return list(paths.values())


def resume_run(
    context: AccuracyContext, folder: Path, run_config: ResolvedDistillConfig, paths: dict[int, Path]
) -> tuple[DistillState, float] | None:
    """Load the state and the seconds of a run from its checkpoint; None if there is none."""
    saved = checkpoints.find_newest_intact_checkpoint(folder / "checkpoint")
    if not saved:
        return None
    step, seconds = saved[1].step, saved[1].seconds
    saved_config = saved[1].config
    if run_config.final_rate == 1:
        # No step depends on the number of steps, so a longer run can resume a shorter one.
        saved_config = saved_config.model_copy(update={"steps": run_config.steps})
    checkpoints.require_resumable_config(saved_config, run_config, folder)
    missing = [end for end, path in paths.items() if end <= step and not path.exists()]
    if missing:
        raise InputError(
            f"{folder} has no snapshot of step {missing[0]}: use the interval of the run that wrote it, "
            f"or another --work"
        )
    tensors = checkpoints.read_state_dict(*saved, [context.backbone.card.features])
    del tensors["step"]
    return make_state_from_tensors(step, tensors, context.backbone.device), seconds


def write_snapshot(
    out: Path,
    context: AccuracyContext,
    role: Role,
    run_config: ResolvedDistillConfig,
    state: DistillState,
    seconds: float,
) -> None:
    """Write the images of a step as a run directory that `sfm evaluate` can read."""
    entry = context.entries[role]
    ids, names = entry.dataset.class_ids, entry.dataset.class_names
    classes = [
        {"index": index, "class_id": class_id, "name": name}
        for index, (class_id, name) in enumerate(zip(ids, names, strict=True))
    ]
    record = {
        "command": "distill",
        "config": {"backbone": context.spec},
        "store": context.store,
        "entry_digest": entry.summary.entry_digest,
        "fingerprint": entry.summary.fingerprint,
        "dataset": entry.dataset.name,
        "backbone": context.backbone.card.model_dump(mode="json"),
        "image_size": run_config.image_size,
        "canvas": run_config.canvas_pixels,
        "ipc": run_config.ipc,
        "step": state.step,
        "wall_seconds": seconds,
    }
    with write_run_folder(out) as folder:
        (folder / "images").mkdir()
        write_images(
            folder / "images",
            iterate_decoded_pixels(state.levels, run_config.canvas_pixels),
            make_class_folder_names(ids, names),
            run_config.ipc,
        )
        (folder / "classes.json").write_text(json.dumps(classes))
        (folder / "run.json").write_text(json.dumps(record, indent=1))


def make_distill_config(context: AccuracyContext, seed: int, steps: int | None) -> DistillConfig:
    """Return the default config of `sfm distill`, with another number of steps unless that is None."""
    options = {} if steps is None else {"steps": steps}
    return DistillConfig(
        store=context.store,
        backbone=context.spec,
        dataset=context.entries["full"].dataset.name,
        out=Path("none"),
        seed=seed,
        **options,  # type: ignore[arg-type]
    )


def make_run_config(context: AccuracyContext, config: DistillConfig) -> ResolvedDistillConfig:
    """Return the resolved config that `sfm distill` makes of a config."""
    entry = context.entries["full"]
    return resolve_distill_config(
        config, [entry.summary.entry_digest], entry.dataset.class_ids, [context.frozen_backbone]
    )


def run_lgm(
    context: AccuracyContext, config: AccuracyConfig, real: lgm.RealImages, role: Role, rate: float, seed: int
) -> list[Path]:
    """Run LGM and return its snapshots; the pyramid grows in the first half of a run of `grow_lgm` steps."""
    run_config = make_run_config(context, make_distill_config(context, seed, None))
    run_config = run_config.model_copy(
        update={
            # LGM reads neither micro-batch nor gradient: fixed values let a run resume on another machine.
            "micro_batch": run_config.image_count,
            "gradient": "exact",
            "graphs": run_config.image_count,
            "views": LGM_VIEWS,
            "learning_rate": rate,
            "final_rate": 1.0,
            "grow_every": choose_growth_interval(config.grow_lgm, len(run_config.level_resolutions)),
            **PEER_AUGMENTATION,
            "steps": config.steps_tune if role == "tuning" else config.steps_lgm,
        }
    )
    name = f"lgm-{role}-rate-{rate:g}-seed-{seed}"
    step = partial(lgm.run_lgm_step, run_config=run_config, backbone=context.backbone, real=real)
    return run_with_snapshots(context, name, role, run_config, config.every_lgm, step)


def run_sfm(context: AccuracyContext, config: AccuracyConfig, seed: int) -> list[Path]:
    """Run SFM as `sfm distill` does by default, and return its snapshots."""
    device, entry = context.backbone.device, context.entries["full"]
    distill_config = make_distill_config(context, seed, config.steps)
    run_config = make_run_config(context, distill_config)
    centres = read_target_centres(entry, distill_config.ipc, np.arange(len(run_config.classes)))
    objective = make_objective(run_config, centres, device)
    with tf32_disabled(), deterministic_algorithms(device):
        start = time.perf_counter()
        quick, _ = optimize_backbone(
            context.backbone, run_config.micro_batch * run_config.views, run_config.execution.mode
        )
        setup_seconds = time.perf_counter() - start

        def step(state: DistillState) -> float:
            return train_step(state, run_config, [LossTerm(quick, objective)]).loss

        return run_with_snapshots(
            context, f"ours-seed-{seed}", "full", run_config, config.every, step, setup_seconds
        )
