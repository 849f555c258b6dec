"""Configuration of `sfm report`."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sfm.config_fields import LocationField
from sfm.paths import expand_home_in_path_or_list


class ReportConfig(BaseModel):
    """Configuration of one report; the command line has one option per field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: LocationField[list[Path]] = Field(
        min_length=1,
        description="Directories that `sfm distill` wrote, or evaluated images of another program; several "
        "are compared.",
        json_schema_extra={"argument": True, "metavar": "DIR..."},
    )
    out: LocationField[Path] = Field(description="HTML file to write; replaces a report, and nothing else.")
    evaluation: LocationField[list[Path]] = Field(
        default=[],
        description="Results of these runs that `sfm evaluate --out` wrote: a .json file, or a folder; "
        "repeat for several. They are shown together with the evaluation.json in the run.",
    )
    store: LocationField[list[str]] = Field(
        default=[],
        description="Store that the images were distilled from: the report then shows its real images and "
        "the cost of its statistics; repeat for several. Without it, the report holds no real image.",
    )

    _expand_paths = field_validator("runs", "out", "evaluation")(expand_home_in_path_or_list)
