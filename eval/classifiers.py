"""What was trained, as files that anyone can load: safetensors, one per backbone and mode."""

import json
import re
from collections.abc import Sequence

from safetensors.torch import save
from torch import Tensor

from sfm.backbones.card import BackboneCard
from sfm.eval.config import Mode
from sfm.eval.methods import Trained

FOLDER = "classifiers"


def file_name(spec: str, mode: Mode) -> str:
    """Return the name of a classifier's file: the spec's letters, digits, dots and dashes, and the mode."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', spec).strip('-')}-{mode}.safetensors"


def as_file(
    trained: Trained, backbone: BackboneCard, inherited: BackboneCard, mode: Mode, class_ids: Sequence[str]
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
    mode : Mode
    class_ids : sequence of str
        In the order of the weight's rows.
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
        "mode": mode,
        "class_ids": json.dumps(list(class_ids)),
    }
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, about)
