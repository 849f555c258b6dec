"""Save trained classifiers as safetensors files, one per backbone and mode."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from sfm.atomic import require_folder_is_not_link
from sfm.backbones.card import BackboneCard
from sfm.eval.class_subset import ClassSubsetStatistics
from sfm.eval.config import MAX_CLASSIFIER_BYTES, Mode
from sfm.eval.distilled_run import DistilledRun
from sfm.eval.evaluated_backbones import EvaluatedBackbone
from sfm.eval.mode_training import FittedHeads
from sfm.eval.output_files import write_output
from sfm.eval.result import EARLIER_TRAINING_OPTIONS_HEADER, AccuracyRow, make_training_options_header
from sfm.stats_store.digests import compute_array_digest, compute_sha256, encode_canonical_json
from sfm.tensor_files import TensorFileError, open_safetensors


def make_classifier_file_name(backbone_spec: str, mode: Mode) -> str:
    """Return the name of a classifier's file: the spec's letters, digits, dots and dashes, and the mode."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', backbone_spec).strip('-')}-{mode}.safetensors"


def save_first_seed_classifier(
    folder: Path,
    fitted_heads: FittedHeads,
    row: AccuracyRow,
    run: DistilledRun,
    eval_backbone: EvaluatedBackbone,
    teacher_statistics: ClassSubsetStatistics,
) -> None:
    """Write the heads that a mode trained into the folder with the classifiers of one result.

    A file of the same images, backbone, mode and protocol is replaced, and so is one of images that are no
    longer those of the run. Any other file of that name stays, and the new one's name ends in a digest.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    card = eval_backbone.backbone.card
    image_digest = compute_array_digest(run.pixels)
    teacher_card = teacher_statistics.entry.backbone if run.record.knows_backbones else None
    data = serialize_first_seed_classifier(fitted_heads, card, teacher_card, row, run.class_ids, image_digest)
    require_folder_is_not_link(folder)
    path = folder / make_classifier_file_name(card.spec, row.mode)
    if not is_free_or_replaceable_classifier_path(path, card.hash, image_digest, row):
        # The digest of a zero start is that of versions without a choice.
        start = [row.projector_init] if row.projector_init == "default" else []
        protocol = encode_canonical_json([card.hash, row.epochs, row.views, row.seed, row.seeds, *start])
        path = path.with_name(f"{path.stem}-{compute_sha256(protocol)[:8]}{path.suffix}")
    write_output(path, data)


def is_free_or_replaceable_classifier_path(
    classifier_path: Path, backbone_hash: str, image_digest: str, row: AccuracyRow
) -> bool:
    """Return whether a path is free, damaged, of other images, or of the same backbone and protocol."""
    try:
        with open_safetensors(classifier_path, "pt", MAX_CLASSIFIER_BYTES) as file:
            header = EARLIER_TRAINING_OPTIONS_HEADER | (file.metadata() or {})
    except (FileNotFoundError, TensorFileError):
        return True
    expected = ("backbone_hash", backbone_hash), *make_training_options_header(row).items()
    return header.get("images", image_digest) != image_digest or all(
        header.get(name, value) == value for name, value in expected
    )


def serialize_first_seed_classifier(
    fitted_heads: FittedHeads,
    eval_backbone_card: BackboneCard,
    teacher_backbone_card: BackboneCard | None,
    row: AccuracyRow,
    class_ids: Sequence[str],
    image_digest: str,
) -> bytes:
    """Return the classifier of the first seed as the bytes of a safetensors file.

    ``weight`` (class, feature) and ``bias`` (class,) classify raw features of the backbone. Where the mode
    has a projector, ``projector_weight`` (target feature, feature) and ``projector_bias`` map features to
    those of the backbone distilled on. The header holds backbone, mode, protocol and classes.

    Parameters
    ----------
    fitted_heads : FittedHeads
    eval_backbone_card, teacher_backbone_card : BackboneCard
        The backbone evaluated on, and the one distilled on; None if that is unknown.
    row : AccuracyRow
        Its accuracy and protocol.
    class_ids : sequence of str
        In the order of the weight's rows.
    image_digest : str
    """
    tensors: dict[str, Tensor] = {"weight": fitted_heads.heads.weight[0], "bias": fitted_heads.heads.bias[0]}
    if fitted_heads.projectors is not None:
        tensors["projector_weight"] = fitted_heads.projectors.weight[0]
        tensors["projector_bias"] = fitted_heads.projectors.bias[0]
    header = {
        "backbone": eval_backbone_card.spec,
        "backbone_hash": eval_backbone_card.hash,
        "image_size": str(eval_backbone_card.preprocessing.input_size),
        "mode": row.mode,
        "images": image_digest,
        **make_training_options_header(row),
        "class_ids": json.dumps(list(class_ids)),
    }
    if teacher_backbone_card:
        header |= {
            "distilled_on": teacher_backbone_card.spec,
            "distilled_on_hash": teacher_backbone_card.hash,
        }
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, header)
