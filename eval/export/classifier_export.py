"""Export the inherited classifier, with the projector from another backbone's features where needed."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Json, ValidationError
from safetensors.numpy import save_file

from sfm.backbones.card import BackboneCard
from sfm.constrained_types import Digest, InputPixels, Name
from sfm.errors import InputError
from sfm.eval.config import MAX_CLASSIFIER_BYTES, RESULT_FILE, get_classifier_folder
from sfm.eval.distilled_run import DistilledPixelDigest
from sfm.eval.export.config import ExportConfig
from sfm.eval.export.hub_cards import render_model_card
from sfm.eval.report.reported_runs import ReportedRun, list_result_files
from sfm.eval.report.row_selection import get_key_without_training_options, select_longest_trained_rows
from sfm.eval.report.text_format import format_sfm_command
from sfm.eval.result import (
    EARLIER_TRAINING_OPTIONS_HEADER,
    AccuracyRow,
    PositiveCount,
    Seed,
    make_training_options_header,
)
from sfm.paths import resolve_links
from sfm.stats_store.store import Entry, open_store
from sfm.tensor_files import TensorFileError, open_safetensors, read_tensor_specs, require_tensor_specs

NamedTensors = dict[str, npt.NDArray[np.float32]]


class ClassifierHeader(BaseModel):
    """The safetensors header of a classifier with projector; all values are strings."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    backbone: Name
    backbone_hash: Digest
    image_size: InputPixels
    distilled_on_hash: Digest
    mode: Name
    class_ids: Json[list[str]]
    images: DistilledPixelDigest | None = None
    epochs: PositiveCount | None = None
    views: PositiveCount | None = None
    seed: Seed | None = None
    seeds: PositiveCount | None = None


class SavedClassifier(NamedTuple):
    """A classifier with projector as `sfm evaluate --save` wrote it, and the header of its file."""

    tensors: NamedTensors
    header: dict[str, str]


