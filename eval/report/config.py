"""What `sfm report` can be asked for."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sfm.config_fields import Place
from sfm.paths import expand_homes


class ReportConfig(BaseModel):
    """The configuration of one report; the command line has one option per field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: Place[list[Path]] = Field(
        min_length=1,
        description="Directories that `sfm distill` wrote; several are compared.",
        json_schema_extra={"argument": True, "metavar": "DIR..."},
    )
    out: Place[Path] = Field(description="HTML file to write; a report that is there already is replaced.")
    evaluation: Place[list[Path]] = Field(
        default=[],
        description="What `sfm evaluate --out` wrote of these runs: a .json file, or a folder; repeat for "
        "several. It is shown together with the evaluation.json in the run.",
    )
    store: Place[list[str]] = Field(
        default=[],
        description="Store that the images were distilled from, to show its real images beside them and what "
        "its statistics cost; repeat for several. Without it, the report holds no real image.",
    )

    _expand_paths = field_validator("runs", "out", "evaluation")(expand_homes)
