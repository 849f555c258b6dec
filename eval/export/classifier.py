"""The inherited classifier, and the projector that brings another backbone's features to it."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Json, ValidationError
from safetensors.numpy import save_file

from sfm.backbones.card import BackboneCard
from sfm.constrained_types import Digest, InputPixels, Name
from sfm.errors import InputError
from sfm.eval.config import CLASSIFIER_BYTES, RESULT, classifier_folder
from sfm.eval.export.cards import model_card
from sfm.eval.export.config import ExportConfig
from sfm.eval.report.figures import most_thorough, place_of
from sfm.eval.report.read import ReportedRun, result_files
from sfm.eval.report.words import command_line
from sfm.eval.result import Row, Seed, Times, protocol_header
from sfm.paths import resolve_links
from sfm.stats_store.store import Entry, open_store
from sfm.tensor_files import TensorFileError, open_safetensors, read_tensor_specs, require_tensor_specs

Tensors = dict[str, npt.NDArray[np.float32]]


class SavedHeader(BaseModel):
    """The header of a classifier with projector; texts, as safetensors keeps them."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    backbone: Name
    backbone_hash: Digest
    image_size: InputPixels
    distilled_on_hash: Digest
    mode: Name
    class_ids: Json[list[str]]
    images: Digest | None = None
    epochs: Times | None = None
    views: Times | None = None
    seed: Seed | None = None
    seeds: Times | None = None


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
    card: BackboneCard | None = entry.backbone
    backbone: dict[str, Any] = {
        "spec": spec,
        "hash": entry.backbone.hash,
        "image_size": entry.summary.image_size,
    }
    tensors, header = inherited, dict[str, str]()
    if spec != entry.backbone.spec:
        saved, header = read_saved(run, entry, spec, config)
        tensors = {
            **saved,
            "classifier_weight": inherited["weight"],
            "classifier_bias": inherited["bias"],
        }
        backbone |= {"hash": header["backbone_hash"], "image_size": int(header["image_size"])}
        card = card_of(config.store, header["backbone_hash"])
    if card:
        backbone |= card.model_dump(mode="json", include={"model", "rule", "preprocessing"})
    own = spec == entry.backbone.spec
    row = None if own else figure(run, header)
    held_out = entry.classifier.held_out_top1 if own and part.whole else row.top1_mean if row else None
    about = {
        "backbone": backbone,
        "inherited_from": entry.backbone.model_dump(mode="json"),
        "entry": entry.summary.entry_digest,
        "distilled_images": run.digest,
        "role": entry.summary.role,
        "class_ids": run.run.class_ids,
        "class_names": run.run.class_names,
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(tensors.items())},
        "held_out_top1": held_out,
    }
    save_file(tensors, folder / "model.safetensors", {"format": "np", "backbone_hash": backbone["hash"]})
    (folder / "config.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(
        model_card(run, entry.dataset, about, row, config.licence), encoding="utf-8"
    )


def card_of(store: str | None, backbone_hash: str) -> BackboneCard | None:
    """Find a backbone's card in a store; it says how images are to be fed to it."""
    opened = open_store(store) if store else None
    for summary in opened.list_summaries() if opened else ():
        if opened and summary.backbone_hash == backbone_hash:
            return opened.open_entry(summary).backbone
    return None


def read_saved(
    run: ReportedRun, entry: Entry, spec: str, config: ExportConfig
) -> tuple[Tensors, dict[str, str]]:
    """Read the classifier with projector that an evaluation left, and its header.

    Raises
    ------
    InputError
        If there is none for this backbone, or it is of another run or of other images.
    """
    found: list[tuple[tuple[int, int], Tensors, dict[str, str]]] = []
    own = classifier_folder(run.directory / RESULT)
    for path in saved_files(run, config):
        try:
            with open_safetensors(path, "numpy", CLASSIFIER_BYTES) as file:
                header = file.metadata() or {}
                if (header.get("backbone"), header.get("mode")) != (spec, "inherit"):
                    continue
                about = SavedHeader.model_validate(header)
                if path.parent != own and about.images != run.digest:
                    continue  # a folder of results holds those of other runs, too
                if (about.distilled_on_hash, about.class_ids) != (entry.backbone.hash, run.run.class_ids):
                    raise InputError(
                        f"{path} is not of the run in {run.directory}: evaluate again with --save"
                    )
                if about.images in (None, run.digest):
                    tensors = read_projected(file, path, len(about.class_ids), entry.backbone.features)
                    found.append(((about.epochs or 0, about.seeds or 0), tensors, header))
        except (FileNotFoundError, TensorFileError, ValidationError) as error:
            raise InputError(f"{path} is damaged: evaluate again with --save") from error
    if found:
        _, tensors, header = max(found, key=lambda one: one[0])
        return tensors, header
    out, then = config.evaluation[0] if config.evaluation else None, ""
    if out is None and not os.access(run.directory, os.W_OK):
        out = Path(f"{resolve_links(run.directory).name}-evaluation.json")
        then = f", and give --evaluation {shlex.quote(str(out))}"
    asked = {"store": config.store, "backbone": spec, "mode": "inherit", "save": True, "out": out}
    made_by = command_line("evaluate", str(run.directory), asked)
    wanted = f"projector from {spec} to {entry.backbone.spec}"
    raise InputError(f"no {wanted} in {run.directory}: make it with `{made_by}`{then}")


def read_projected(file: Any, path: Path, classes: int, target: int) -> Tensors:
    """Read the tensors of a classifier with projector from a file that is open.

    Parameters
    ----------
    file
        See :func:`~sfm.tensor_files.open_safetensors`.
    path : Path
        Of the file.
    classes, target : int
        Of the run, and length of the features that the projector maps to.

    Raises
    ------
    TensorFileError
        If it holds other tensors than `sfm evaluate --save` writes, or values that are not finite.
    """
    _, own = read_tensor_specs(file).get("weight", ("", ()))
    shapes = {
        "weight": (classes, *own[1:]),
        "bias": (classes,),
        "projector_weight": (target, *own[1:]),
        "projector_bias": (target,),
    }
    if len(own) != 2:
        raise TensorFileError(f"{path} holds a weight of shape {list(own)}")
    require_tensor_specs(file, {name: ("F32", shape) for name, shape in shapes.items()}, path)
    tensors: Tensors = {name: file.get_tensor(name) for name in shapes}
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise TensorFileError(f"{path} holds values that are not finite")
    return tensors


def saved_files(run: ReportedRun, config: ExportConfig) -> list[Path]:
    """Return the classifiers beside the result in the run, and beside the results elsewhere."""
    results = [run.directory / RESULT, *(file for place in config.evaluation for file in result_files(place))]
    folders = dict.fromkeys(map(classifier_folder, results))
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def figure(run: ReportedRun, header: Mapping[str, str]) -> Row | None:
    """Return what an exported classifier scores, if that was measured on these images."""
    evaluation = run.evaluation
    if evaluation is None or evaluation.provenance.images != run.digest:
        return None
    place = ("distilled", header["backbone"], int(header["image_size"]), "inherit")
    found = [row for row in evaluation.rows if place_of(row) == place]
    alike = [row for row in found if protocol_header(row).items() <= header.items()]
    return next(iter(alike or most_thorough(found)), None)
