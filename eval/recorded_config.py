"""The configuration that ``evaluation.json`` records: absolute paths, valid from any folder."""

from typing import Any

from sfm.backbones.spec import make_spec_weights_path_absolute
from sfm.eval.config import EvaluateConfig
from sfm.stats_store.location import make_url_absolute
from sfm.text import escape_non_utf8_in_json


def make_recorded_config(config: EvaluateConfig, store_url: str) -> dict[str, Any]:
    """Return the values of an evaluation's configuration with absolute paths.

    Parameters
    ----------
    config : EvaluateConfig
    store_url : str
        URL of the store, without credentials.
    """
    paths = {"run": config.run, "out": config.out}
    values = config.model_dump(mode="json") | {
        "store": make_url_absolute(store_url),
        "backbone": [make_spec_weights_path_absolute(spec) for spec in config.backbone],
        **{name: str(path.absolute()) for name, path in paths.items() if path is not None},
    }
    # Paths may hold bytes that are not UTF-8, which JSON cannot.
    return {name: escape_non_utf8_in_json(value) for name, value in values.items()}
