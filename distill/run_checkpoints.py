"""Checkpoints: the state of a run on disk as safetensors and JSON, to resume it to the same bits."""

import hashlib
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor

from sfm.atomic import require_folder_is_not_link
from sfm.config_fields import MAX_ITERATIONS
from sfm.constrained_types import FiniteFloat, NonNegativeFloat
from sfm.deletion import delete_without_following_links
from sfm.distill.process_group import SINGLE_PROCESS, ProcessGroup
from sfm.distill.resolved_config import ResolvedDistillConfig
from sfm.distill.run_files import translate_run_write_errors, write_run_folder
from sfm.distill.state_dict import (
    LAST_FEATURES,
    describe_invalid_state_values,
    has_row_per_image,
    list_expected_state_tensors,
)
from sfm.errors import DamageError, InputError
from sfm.tensor_files import (
    MAX_SAFETENSORS_HEADER_BYTES,
    TensorFileError,
    open_safetensors,
    read_tensor_specs,
    require_tensor_specs,
)
from sfm.text import sanitize_line
from sfm.untrusted_files import read_bounded_file

CHECKPOINTS_TO_KEEP = 2

MAX_VALUE_CHARACTERS = 100
"""Characters of a config's value in an error."""

CHANGEABLE_FIELDS = ("threads", "threads_before", "execution")
"""Fields that a resumed run may change; ``require_no_unwanted_fallback`` checks the last one."""


class RunCheckpoint(BaseModel):
    """The JSON part of a checkpoint.

    Attributes
    ----------
    config : ResolvedDistillConfig
        Resuming requires an equal one. Its key in the file is ``recipe``.
    step : int
        Steps done.
    loss : float or None
        Loss of the last step.
    seconds : float
        Wall time of the steps so far.
    sha256 : str
        Digest of the file that holds the tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    config: Annotated[ResolvedDistillConfig, Field(alias="recipe")]
    step: Annotated[int, Field(ge=0, le=MAX_ITERATIONS)]
    loss: FiniteFloat | None
    seconds: NonNegativeFloat
    sha256: str = ""


def save_checkpoint_and_delete_old(
    folder: Path, checkpoint: RunCheckpoint, state_dict: dict[str, Tensor]
) -> None:
    """Write ``folder/step_<n>`` atomically, and delete all earlier checkpoints but the last one.

    Parameters
    ----------
    folder : Path
    checkpoint : RunCheckpoint
    state_dict : dict of str to Tensor
        See :meth:`~sfm.distill.distiller.Distiller.state_dict`.

    Raises
    ------
    InputError
        If it cannot be written; earlier checkpoints are untouched then.
    """
    require_folder_is_not_link(folder)
    tensors = {name: tensor.contiguous() for name, tensor in state_dict.items() if name != "step"}
    with write_run_folder(folder / f"step_{checkpoint.step:08d}") as partial:
        save_file(tensors, partial / "state.safetensors")
        card = checkpoint.model_copy(update={"sha256": _compute_file_sha256(partial / "state.safetensors")})
        (partial / "checkpoint.json").write_text(card.model_dump_json(indent=1))
    delete_old_checkpoints(folder, CHECKPOINTS_TO_KEEP)


def delete_old_checkpoints(folder: Path, kept_count: int) -> None:
    """Delete all but the last `kept_count` checkpoints, and the leftovers of killed processes.

    Raises
    ------
    InputError
        If a checkpoint cannot be deleted, or the folder is a link.
    """
    require_folder_is_not_link(folder)
    kept = _list_checkpoints_newest_first(folder)[:kept_count]
    with translate_run_write_errors(folder):
        for path in folder.iterdir():
            if path in kept or not path.is_dir():
                continue
            if path.is_symlink():
                path.unlink()
            else:
                # Relative to the parent folder: a link that replaces the folder meanwhile is not followed.
                delete_without_following_links(folder.parent, f"{folder.name}/{path.name}")


def find_newest_intact_checkpoint(folder: Path) -> tuple[Path, RunCheckpoint] | None:
    """Find the newest intact checkpoint; None if there is none at all.

    A damaged checkpoint is skipped: the run resumes from an earlier one.

    Raises
    ------
    DamageError
        If there are checkpoints and none is intact.
    """
    paths = _list_checkpoints_newest_first(folder)
    for path in paths:
        try:
            checkpoint = RunCheckpoint.model_validate_json(read_bounded_file(path / "checkpoint.json"))
            if _is_intact_state_file(path / "state.safetensors", checkpoint):
                return path, checkpoint
        except PermissionError:
            raise
        except (OSError, ValueError):
            continue
    if paths:
        raise DamageError(f"no checkpoint in {folder} is intact: start the run again in another directory")
    return None


def read_state_dict(
    path: Path,
    checkpoint: RunCheckpoint,
    feature_counts: Sequence[int],
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Read the state that :func:`find_newest_intact_checkpoint` found: of all images, or of this process.

    Raises
    ------
    DamageError
        If it is no state of this run: a step beyond its end, other tensors, or values that are not finite.
    """
    config, file = checkpoint.config, path / "state.safetensors"
    rows = group.get_own_row_slice(len(config.classes), config.ipc)
    try:
        if checkpoint.step > config.steps:
            raise TensorFileError(f"{path} is of step {checkpoint.step} of {config.steps}")
        with open_safetensors(file, "pt", config.compute_max_state_bytes()) as opened:
            expected = list_expected_state_tensors(config, checkpoint.step, feature_counts, group)
            dtype = read_tensor_specs(opened).get(LAST_FEATURES, ("", ()))[0]
            if LAST_FEATURES in expected and dtype in ("BF16", "F16"):
                expected[LAST_FEATURES] = dtype, expected[LAST_FEATURES][1]
            require_tensor_specs(opened, expected, file)
            tensors = {
                name: (opened.get_slice(name)[rows] if has_row_per_image(name) else opened.get_tensor(name))
                for name in expected
            }
        problem = describe_invalid_state_values(tensors, checkpoint.step)
        if problem:
            raise TensorFileError(f"{file} holds {problem}")
    except (FileNotFoundError, TensorFileError) as error:
        raise DamageError(
            f"{error}: delete {path} to resume from the checkpoint before it, or start the run again in "
            "another directory"
        ) from error
    return {"step": torch.tensor(checkpoint.step), **tensors}


