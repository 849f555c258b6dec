"""Everything to resume a run exactly, as safetensors and JSON."""

import hashlib
import stat
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor

from sfm.atomic import require_no_link
from sfm.backbones.execution.modes import ExecutionMode
from sfm.config_fields import MAX_IMAGES_PER_CLASS, MAX_ITERATIONS, MAX_PROCESSES
from sfm.constrained_types import MAX_FEATURES, FiniteFloat, InputPixels, Name, NonNegativeFloat
from sfm.deletion import delete_below
from sfm.distill.adam import Moments
from sfm.distill.directory import whole_folder, writing
from sfm.distill.engine import Plan, State
from sfm.distill.group import ALONE, Group
from sfm.distill.pyramid import canvas_size, resolutions
from sfm.errors import DamageError, InputError
from sfm.tensor_files import (
    MAX_SAFETENSORS_HEADER_BYTES,
    TensorFileError,
    TensorSpecs,
    open_safetensors,
    read_tensor_specs,
    require_tensor_specs,
)
from sfm.text import sanitize_line
from sfm.untrusted_files import read_bounded_file

KEPT = 2

LONGEST_TOLD = 100
"""Characters of a value of a recipe in an error."""

Threads = Annotated[int, Field(ge=1, le=MAX_PROCESSES)]


class SavedExecution(BaseModel):
    """The execution mode of a run, and why it was chosen."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    mode: ExecutionMode
    reason: Name


class SavedRecipe(BaseModel):
    """The part of a recipe that is relied on before it is compared with what is asked for now."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    classes: Annotated[list[Name], Field(fail_fast=True, min_length=1)]
    ipc: Annotated[int, Field(ge=1, le=MAX_IMAGES_PER_CLASS)]
    image_size: InputPixels
    views: Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]
    micro_batch: Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]
    graphs: Annotated[int, Field(ge=0, le=MAX_ITERATIONS)]
    threads: Threads
    threads_before: Annotated[list[Threads], Field(max_length=1000)] = []
    compiled: bool = False
    captured: bool = False
    execution: SavedExecution | None = None

    def most_bytes(self) -> int:
        """Return what the tensors of a state take at most."""
        images = len(self.classes) * self.ipc
        pixels = sum(side**2 for side in resolutions(canvas_size(self.image_size)))
        # Levels with two moments each, features as they were last seen, and the age.
        return 4 * images * (3 * 3 * pixels + self.views * MAX_FEATURES) + 8


