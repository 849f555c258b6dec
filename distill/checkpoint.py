"""Everything to resume a run exactly, as safetensors and JSON."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfm.atomic import remove, require_no_link
from sfm.distill.adam import Moments
from sfm.distill.directory import whole_folder
from sfm.distill.engine import Plan, State
from sfm.distill.group import ALONE, Group
from sfm.errors import DamageError, InputError

KEPT = 2


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

    recipe: dict[str, Any]
    step: int
    loss: float | None
    seconds: float
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
    """Delete all but the last `count` checkpoints, and what a killed process left."""
    saved = _saved(folder)
    for path in folder.iterdir():
        if path not in saved[:count] and path.is_dir():
            remove(path)


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
            checkpoint = Checkpoint.model_validate_json((path / "checkpoint.json").read_bytes())
            if _sha256(path / "state.safetensors") == checkpoint.sha256:
                return path, checkpoint
        except (FileNotFoundError, ValidationError):
            continue
    if saved:
        raise DamageError(f"no checkpoint in {folder} is intact: start the run again in another directory")
    return None


def load(path: Path, checkpoint: Checkpoint, plan: Plan, device: torch.device, group: Group = ALONE) -> State:
    """Load the state that :func:`find` found: of all images, or those of this process."""
    own = group.share(plan.classes, plan.ipc)
    with safe_open(path / "state.safetensors", framework="pt") as file:
        tensors = {
            name: (file.get_slice(name)[own] if _is_per_image(name) else file.get_tensor(name)).to(device)
            for name in file.keys()  # noqa: SIM118 - not a dict
        }
    numbers = range(_count(tensors))
    levels = [tensors[f"{index}/level"].requires_grad_() for index in numbers]
    first, second = ([tensors[f"{index}/adam/{name}"] for index in numbers] for name in ("first", "second"))
    moments = Moments(first, second, int(tensors["age"]))
    return State(checkpoint.step, levels, moments, tensors.get("seen"))


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
