"""Digest the weights of a backbone, independent of the format of their file."""

import hashlib
import struct
from collections.abc import Collection, Mapping

from torch import Tensor

from sfm.errors import InputError


def is_in_modules(tensor_name: str, module_names: Collection[str]) -> bool:
    """Return whether a tensor belongs to one of the named modules."""
    return any(tensor_name.startswith(f"{module}.") for module in module_names)


def select_feature_tensors(
    state_dict: Mapping[str, Tensor], unused_module_names: Collection[str]
) -> dict[str, Tensor]:
    """Return the tensors that the feature depends on.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        A model's persistent tensors under timm's names.
    unused_module_names : collection of str
        Names of modules after the feature: the classifier, if the feature is its input.

    Returns
    -------
    dict of str to Tensor
        Without the unused modules and without the counters of batch norms, which no output depends on.
    """
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if not is_in_modules(name, unused_module_names) and not name.endswith("num_batches_tracked")
    }


def digest_weights(tensors: Mapping[str, Tensor]) -> str:
    """Digest tensors by name, shape and value, in any order.

    Each tensor, sorted by name, contributes the length of its name and the name (UTF-8), the number of its
    dimensions and each of them, and its values as little-endian float32 in row-major order; all lengths are
    unsigned 64-bit little-endian integers. So different sets of tensors never serialise to the same bytes.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        At the resolution they were stored in.

    Returns
    -------
    str
        SHA-256, hexadecimal.

    Raises
    ------
    InputError
        If a value is infinite or not a number; the tensor is named.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().float()
        if not values.isfinite().all():
            raise InputError(f"weight {name} holds values that are infinite or not a number")
        encoded = name.encode()
        digest.update(struct.pack("<Q", len(encoded)) + encoded)
        digest.update(struct.pack(f"<{1 + values.ndim}Q", values.ndim, *values.shape))
        digest.update(values.contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()
