"""The inherited classifier, and the projector that brings another backbone's features to it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sfm.errors import InputError
from sfm.eval.export.cards import model_card
from sfm.eval.export.config import ExportConfig
from sfm.eval.report.read import ReportedRun
from sfm.eval.report.words import command_line
from sfm.eval.result import Row
from sfm.stats_store.store import Entry

Tensors = dict[str, npt.NDArray[np.float32]]


def write_classifier(folder: Path, run: ReportedRun, config: ExportConfig) -> None:
    """Write ``model.safetensors``, ``config.json`` and a card.

    ``weight`` (class, feature) and ``bias`` (class,) classify raw features of the backbone. On the backbone
    distilled on they are the classifier of all real images. On any other they are that classifier
    (``classifier_weight``, ``classifier_bias``) behind a projector (``projector_weight``,
    ``projector_bias``), which `sfm evaluate --save` trained on the distilled images.

    Raises
    ------
    InputError
        If no store is given, or the projector has not been trained.
    """
    if run.behind is None:
        raise InputError("--store is required for a classifier: it holds the one of all real images")
    part, entry = run.behind.part, run.behind.part.entry
    inherited: Tensors = {name: part.read(f"classifier/{name}") for name in ("weight", "bias")}
    spec = config.backbone or entry.backbone.spec
    backbone: dict[str, Any] = {
        "spec": spec,
        "hash": entry.backbone.hash,
        "image_size": entry.summary.image_size,
    }
    tensors = inherited
    if spec != entry.backbone.spec:
        saved, header = read_saved(run, entry, spec, config)
        tensors = {
            **saved,
            "classifier_weight": inherited["weight"],
            "classifier_bias": inherited["bias"],
        }
        backbone |= {"hash": header["backbone_hash"], "image_size": int(header["image_size"])}
    own = spec == entry.backbone.spec
    row = None if own else figure(run, spec)
    held_out = entry.classifier.held_out_top1 if own and part.whole else row.top1_mean if row else None
    about = {
        "backbone": backbone,
        "inherited_from": entry.backbone.model_dump(mode="json"),
        "entry": entry.summary.entry_digest,
        "distilled_images": run.digest,
        "class_ids": run.run.class_ids,
        "class_names": run.run.class_names,
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(tensors.items())},
        "held_out_top1": held_out,
    }
    save_file(tensors, folder / "model.safetensors", {"format": "np", "backbone_hash": backbone["hash"]})
    (folder / "config.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(model_card(run, entry.dataset, about, row), encoding="utf-8")


def read_saved(
    run: ReportedRun, entry: Entry, spec: str, config: ExportConfig
) -> tuple[Tensors, dict[str, str]]:
    """Read the classifier with projector that an evaluation left, and its header.

    Raises
    ------
    InputError
        If there is none for this backbone, or it is of another run.
    """
    for path in sorted((run.directory / "classifiers").glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                if (header.get("backbone"), header.get("mode")) != (spec, "inherit"):
                    continue
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{path} is damaged: evaluate again with --save") from error
        classes = json.loads(header["class_ids"])
        if (header["distilled_on_hash"], classes) != (entry.backbone.hash, run.run.class_ids):
            raise InputError(f"{path} is not of the run in {run.directory}: evaluate again with --save")
        return tensors, header
    made_by = command_line(
        "evaluate",
        str(run.directory),
        {"store": config.store, "backbone": spec, "mode": "inherit", "save": True},
    )
    raise InputError(
        f"no projector from {spec} to {entry.backbone.spec} in {run.directory}: make it with `{made_by}`"
    )


def figure(run: ReportedRun, spec: str) -> Row | None:
    """Return what the inherited classifier scores on a backbone, if that was measured on these images."""
    evaluation = run.evaluation
    if evaluation is None or evaluation.provenance.images != run.digest:
        return None
    found = [r for r in evaluation.rows if (r.images, r.mode, r.backbone) == ("distilled", "inherit", spec)]
    return found[0] if found else None
