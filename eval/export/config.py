"""Configuration of `sfm export`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sfm.config_fields import BackboneField, LocationField, RecipeField
from sfm.paths import expand_home_in_path_or_list

ExportFormat = Literal["imagefolder", "webdataset", "parquet", "classifier"]


class ExportConfig(BaseModel):
    """Configuration of one export; the command line has one option per field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: LocationField[Path] = Field(
        description="Directory that `sfm distill` wrote.",
        json_schema_extra={"argument": True, "metavar": "DIR"},
    )
    format: RecipeField[ExportFormat] = Field(
        description="imagefolder: a folder of images per class. webdataset: a tar of .png, .cls and .json. "
        "parquet: as the Hugging Face Hub keeps images. classifier: the inherited classifier, with the "
        "projector that `sfm evaluate --save` left, as safetensors. All with a card."
    )
    out: LocationField[Path] = Field(description="Folder to write; must be new or empty.")
    licence: RecipeField[str | None] = Field(
        default=None,
        min_length=1,
        description="Licence to name on the card, e.g. cc-by-4.0. Default: that of the real data, as their "
        "source or `sfm extract --licence` named it.",
    )
    store: LocationField[str | None] = Field(
        default=None, description="Store the images were distilled from (needed for a classifier)."
    )
    evaluation: LocationField[list[Path]] = Field(
        default=[],
        description="Results of this run that `sfm evaluate --out` wrote: a .json file, or a folder; repeat "
        "for several. Their accuracies and classifiers are used together with those in the run.",
    )
    backbone: BackboneField[str | None] = Field(
        default=None, description="Backbone to use the classifier with. Default: the first distilled on."
    )

    _expand_paths = field_validator("run", "out", "evaluation")(expand_home_in_path_or_list)
