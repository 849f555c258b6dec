"""Download pretrained weights from the Hugging Face hub, or take them from the local cache."""

import logging
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging

from sfm.errors import InputError


def find_or_download_hub_weights(repository: str) -> Path | None:
    """Return the weights file of a hub repository, from the local cache if it is there.

    Parameters
    ----------
    repository : str
        ``owner/name`` on the hub.

    Returns
    -------
    Path or None
        A file in the cache; None if the repository stores its weights under a file name that only timm knows.

    Raises
    ------
    InputError
        If the weights are not in the cache, and the hub cannot be reached or refuses them.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    verbosity = hub_logging.get_verbosity()
    # Otherwise each retry logs a warning.
    hub_logging.set_verbosity(logging.ERROR)
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except LocalEntryNotFoundError as error:
        raise InputError(f"{repository} is not in the local cache and the hub cannot be reached") from error
    except EntryNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"the hub refuses {repository}: {type(error).__name__}") from error
    finally:
        hub_logging.set_verbosity(verbosity)
