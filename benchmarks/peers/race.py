"""How soon and how far LGM and `sfm distill` come: runs that leave their images at marks, scored afterwards.

What is scored are images as they would be shipped, by `sfm evaluate`, with features held out in the store.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from peers import lgm

from sfm.api import DistillConfig, EvaluateRunsConfig, ExtractConfig, evaluate_runs, extract, open_store
from sfm.backbones.arithmetic import same_bits, whole_float32
from sfm.backbones.build import Backbone, load_backbone
from sfm.backbones.frozen import frozen
from sfm.distill import checkpoint as checkpoints
from sfm.distill import engine
from sfm.distill.centres import read_centres
from sfm.distill.checkpoint import Checkpoint
from sfm.distill.directory import whole_folder
from sfm.distill.engine import Plan, State, even_growth
from sfm.distill.group import ALONE
from sfm.distill.images import class_folders, pixels, write_images
from sfm.distill.kernels import quickened, wanted_kernels
from sfm.distill.pyramid import canvas_size
from sfm.distill.run import objective_of, plan_of
from sfm.errors import InputError
from sfm.eval.result import mean_and_deviation
from sfm.pipeline.parts import held_out_rows
from sfm.pipeline.selection import UNUSED, selection_of
from sfm.pipeline.sources import Source, open_source
from sfm.stats_store.store import Entry

LGM_VIEWS = 10
TUNE_FRACTION = 0.2
Role = Literal["full", "tuning"]


@dataclass(frozen=True)
class Race:
    """What is to be compared.

    Attributes
    ----------
    spec : str
        Of the backbone.
    image_size : int
        In pixels.
    device : str
    source : str
        Of the real images.
    store : str or None
        Where their statistics are, or are to be; None: in `work`.
    work : Path
        Folder for the runs; what it holds is not done again.
    seeds : int
        Distillations of each.
    rates : list of float
        Learning rates that LGM chooses from.
    steps_lgm, steps_tune : int
        Of LGM; and of the runs that choose its learning rate.
    grow_lgm : int
        LGM's pyramid grows as in a run of so many steps: in the first half of them.
    steps : int or None
        Of ours; None: as `sfm distill`.
    every, every_lgm : int
        Images are kept after so many steps, and in the end.
    quick : bool
        Few images and a short evaluation.
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
class Ground:
    """What the runs of the accuracy section share.

    Attributes
    ----------
    backbone, ours : Backbone
        As loaded, for LGM; and as `sfm distill` counts its memory.
    spec : str
        Of the backbone.
    store : str
    entries : dict of str to Entry
        By role.
    work : Path
        Where runs are written.
    probe : dict
        Options of the evaluation.
    """

    backbone: Backbone
    ours: Backbone
    spec: str
    store: str
    entries: dict[Role, Entry]
    work: Path
    probe: dict[str, int]


