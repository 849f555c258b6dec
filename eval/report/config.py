"""What `sfm report` can be asked for."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sfm.config_fields import LocationField
from sfm.paths import expand_home_in_field


class ReportConfig(BaseModel):
    """The configuration of one report; the command line has one option per field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: LocationField[list[Path]] = Field(
        min_length=1,
        description="Directories that `sfm distill` wrote; several are compared.",
        json_schema_extra={"argument": True, "metavar": "DIR..."},
    )
    out: LocationField[Path] = Field(
        description="HTML file to write; a report that is there already is replaced."
    )
    evaluation: LocationField[list[Path]] = Field(
        default=[],
        description="What `sfm evaluate --out` wrote of these runs: a .json file, or a folder; repeat for "
        "several. It is shown together with the evaluation.json in the run.",
    )
    store: LocationField[list[str]] = Field(
        default=[],
        description="Store that the images were distilled from, to show its real images beside them and what "
        "its statistics cost; repeat for several. Without it, the report holds no real image.",
    )

    _expand_paths = field_validator("runs", "out", "evaluation")(expand_home_in_field)