def export_classifier(folder: Path, run: ReportedRun, config: ExportConfig) -> None:
    """Write ``model.safetensors``, ``config.json`` and a card.

    ``weight`` (class, feature) and ``bias`` (class,) classify raw features of the backbone. On a backbone
    distilled on they are its classifier of all real images. On any other they are that of the first backbone
    distilled on (``classifier_weight``, ``classifier_bias``) behind a projector (``projector_weight``,
    ``projector_bias``), which `sfm evaluate --save` trained on the distilled images.

    Raises
    ------
    InputError
        If no store is given, or the projector has not been trained.
    """
    if run.source_data is None:
        raise InputError("--store is required for a classifier: it holds the one of all real images")
    own = [s for s in run.source_data.all_statistics if s.entry.backbone.spec == config.backbone]
    statistics = own[0] if own else run.source_data.first_statistics
    entry = statistics.entry
    inherited: NamedTensors = {
        name: statistics.read_per_class_array(f"classifier/{name}") for name in ("weight", "bias")
    }
    spec = config.backbone or entry.backbone.spec
    card: BackboneCard | None = entry.backbone
    backbone: dict[str, Any] = {
        "spec": spec,
        "hash": entry.backbone.hash,
        "image_size": entry.summary.image_size,
    }
    tensors, header = inherited, dict[str, str]()
    is_own = spec == entry.backbone.spec
    if not is_own:
        saved, header = read_saved_classifier_with_projector(run, entry, spec, config)
        tensors = {
            **saved,
            "classifier_weight": inherited["weight"],
            "classifier_bias": inherited["bias"],
        }
        backbone |= {"hash": header["backbone_hash"], "image_size": int(header["image_size"])}
        card = find_backbone_card(config.store, header["backbone_hash"])
    if card:
        backbone |= card.model_dump(mode="json", include={"model", "rule", "preprocessing"})
    row = None if is_own else find_classifier_row(run, header)
    held_out = (
        entry.classifier.held_out_top1
        if is_own and statistics.has_all_classes
        else row.top1_mean
        if row
        else None
    )
    classifier_config = {
        "backbone": backbone,
        "inherited_from": entry.backbone.model_dump(mode="json"),
        "entry": entry.summary.entry_digest,
        "distilled_images": run.pixel_digest,
        "role": entry.summary.role,
        "class_ids": run.distilled.class_ids,
        "class_names": run.distilled.class_names,
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(tensors.items())},
        "held_out_top1": held_out,
    }
    save_file(tensors, folder / "model.safetensors", {"format": "np", "backbone_hash": backbone["hash"]})
    (folder / "config.json").write_text(
        json.dumps(classifier_config, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "README.md").write_text(
        render_model_card(run, entry.dataset, classifier_config, row, config.licence), encoding="utf-8"
    )


def find_backbone_card(store_url: str | None, backbone_hash: str) -> BackboneCard | None:
    """Return a backbone's card, with its preprocessing, from any entry of a store; None if it has none."""
    store = open_store(store_url) if store_url else None
    for summary in store.list_summaries() if store else ():
        if store and summary.backbone_hash == backbone_hash:
            return store.open_entry(summary).backbone
    return None


def read_saved_classifier_with_projector(
    run: ReportedRun, source_entry: Entry, backbone_spec: str, config: ExportConfig
) -> SavedClassifier:
    """Read the classifier with projector, and its header, that `sfm evaluate --save` wrote.

    Raises
    ------
    InputError
        If there is none for this backbone, or it is of another run or of other images.
    """
    candidates: list[tuple[tuple[int, int], NamedTensors, dict[str, str]]] = []
    own_folder = get_classifier_folder(run.directory / RESULT_FILE)
    for path in list_classifier_files(run, config):
        try:
            with open_safetensors(path, "numpy", MAX_CLASSIFIER_BYTES) as file:
                header = file.metadata() or {}
                if (header.get("backbone"), header.get("mode")) != (backbone_spec, "inherit"):
                    continue
                fields = ClassifierHeader.model_validate(header)
                if path.parent != own_folder and fields.images != run.pixel_digest:
                    continue  # a folder of results also holds classifiers of other runs
                if (fields.distilled_on_hash, fields.class_ids) != (
                    source_entry.backbone.hash,
                    run.distilled.class_ids,
                ):
                    raise InputError(
                        f"{path} is not of the run in {run.directory}: evaluate again with --save"
                    )
                if fields.images in (None, run.pixel_digest):
                    tensors = read_classifier_tensors(
                        file, path, len(fields.class_ids), source_entry.backbone.features
                    )
                    candidates.append(((fields.epochs or 0, fields.seeds or 0), tensors, header))
        except (FileNotFoundError, TensorFileError, ValidationError) as error:
            raise InputError(f"{path} is damaged: evaluate again with --save") from error
    if candidates:
        _, tensors, header = max(candidates, key=lambda candidate: candidate[0])
        return SavedClassifier(tensors, header)
    out, next_step = config.evaluation[0] if config.evaluation else None, ""
    if out is None and not os.access(run.directory, os.W_OK):
        out = Path(f"{resolve_links(run.directory).name}-evaluation.json")
        next_step = f", and give --evaluation {shlex.quote(str(out))}"
    options = {"store": config.store, "backbone": backbone_spec, "mode": "inherit", "save": True, "out": out}
    command = format_sfm_command("evaluate", str(run.directory), options)
    projector = f"projector from {backbone_spec} to {source_entry.backbone.spec}"
    raise InputError(f"no {projector} in {run.directory}: make it with `{command}`{next_step}")


def read_classifier_tensors(
    safetensors_file: Any, path: Path, class_count: int, target_feature_width: int
) -> NamedTensors:
    """Read the tensors of a classifier with projector from an open safetensors file.

    Parameters
    ----------
    file
        See :func:`~sfm.tensor_files.open_safetensors`.
    path : Path
        Path of the file, for messages.
    class_count, target_feature_width : int
        Number of classes of the run, and length of the features that the projector maps to.

    Raises
    ------
    TensorFileError
        If it holds other tensors than `sfm evaluate --save` writes, or values that are not finite.
    """
    _, weight_shape = read_tensor_specs(safetensors_file).get("weight", ("", ()))
    shapes = {
        "weight": (class_count, *weight_shape[1:]),
        "bias": (class_count,),
        "projector_weight": (target_feature_width, *weight_shape[1:]),
        "projector_bias": (target_feature_width,),
    }
    if len(weight_shape) != 2:
        raise TensorFileError(f"{path} holds a weight of shape {list(weight_shape)}")
    require_tensor_specs(safetensors_file, {name: ("F32", shape) for name, shape in shapes.items()}, path)
    tensors: NamedTensors = {name: safetensors_file.get_tensor(name) for name in shapes}
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise TensorFileError(f"{path} holds values that are not finite")
    return tensors


def list_classifier_files(run: ReportedRun, config: ExportConfig) -> list[Path]:
    """Return the classifier files beside the result in the run, and beside those of `--evaluation`."""
    results = [
        run.directory / RESULT_FILE,
        *(file for path in config.evaluation for file in list_result_files(path)),
    ]
    folders = dict.fromkeys(map(get_classifier_folder, results))
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def find_classifier_row(run: ReportedRun, classifier_header: Mapping[str, str]) -> AccuracyRow | None:
    """Return the accuracy row of an exported classifier, if it was measured on these images."""
    evaluation = run.evaluation
    if evaluation is None or evaluation.provenance.images != run.pixel_digest:
        return None
    group = ("distilled", classifier_header["backbone"], int(classifier_header["image_size"]), "inherit")
    rows = [row for row in evaluation.rows if get_key_without_training_options(row) == group]
    known_header = EARLIER_TRAINING_OPTIONS_HEADER | {**classifier_header}
    same_protocol = [row for row in rows if make_training_options_header(row).items() <= known_header.items()]
    return next(iter(same_protocol or select_longest_trained_rows(rows)), None)