def tell(text: str) -> None:
    """Report progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def rows_of(config: ExtractConfig, source: Source, role: Role) -> npt.NDArray[np.int64]:
    """Return which training images the statistics of an entry are of, ascending."""
    selection = selection_of(config, source)
    assert selection is not None
    labels = selection.labels["train"]
    used = labels != UNUSED
    if role == "tuning":
        assert config.tune_fraction is not None
        used &= ~held_out_rows(labels, selection.class_ids, config.tune_fraction, config.seed)
    return np.flatnonzero(used)


def real_images(config: ExtractConfig, backbone: Backbone, canvas: int, role: Role) -> lgm.RealImages:
    """Decode the training images whose statistics an entry of a role holds."""
    source = open_source(config.source)
    rows = rows_of(config, source, role)
    tell(f"decoding {len(rows)} real images at {canvas} px for LGM, role {role}")
    return lgm.decoded(source, rows, backbone, canvas)


def follow(
    ground: Ground,
    name: str,
    role: Role,
    plan: Plan,
    steps: int,
    every: int,
    step: Callable[[State], float],
    spent: float = 0.0,
) -> list[Path]:
    """Do the steps of a run and leave its images after `every` so many, and in the end.

    What an earlier call left of the same run is not done again. Seconds spent before the first step count.

    Returns
    -------
    list of Path
        A directory per mark, as `sfm evaluate` reads it.

    Raises
    ------
    InputError
        If an earlier call went on past one of the marks.
    """
    folder, device = ground.work / name, ground.backbone.device
    folder.mkdir(parents=True, exist_ok=True)
    ends = [*range(every, steps, every), steps]
    marks = [folder / f"step_{end:06d}" for end in ends]
    entry = ground.entries[role]
    recipe = json.loads(json.dumps(asdict(plan))) | {
        "entry": entry.summary.entry_digest,
        "classes": entry.dataset.class_ids,
        "threads": 1,
    }
    if plan.final_rate == 1:
        # No step depends on how many are to come, so a longer run goes on where a shorter one ended.
        del recipe["steps"]
    saved = checkpoints.find(folder / "checkpoint")
    if saved:
        checkpoints.require_same(saved[1].recipe, recipe, folder)
    if saved:
        lost = [
            end for end, mark in zip(ends, marks, strict=True) if end <= saved[1].step and not mark.exists()
        ]
        if lost:
            raise InputError(
                f"{folder} has no images of step {lost[0]}: keep them as often as the run that left it, "
                f"or choose another --work"
            )
        longest = replace(plan, steps=max(plan.steps, saved[1].step))
        features = ground.backbone.card.features
        state, seconds = checkpoints.load(*saved, longest, features, device), saved[1].seconds
    else:
        state, seconds = engine.begin(plan, device), spent
    for end in (end for end in ends if end > state.step):
        while state.step < end:
            took = time.perf_counter()
            loss = step(state)
            seconds += time.perf_counter() - took
        write_run(folder / f"step_{end:06d}", ground, role, plan, state, seconds)
        checkpoint = Checkpoint(recipe=recipe, step=end, loss=loss, seconds=seconds)
        checkpoints.save(folder / "checkpoint", checkpoint, checkpoints.tensors_of(state, plan))
        tell(f"{name}: step {end} of {steps}, loss {loss:.3f}, {seconds:.0f} s")
    return marks


def write_run(out: Path, ground: Ground, role: Role, plan: Plan, state: State, seconds: float) -> None:
    """Write images such that `sfm evaluate` reads them."""
    entry = ground.entries[role]
    ids, names = entry.dataset.class_ids, entry.dataset.class_names
    classes = [
        {"index": index, "class_id": class_id, "name": name}
        for index, (class_id, name) in enumerate(zip(ids, names, strict=True))
    ]
    record = {
        "command": "distill",
        "config": {"backbone": ground.spec},
        "store": ground.store,
        "entry_digest": entry.summary.entry_digest,
        "fingerprint": entry.summary.fingerprint,
        "dataset": entry.dataset.name,
        "backbone": ground.backbone.card.model_dump(mode="json"),
        "image_size": plan.image_size,
        "canvas": plan.canvas,
        "ipc": plan.ipc,
        "step": state.step,
        "wall_seconds": seconds,
    }
    with whole_folder(out) as folder:
        (folder / "images").mkdir()
        write_images(
            folder / "images", pixels(state.levels, plan.canvas), class_folders(ids, names), plan.ipc
        )
        (folder / "classes.json").write_text(json.dumps(classes))
        (folder / "run.json").write_text(json.dumps(record, indent=1))


def our_config(ground: Ground, seed: int, steps: int | None) -> DistillConfig:
    """Return what `sfm distill` is asked for: its defaults, but for the steps if there are to be others."""
    given = {} if steps is None else {"steps": steps}
    return DistillConfig(
        store=ground.store,
        backbone=ground.spec,
        dataset=ground.entries["full"].dataset.name,
        out=Path("none"),
        seed=seed,
        **given,  # type: ignore[arg-type]
    )


def plan_for(ground: Ground, config: DistillConfig) -> Plan:
    """Return the plan that `sfm distill` makes."""
    return plan_of(config, len(ground.entries["full"].dataset.class_ids), ground.ours, {}, ALONE)


def lgm_run(
    ground: Ground, race: Race, real: lgm.RealImages, role: Role, rate: float, seed: int
) -> list[Path]:
    """Run LGM; its pyramid grows as ours does, in the first half of a run of `grow_lgm` steps."""
    base = plan_for(ground, our_config(ground, seed, None))
    steps = race.steps_tune if role == "tuning" else race.steps_lgm
    growth = even_growth(race.grow_lgm, base.image_size)
    # It looks at neither; so what it does is told apart by what it looks at alone.
    base = replace(base, micro_batch=base.images, gradient="exact", graphs=base.images)
    plan = replace(base, views=LGM_VIEWS, learning_rate=rate, final_rate=1.0, grow_every=growth, steps=steps)
    name = f"lgm-{role}-rate-{rate:g}-seed-{seed}"
    step = partial(lgm.advance, plan=plan, backbone=ground.backbone, real=real)
    return follow(ground, name, role, plan, steps, race.every_lgm, step)


def our_run(ground: Ground, race: Race, seed: int) -> list[Path]:
    """Run ours as `sfm distill` does by default."""
    config, entry = our_config(ground, seed, race.steps), ground.entries["full"]
    plan = plan_for(ground, config)
    centres = read_centres(entry, config.ipc, np.arange(plan.classes))
    objective = objective_of(config, centres, ground.backbone.device)
    with whole_float32(), same_bits(ground.backbone.device):
        began = time.perf_counter()
        wanted = wanted_kernels(plan, config.compile, ground.backbone.device)
        quick, _, _ = quickened(ground.backbone, plan, wanted)
        spent = time.perf_counter() - began
        step = partial(engine.advance, plan=plan, backbone=quick, objective=objective)
        return follow(ground, f"ours-seed-{seed}", "full", plan, config.steps, race.every, step, spent)


def score(ground: Ground, runs: Sequence[Path]) -> None:
    """Train and test a linear head on the images of every run that has not been scored."""
    left = [run for run in runs if not (run / "evaluation.json").exists()]
    if left:
        tell(f"scoring {len(left)} sets of images")
        evaluate_runs(
            EvaluateRunsConfig(
                run=left,
                store=ground.store,
                mode=["linear"],
                device=ground.backbone.device.type,  # type: ignore[arg-type]
                **ground.probe,  # type: ignore[arg-type]
            )
        )


def curve(runs: Sequence[Path]) -> list[dict[str, float]]:
    """Return step, seconds and accuracy of scored marks."""
    points = []
    for run in runs:
        record = json.loads((run / "run.json").read_bytes())
        rows = json.loads((run / "evaluation.json").read_bytes())["rows"]
        (top1,) = (row["top1_mean"] for row in rows if row["images"] == "distilled")
        points.append({"step": record["step"], "seconds": record["wall_seconds"], "top1": top1})
    return points


def mean_curve(curves: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """Average curves over seeds, mark by mark."""
    return [
        {key: statistics.fmean(point[key] for point in points) for key in points[0]}
        for points in zip(*curves, strict=True)
    ]


def reached(points: Sequence[dict[str, float]], top1: float) -> float | None:
    """Return the seconds to the first mark that is as accurate as that; None if there is none."""
    # Means over seeds are sums of floats: the last mark must reach its own figure.
    return next((point["seconds"] for point in points if point["top1"] >= top1 - 1e-9), None)


def run_race(race: Race) -> dict[str, Any]:
    """Compare how soon and how far LGM and ours come."""
    config = ExtractConfig(
        source=race.source,
        store=race.store or str(race.work / "store"),
        backbone=[race.spec],
        image_size=race.image_size,
        limit_per_class=40 if race.quick else None,
        tune_fraction=TUNE_FRACTION,
        device=race.device,
    )
    tell(f"extracting {config.source} into {config.store}")
    extract(config)
    backbone = load_backbone(race.spec, image_size=race.image_size, device=race.device)
    ground = Ground(
        backbone,
        frozen(backbone),
        race.spec,
        config.store,
        {role: entry_of(config, backbone, role) for role in ("full", "tuning")},
        race.work,
        {"seeds": 3, "epochs": 100, "views": 5} if race.quick else {"seeds": 3},
    )
    canvas = canvas_size(race.image_size)

    tuning = []
    real = real_images(config, backbone, canvas, "tuning")
    for rate in race.rates:
        runs = lgm_run(ground, race, real, "tuning", rate, 0)
        score(ground, runs[-1:])
        tuning.append({"rate": rate, "top1": curve(runs[-1:])[0]["top1"]})
        tell(f"LGM at {rate:g}: {100 * tuning[-1]['top1']:.1f} % of the tuning split")
    rate = max(tuning, key=lambda each: each["top1"])["rate"]

    real = real_images(config, backbone, canvas, "full")
    theirs, ours = [], []
    for seed in range(race.seeds):
        theirs.append(lgm_run(ground, race, real, "full", rate, seed))
        ours.append(our_run(ground, race, seed))
    score(ground, [run for runs in (*theirs, *ours) for run in runs])
    curves = {"lgm": [curve(runs) for runs in theirs], "ours": [curve(runs) for runs in ours]}
    final = {way: [points[-1]["top1"] for points in each] for way, each in curves.items()}
    target = statistics.fmean(final["lgm"])
    mean = {way: mean_curve(each) for way, each in curves.items()}
    return {
        "source": race.source,
        "backbone": race.spec,
        "image_size": race.image_size,
        "real_images": len(real.labels),
        "seeds": race.seeds,
        "tuning": tuning,
        "rate": rate,
        "curves": curves,
        "mean_curve": mean,
        "top1": {way: mean_and_deviation(each) for way, each in final.items()},
        "seconds_to_target": {way: reached(points, target) for way, points in mean.items()},
        "seconds_in_all": {way: points[-1]["seconds"] for way, points in mean.items()},
    }


def entry_of(config: ExtractConfig, backbone: Backbone, role: Role) -> Entry:
    """Open the entry that an extraction has published."""
    store = open_store(config.store)
    (summary,) = (
        known
        for known in store.list_summaries()
        if known.role == role and known.backbone_hash == backbone.card.hash
    )
    return store.open_entry(summary)