def require_resumable_config(saved: ResolvedDistillConfig, config: ResolvedDistillConfig, out: Path) -> None:
    """Refuse to resume a run with another config; threads and the reason of the execution mode may differ.

    Raises
    ------
    InputError
        Lists the differences.
    """
    before, now = (_get_values_fixed_on_resume(each) for each in (saved, config))
    changes = [
        f"{name} was {_shorten_value(before[name])} and is {_shorten_value(now[name])} now"
        for name in now
        if before[name] != now[name]
    ]
    if changes:
        raise InputError(
            f"cannot resume the run in {out}: {'; '.join(changes)}; "
            "repeat its own options, or choose another --out"
        )


def _get_values_fixed_on_resume(config: ResolvedDistillConfig) -> dict[str, object]:
    """Return what a resumed run may not change, by name."""
    values = {
        name: getattr(config, name) for name in type(config).model_fields if name not in CHANGEABLE_FIELDS
    }
    # Without their execution modes; what an error shows of a long text is its beginning.
    values["further_backbones"] = "; ".join(
        f"weight {each.weight!r}, {each.image_size} px, backbone {each.backbone}, entry {each.dataset}"
        for each in config.further_backbones
    )
    return values


def _list_checkpoints_newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), reverse=True)


def _is_intact_state_file(state_path: Path, checkpoint: RunCheckpoint) -> bool:
    """Return whether a file is as it was written; a file that is too long for that is not read."""
    status = state_path.stat()
    max_bytes = checkpoint.config.compute_max_state_bytes() + MAX_SAFETENSORS_HEADER_BYTES
    is_small_file = stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes
    return is_small_file and _compute_file_sha256(state_path) == checkpoint.sha256


def _compute_file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shorten_value(value: object) -> str:
    text = str(value) or "none"
    return text[:12] if len(text) == 64 else sanitize_line(text, MAX_VALUE_CHARACTERS)