def require_recipe(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse a recipe that no run has."""
    SavedRecipe.model_validate(value)
    return value


class Checkpoint(BaseModel):
    """What is known about a saved state.

    Attributes
    ----------
    recipe : dict
        Everything that shapes the images, by the name of the option that sets it; a run is resumed only
        with the same. ``backbone`` is a backbone hash, ``dataset`` an entry digest.
    step : int
        Steps done.
    loss : float or None
        Of the last of them.
    seconds : float
        Wall time of the steps so far.
    sha256 : str
        Of the file that holds the tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Annotated[dict[str, Any], AfterValidator(require_recipe)]
    step: Annotated[int, Field(ge=0, le=MAX_ITERATIONS)]
    loss: FiniteFloat | None
    seconds: NonNegativeFloat
    sha256: str = ""


def levels_of(state: State, plan: Plan, group: Group = ALONE) -> list[Tensor]:
    """Return the pyramids of a state, of shapes (C * K, 3, r, r) in the first process."""
    counts = [share.stop - share.start for share in group.shares(plan.classes, plan.ipc)]
    return [group.collected(level.detach(), counts) for level in state.levels]


def tensors_of(state: State, plan: Plan, group: Group = ALONE) -> dict[str, Tensor]:
    """Return what a state consists of, by name: that of all images in the first process."""
    counts = [share.stop - share.start for share in group.shares(plan.classes, plan.ipc)]
    tensors = {f"{index}/level": level for index, level in enumerate(levels_of(state, plan, group))}
    for name, moments in (("first", state.moments.first), ("second", state.moments.second)):
        for index, moment in enumerate(moments):
            tensors[f"{index}/adam/{name}"] = group.collected(moment, counts)
    tensors["age"] = torch.tensor(state.moments.age)
    return tensors if state.seen is None else tensors | {"seen": state.seen}


def save(folder: Path, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Save a state as ``folder/step_<n>``: it is there whole or not at all. Older ones but the last go.

    Parameters
    ----------
    folder : Path
    checkpoint : Checkpoint
    tensors : dict of str to Tensor
        See :func:`tensors_of`.

    Raises
    ------
    InputError
        If it cannot be written; earlier checkpoints are untouched then.
    """
    require_no_link(folder)
    with whole_folder(folder / f"step_{checkpoint.step:08d}") as partial:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors"
        )
        card = checkpoint.model_copy(update={"sha256": _sha256(partial / "state.safetensors")})
        (partial / "checkpoint.json").write_text(card.model_dump_json(indent=1))
    keep(folder, KEPT)


def keep(folder: Path, count: int) -> None:
    """Delete all but the last `count` checkpoints, and what a killed process left.

    Raises
    ------
    InputError
        If something cannot be deleted, or the folder is a link.
    """
    require_no_link(folder)
    saved = _saved(folder)
    with writing(folder):
        for path in folder.iterdir():
            if path in saved[:count] or not path.is_dir():
                continue
            if path.is_symlink():
                path.unlink()
            else:
                # Through the folder's own parent: a link that takes its place meanwhile is not followed.
                delete_below(folder.parent, f"{folder.name}/{path.name}")


def find(folder: Path) -> tuple[Path, Checkpoint] | None:
    """Find the newest intact checkpoint; None if there is none at all.

    A damaged one is passed over for the one before it, from which the same steps are done again.

    Raises
    ------
    DamageError
        If there are checkpoints and none is intact.
    """
    saved = _saved(folder)
    for path in saved:
        try:
            checkpoint = Checkpoint.model_validate_json(read_bounded_file(path / "checkpoint.json"))
            if _is_whole(path / "state.safetensors", checkpoint):
                return path, checkpoint
        except PermissionError:
            raise
        except (OSError, ValueError):
            continue
    if saved:
        raise DamageError(f"no checkpoint in {folder} is intact: start the run again in another directory")
    return None


def load(
    path: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    features: int,
    device: torch.device,
    group: Group = ALONE,
) -> State:
    """Load the state that :func:`find` found: of all images, or those of this process.

    Raises
    ------
    DamageError
        If it is no state of this run: a step beyond its end, other tensors, or values that are not finite.
    """
    own = group.share(plan.classes, plan.ipc)
    most = SavedRecipe.model_validate(checkpoint.recipe).most_bytes()
    try:
        if checkpoint.step > plan.steps:
            raise TensorFileError(f"{path} is of step {checkpoint.step} of {plan.steps}")
        file = path / "state.safetensors"
        with open_safetensors(file, "pt", most) as opened:
            expected = expected_tensors(plan, checkpoint.step, features, group)
            if "seen" in expected and read_tensor_specs(opened).get("seen", ("", ()))[0] in ("BF16", "F16"):
                expected["seen"] = read_tensor_specs(opened)["seen"][0], expected["seen"][1]
            require_tensor_specs(opened, expected, file)
            tensors = {
                name: (opened.get_slice(name)[own] if _is_per_image(name) else opened.get_tensor(name))
                for name in expected
            }
        require_sane(tensors, checkpoint.step, file)
    except (FileNotFoundError, TensorFileError) as error:
        raise DamageError(
            f"{error}: delete {path} to go on from the checkpoint before it, or start the run again in "
            "another directory"
        ) from error
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    numbers = range(_count(tensors))
    levels = [tensors[f"{index}/level"].requires_grad_() for index in numbers]
    first, second = ([tensors[f"{index}/adam/{name}"] for index in numbers] for name in ("first", "second"))
    moments = Moments(first, second, int(tensors["age"]))
    return State(checkpoint.step, levels, moments, tensors.get("seen"))


def expected_tensors(plan: Plan, step: int, features: int, group: Group = ALONE) -> TensorSpecs:
    """Return types and shapes of what :func:`tensors_of` gives after so many steps."""
    count = plan.levels(max(step - 1, 0))
    shapes = {
        f"{index}/{name}": (plan.images, 3, side, side)
        for index, side in enumerate(resolutions(plan.canvas)[:count])
        for name in ("level", "adam/first", "adam/second")
    }
    found: TensorSpecs = {name: ("F32", shape) for name, shape in shapes.items()}
    found["age"] = ("I64", ())
    in_parts = plan.micro_batch < group.shares(plan.classes, plan.ipc)[0].stop
    if step and plan.gradient == "one-pass" and in_parts:
        found["seen"] = ("F32", (plan.images * plan.views, features))
    return found


def require_sane(tensors: dict[str, Tensor], step: int, file: Path) -> None:
    """Refuse values that no step leaves.

    Raises
    ------
    TensorFileError
        Names the tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all() or (name.endswith("/adam/second") and (tensor < 0).any()):
            raise TensorFileError(f"{file} holds values in {name} that no run leaves")
    if not 0 <= int(tensors["age"]) <= step:
        raise TensorFileError(f"{file} holds an age that no run has after {step} steps")


def require_same(found: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    """Refuse to resume a run with another recipe; with other threads it may be.

    Raises
    ------
    InputError
        Names what differs.
    """
    changed = [
        f"{name} was {_short(found.get(name))} and is {_short(asked[name])} now"
        for name in asked
        if name != "threads" and found.get(name) != asked[name]
    ]
    if changed:
        raise InputError(
            f"cannot resume the run in {out}: {'; '.join(changed)}; "
            "repeat its own options, or choose another --out"
        )


def with_threads(checkpoint: Checkpoint, threads: int) -> Checkpoint:
    """Return a checkpoint to go on from with so many threads; it tells which there were before."""
    recipe = checkpoint.recipe
    if threads == recipe["threads"]:
        return checkpoint
    before = [*recipe.get("threads_before", []), recipe["threads"]]
    return checkpoint.model_copy(update={"recipe": recipe | {"threads": threads, "threads_before": before}})


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), reverse=True)


def _is_per_image(name: str) -> bool:
    return name.endswith(("/level", "/adam/first", "/adam/second"))


def _count(tensors: dict[str, Tensor]) -> int:
    return sum(name.endswith("/level") for name in tensors)


def _is_whole(path: Path, checkpoint: Checkpoint) -> bool:
    """Return whether a file is as it was written; a file that is too long for that is not read."""
    state = path.stat()
    most = SavedRecipe.model_validate(checkpoint.recipe).most_bytes() + MAX_SAFETENSORS_HEADER_BYTES
    return stat.S_ISREG(state.st_mode) and state.st_size <= most and _sha256(path) == checkpoint.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else sanitize_line(text, LONGEST_TOLD)
