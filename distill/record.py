"""The record of a run: what ``run.json`` holds."""

import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from sfm.backbones.spec import make_spec_weights_path_absolute
from sfm.config_fields import MAX_IMAGES_PER_CLASS
from sfm.constrained_types import Count, FiniteFloat, Name, NonNegativeFloat
from sfm.distill.config import DistillConfig
from sfm.distill.distiller import Distiller
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.target_estimate import make_target_record
from sfm.errors import InputError
from sfm.stats_store.location import make_url_absolute
from sfm.stats_store.store import Entry
from sfm.untrusted_files import parse_json, read_bounded_file

DISTILLATION_PACKAGES = ("sfm-distill", "torch", "timm", "numpy")


def make_run_record_without_result(
    config: DistillConfig, distiller: Distiller, images_digest: str
) -> dict[str, Any]:
    """Return the content of ``run.json`` without the result: loss, time and memory.

    Parameters
    ----------
    config : DistillConfig
        As given by the user.
    distiller : Distiller
        Prepared.
    images_digest : str
        Digest of the images' pixels.
    """
    resolved, entry, card = distiller.config, distiller.entry, distiller.backbone.card
    mode = resolved.execution.mode
    obstacles = [each.reason for each in distiller.prepared if each.reason]
    return {
        "command": "distill",
        "config": make_portable_config(config, resolved, entry.store_url),
        "resolved": resolved.model_dump(mode="json"),
        "store": make_url_absolute(entry.store_url),
        "entry_digest": entry.summary.entry_digest,
        "fingerprint": entry.summary.fingerprint,
        "dataset": entry.dataset.name,
        "licence": entry.dataset.licence,
        "train_samples": count_train_samples(entry, resolved.classes),
        "backbone": card.model_dump(mode="json"),
        "image_size": resolved.image_size,
        "canvas": resolved.canvas_pixels,
        "ipc": resolved.ipc,
        "seed": resolved.seed,
        "micro_batch": resolved.micro_batch,
        "graphs": resolved.graphs,
        "threads": resolved.threads,
        "notes": list_reproducibility_notes(resolved),
        "precision": resolved.precision,
        "execution": resolved.execution.model_dump(mode="json"),
        # As version 0.1.0 wrote it.
        "kernels": {
            "compiled": mode == "compiled",
            "captured": mode in ("compiled", "cuda-graph"),
            "repeatable": resolved.repeatable,
            "obstacle": "; ".join(dict.fromkeys(obstacles)) or None,
        },
        "backbones": list_backbone_records(config, distiller),
        "targets": make_target_record(distiller.computed_targets, resolved),
        "devices": resolved.devices,
        "images": images_digest,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in DISTILLATION_PACKAGES},
        "device": describe_device(distiller.backbone.device),
    }


def list_backbone_records(config: DistillConfig, distiller: Distiller) -> list[dict[str, Any]]:
    """Return a record of every backbone that the images are matched to; other keys describe the first."""
    return [
        {
            "backbone": backbone.card.model_dump(mode="json"),
            "spec": make_spec_weights_path_absolute(spec),
            "entry_digest": matched.dataset,
            "image_size": matched.image_size,
            "weight": matched.weight,
            "execution": matched.execution.model_dump(mode="json"),
        }
        for spec, backbone, matched in zip(
            config.backbone, distiller.backbones, distiller.config.matched_backbones, strict=True
        )
    ]


def make_portable_config(
    config: DistillConfig, resolved: ResolvedDistillConfig, store_url: str
) -> dict[str, Any]:
    """Return the config of a run for ``--config`` in another folder: whole paths and the classes themselves.

    The threads are those that the run ended with: another number would give other last bits.
    """
    portable = config.model_copy(
        update={"backbone": [make_spec_weights_path_absolute(spec) for spec in config.backbone]}
    )
    return portable.model_dump(mode="json") | {
        "store": make_url_absolute(store_url),
        "classes": None if config.classes is None else resolved.classes,
        "out": str(config.out.absolute()),
        "threads": resolved.threads,
    }


class FinishedRecord(BaseModel):
    """The part of the ``run.json`` of a finished run that the command line prints or changes."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    config: dict[str, Any]
    ipc: Annotated[int, Field(ge=1, le=MAX_IMAGES_PER_CLASS)]
    dataset: Name
    loss: FiniteFloat
    wall_seconds: NonNegativeFloat
    peak_memory_bytes: Count
    targets: dict[str, Any] | None = None


def read_run_record(path: Path) -> dict[str, Any]:
    """Read the ``run.json`` of a finished run.

    Raises
    ------
    InputError
        If it is not what ``sfm distill`` writes.
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


def list_reproducibility_notes(config: ResolvedDistillConfig) -> list[str]:
    """Return notes for users on how the images were computed."""
    if not config.threads_before:
        return []
    numbers = ", then ".join(str(count) for count in [*config.threads_before, config.threads])
    return [
        f"computed with {numbers} threads: the last bits may differ from a run with one number throughout"
    ]


def count_train_samples(entry: Entry, class_ids: list[str]) -> int:
    """Return the number of real training images of some classes."""
    if class_ids == entry.dataset.class_ids:
        return entry.dataset.train_samples
    indices = [entry.dataset.class_ids.index(class_id) for class_id in class_ids]
    return int(entry.read_array("train/count")[indices].sum())


def describe_device(device: torch.device) -> str:
    """Return a human-readable name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def read_peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory in use so far, in bytes: of the process, or allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
