"""What is written down about a run: the recipe it can be resumed with, and the record of how it went."""

import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field

from sfm.backbones.build import Backbone
from sfm.backbones.execution.preparation import Prepared
from sfm.config_fields import MAX_IMAGES_PER_CLASS
from sfm.constrained_types import Count, FiniteFloat, Name, NonNegativeFloat
from sfm.distill.checkpoint import Checkpoint
from sfm.distill.config import DistillConfig
from sfm.distill.engine import Plan
from sfm.distill.portable import portable_config
from sfm.errors import InputError
from sfm.stats_store.location import make_url_absolute
from sfm.stats_store.store import Entry
from sfm.untrusted_files import parse_json, read_bounded_file

PACKAGES = ("sfm-distill", "torch", "timm", "numpy")


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
        "final_rate": plan.final_rate,
        "grow_every": plan.grow_every,
        "seed": plan.seed,
        "micro_batch": plan.micro_batch,
        "gradient": plan.gradient,
        "graphs": plan.graphs,
        "device": backbone.device.type,
        "precision": config.precision,
        "devices": config.devices,
        "threads": threads,
    }


def record_of(
    config: DistillConfig,
    plan: Plan,
    entry: Entry,
    chosen: npt.NDArray[np.int64],
    backbone: Backbone,
    checkpoint: Checkpoint,
    *,
    store: str,
    images: str,
    prepared: Prepared,
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """Return what ``run.json`` holds.

    Parameters
    ----------
    config, plan, entry, chosen, backbone
        Of the run.
    checkpoint : Checkpoint
        Its last one.
    store : str
        URL of the store, without credentials.
    images : str
        Digest of the images' pixels.
    prepared : Prepared
        How the backbone was computed.
    peak_memory_bytes : int
        Of the process that took most, in its steps.
    """
    return {
        "command": "distill",
        "config": portable_config(config, store, checkpoint.recipe["classes"], checkpoint.recipe["threads"]),
        "store": make_url_absolute(store),
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
        "graphs": plan.graphs,
        "threads": checkpoint.recipe["threads"],
        "notes": notes_of(checkpoint.recipe),
        "precision": config.precision,
        "execution": checkpoint.recipe.get("execution", {"mode": prepared.mode, "reason": prepared.reason}),
        # As earlier versions wrote it.
        "kernels": {name: checkpoint.recipe[name] for name in ("compiled", "captured", "repeatable")}
        | {"obstacle": prepared.reason},
        "devices": config.devices,
        "images": images,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": device_name(backbone.device),
        "loss": checkpoint.loss,
        "wall_seconds": checkpoint.seconds,
        "peak_memory_bytes": peak_memory_bytes,
    }


class FinishedRecord(BaseModel):
    """The part of the ``run.json`` of a finished run that is told; all of it is kept."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    ipc: Annotated[int, Field(ge=1, le=MAX_IMAGES_PER_CLASS)]
    dataset: Name
    loss: FiniteFloat
    wall_seconds: NonNegativeFloat
    peak_memory_bytes: Count


def read_record(path: Path) -> dict[str, Any]:
    """Read the ``run.json`` of a finished run.

    Raises
    ------
    InputError
        If it is not what :func:`record_of` gives.
    """
    try:
        record: dict[str, Any] = parse_json(read_bounded_file(path))
        FinishedRecord.model_validate(record)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(
            f"{path} is not what `sfm distill` writes: delete it to have the run finished again"
        ) from error
    return record


def notes_of(recipe: dict[str, Any]) -> list[str]:
    """Return what a user of the images should know about how they were computed, in sentences."""
    before = recipe.get("threads_before", [])
    if not before:
        return []
    numbers = ", then ".join(str(count) for count in [*before, recipe["threads"]])
    return [
        f"computed with {numbers} threads: the last bits may differ from a run with one number throughout"
    ]


def train_samples(entry: Entry, chosen: npt.NDArray[np.int64]) -> int:
    """Return how many real images the chosen classes have."""
    if len(chosen) == len(entry.dataset.class_ids):
        return entry.dataset.train_samples
    return int(entry.read_array("train/count")[chosen].sum())


def device_name(device: torch.device) -> str:
    """Return what the run was computed on, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Return the most memory in use so far, in bytes: of the process, or allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
