"""The state of a run as named tensors: for ``state_dict``, checkpoints and resuming."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sfm.distill.adam import AdamState
from sfm.distill.process_group import SINGLE_PROCESS, ProcessGroup
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.train_step import DistillState, FeatureState
from sfm.tensor_files import DtypeAndShapeByTensor

LAST_FEATURES, ADAM_STEPS = "seen", "age"
"""Names of tensors that are not of images, as checkpoints have them since version 0.1.0."""

FEATURE_AVERAGE = "feature_average"
"""Name of the moving average of features; names of backbones after the first end in ``_1``, ``_2``, ..."""


def gather_levels(
    state: DistillState, config: ResolvedDistillConfig, group: ProcessGroup = SINGLE_PROCESS
) -> list[Tensor]:
    """Return the pyramids of a state, of shapes (C * K, 3, r, r) in the first process."""
    counts = group.count_rows_per_process(len(config.classes), config.ipc)
    return [group.gather_to_rank0(level.detach(), counts) for level in state.levels]


def gather_state(
    state: DistillState, config: ResolvedDistillConfig, group: ProcessGroup = SINGLE_PROCESS
) -> dict[str, Tensor]:
    """Return the tensors of a state by name: those of all images in the first process."""
    counts = group.count_rows_per_process(len(config.classes), config.ipc)
    tensors = {f"{index}/level": level for index, level in enumerate(gather_levels(state, config, group))}
    for name, moments in (("first", state.adam.first_moments), ("second", state.adam.second_moments)):
        for index, moment in enumerate(moments):
            tensors[f"{index}/adam/{name}"] = group.gather_to_rank0(moment, counts)
    tensors[ADAM_STEPS] = torch.tensor(state.adam.step_count)
    for index, features in enumerate(state.features):
        for name, tensor in ((LAST_FEATURES, features.last), (FEATURE_AVERAGE, features.average)):
            if tensor is not None:
                tensors[make_backbone_tensor_name(name, index)] = tensor
    return tensors


def make_backbone_tensor_name(base_name: str, backbone_index: int) -> str:
    """Return the name of a tensor of one of several backbones."""
    return f"{base_name}_{backbone_index}" if backbone_index else base_name


def make_state_from_tensors(
    step: int, tensors: Mapping[str, Tensor], device: torch.device, backbone_count: int = 1
) -> DistillState:
    """Return the state of one process's images from copies of its tensors; see :func:`gather_state`."""
    tensors = {name: tensor.detach().to(device, copy=True) for name, tensor in tensors.items()}
    count = sum(name.endswith("/level") for name in tensors)
    levels = [tensors[f"{index}/level"].requires_grad_() for index in range(count)]
    first, second = (
        [tensors[f"{index}/adam/{name}"] for index in range(count)] for name in ("first", "second")
    )
    features = [
        FeatureState(
            tensors.get(make_backbone_tensor_name(LAST_FEATURES, index)),
            tensors.get(make_backbone_tensor_name(FEATURE_AVERAGE, index)),
        )
        for index in range(backbone_count)
    ]
    return DistillState(step, levels, AdamState(first, second, int(tensors[ADAM_STEPS])), features)


def list_expected_state_tensors(
    config: ResolvedDistillConfig,
    step: int,
    feature_counts: Sequence[int],
    group: ProcessGroup = SINGLE_PROCESS,
) -> DtypeAndShapeByTensor:
    """Return types and shapes of the tensors of :func:`gather_state` after a number of steps.

    Parameters
    ----------
    config : ResolvedDistillConfig
    step : int
        Steps done.
    feature_counts : sequence of int
        Length of each backbone's features, D.
    group : ProcessGroup
    """
    count = config.count_levels_at(max(step - 1, 0))
    shapes = {
        f"{index}/{name}": (config.image_count, 3, side, side)
        for index, side in enumerate(config.level_resolutions[:count])
        for name in ("level", "adam/first", "adam/second")
    }
    types: DtypeAndShapeByTensor = {name: ("F32", shape) for name, shape in shapes.items()}
    types[ADAM_STEPS] = ("I64", ())
    is_split = config.micro_batch < group.count_rows_per_process(len(config.classes), config.ipc)[0]
    rows = {}
    if step and config.gradient == "one-pass" and is_split:
        rows[LAST_FEATURES] = config.image_count * config.views
    if step and config.feature_decay:
        rows[FEATURE_AVERAGE] = config.image_count
    for index, feature_count in enumerate(feature_counts):
        for name, row_count in rows.items():
            types[make_backbone_tensor_name(name, index)] = ("F32", (row_count, feature_count))
    return types


def has_row_per_image(tensor_name: str) -> bool:
    """Return whether a tensor of a state has a row per image."""
    return tensor_name.endswith(("/level", "/adam/first", "/adam/second"))


def describe_invalid_state_values(tensors: Mapping[str, Tensor], step: int) -> str | None:
    """Describe values that no run can have; None if all are valid."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all() or (name.endswith("/adam/second") and (tensor < 0).any()):
            return f"values in {name} that no run can have"
    if not 0 <= int(tensors[ADAM_STEPS]) <= step:
        return f"an optimizer step count that no run has after {step} steps"
    return None
