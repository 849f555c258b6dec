"""What was trained, as files that anyone can load: safetensors, one per backbone and mode."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from sfm.atomic import require_no_link
from sfm.backbones.card import BackboneCard
from sfm.eval.config import CLASSIFIER_BYTES, Mode
from sfm.eval.methods import Trained
from sfm.eval.output_files import write_output
from sfm.eval.part import Part
from sfm.eval.result import Row, protocol_header
from sfm.eval.subjects import Subject
from sfm.eval.synthetic import DistilledRun
from sfm.stats_store.digests import compute_array_digest, compute_sha256, encode_canonical_json
from sfm.tensor_files import TensorFileError, open_safetensors


def file_name(spec: str, mode: Mode) -> str:
    """Return the name of a classifier's file: the spec's letters, digits, dots and dashes, and the mode."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', spec).strip('-')}-{mode}.safetensors"


def save_classifier(
    folder: Path, trained: Trained, row: Row, run: DistilledRun, subject: Subject, source: Part
) -> None:
    """Write what a mode trained into a folder that holds the classifiers of one result.

    A file of the same images, backbone, mode and protocol is replaced, and so is one of images that are no
    longer those of the run; another one of that name stays, and the new one's name ends in what it depends
    on.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    card = subject.backbone.card
    images = compute_array_digest(run.pixels)
    data = as_file(trained, card, source.entry.backbone, row, run.class_ids, images)
    require_no_link(folder)
    path = folder / file_name(card.spec, row.mode)
    if not is_replaceable(path, card.hash, images, row):
        told = encode_canonical_json([card.hash, row.epochs, row.views, row.seed, row.seeds])
        path = path.with_name(f"{path.stem}-{compute_sha256(told)[:8]}{path.suffix}")
    write_output(path, data)


def is_replaceable(path: Path, backbone_hash: str, images: str, row: Row) -> bool:
    """Return whether there is no classifier, or a damaged one, one of other images, or one trained alike."""
    try:
        with open_safetensors(path, "pt", CLASSIFIER_BYTES) as file:
            header = file.metadata() or {}
    except (FileNotFoundError, TensorFileError):
        return True
    same = ("backbone_hash", backbone_hash), *protocol_header(row).items()
    return header.get("images", images) != images or all(header.get(k, v) == v for k, v in same)


def as_file(
    trained: Trained,
    backbone: BackboneCard,
    inherited: BackboneCard,
    row: Row,
    class_ids: Sequence[str],
    images: str,
) -> bytes:
    """Return the classifier of the first seed as the bytes of a safetensors file.

    ``weight`` (class, feature) and ``bias`` (class,) classify raw features of the backbone. Where the mode
    has a projector, ``projector_weight`` (target feature, feature) and ``projector_bias`` are the part of
    them that maps features to those of the backbone distilled on. The header says which backbone, mode and
    classes.

    Parameters
    ----------
    trained : Trained
    backbone, inherited : BackboneCard
        The one evaluated on, and the one distilled on.
    row : Row
        What it scores.
    class_ids : sequence of str
        In the order of the weight's rows.
    images : str
        Digest of the distilled images.
    """
    tensors: dict[str, Tensor] = {"weight": trained.heads.weight[0], "bias": trained.heads.bias[0]}
    if trained.projectors is not None:
        tensors["projector_weight"] = trained.projectors.weight[0]
        tensors["projector_bias"] = trained.projectors.bias[0]
    about = {
        "backbone": backbone.spec,
        "backbone_hash": backbone.hash,
        "image_size": str(backbone.preprocessing.input_size),
        "distilled_on": inherited.spec,
        "distilled_on_hash": inherited.hash,
        "mode": row.mode,
        "images": images,
        **protocol_header(row),
        "class_ids": json.dumps(list(class_ids)),
    }
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, about)
