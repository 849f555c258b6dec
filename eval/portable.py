"""An evaluation's configuration as ``evaluation.json`` keeps it: it means the same in another folder."""

from typing import Any

from sfm.backbones.spec import make_spec_absolute
from sfm.eval.config import EvaluateConfig
from sfm.stats_store.location import make_url_absolute
from sfm.text import escape_non_utf8_values


def portable_config(config: EvaluateConfig, store: str) -> dict[str, Any]:
    """Return the configuration of an evaluation, with whole paths.

    Parameters
    ----------
    config : EvaluateConfig
        As it was asked for.
    store : str
        URL of the store, without credentials.
    """
    kept = config.model_dump(mode="json")
    paths = {"run": config.run, "out": config.out}
    whole = kept | {
        "store": make_url_absolute(store),
        "backbone": [make_spec_absolute(spec) for spec in config.backbone],
        **{name: str(path.absolute()) for name, path in paths.items() if path is not None},
    }
    # Paths may hold bytes that are not UTF-8, which JSON cannot.
    return {name: escape_non_utf8_values(value) for name, value in whole.items()}
