"""Bounds that the figures of the distillation benchmark must meet."""

import math
from collections.abc import Iterator
from typing import Any

from comparison.training_steps import BARE, BARE_LGM, LGM, PUBLISHED, SFM_STEPS

DEFAULT, WHOLE_BATCH, EXACT = SFM_STEPS

Bar = tuple[str, float | None, float, str]
"""Name, figure (None: could not be measured), bound, and "<=" or ">="."""


def evaluate_bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every bar with its figure, its bound and whether it is met."""
    found = (*time_bars(result), *memory_bars(result), *agreement_bars(result), *accuracy_bars(result))
    keys = ("what", "figure", "bar", "sense")
    return [dict(zip(keys, bar, strict=True)) | {"met": meets_bound(*bar[1:])} for bar in found]


def meets_bound(figure: float | None, bound: float, sense: str) -> bool:
    """Return whether a figure is within its bound; a missing figure is not."""
    if figure is None or math.isnan(figure):
        return False
    return figure <= bound if sense == "<=" else figure >= bound


def time_bars(result: dict[str, Any]) -> Iterator[Bar]:
    """Yield the bars on ratios of time per step."""
    for row in result.get("time", []):
        case = f"{row['backbone']}, {row['image_size']} px, {row['classes']} classes"
        for step, other, bound in (
            (DEFAULT, LGM, 1 / 8),
            (DEFAULT, PUBLISHED, 0.65),
            (WHOLE_BATCH, BARE, 1.1),
            (DEFAULT, BARE, 1.1 if row["micro_batch"] >= row["classes"] else 1.6),
            (EXACT, BARE, 1.6),
            (LGM, BARE_LGM, 1.15),
        ):
            ratio = row["ratios"].get(f"{step} / {other}")
            if ratio:
                yield f"time, {step} / {other}; {case}", ratio["median"], bound, "<="


def memory_bars(result: dict[str, Any]) -> Iterator[Bar]:
    """Yield the bars on ratios of peak memory, between steps and between numbers of classes."""
    peaks = {
        (row["backbone"], row["image_size"], row["classes"], row["name"]): row.get("peak_bytes")
        for row in result.get("memory", [])
    }
    for (backbone, size, classes, name), peak in peaks.items():
        if name != DEFAULT or peak is None:
            continue
        for other, bound in ((LGM, 1 / 15), (PUBLISHED, 1 / 5)):
            other_peak = peaks.get((backbone, size, classes, other))
            if other_peak and (other == LGM or classes >= 100):
                case = f"{backbone}, {size} px, {classes} classes"
                yield f"memory, {name} / {other}; {case}", peak / other_peak, bound, "<="
    for row in result.get("growth", []):
        case = f"{row['backbone']}, {row['image_size']} px"
        yield f"memory, 1,000 / 100 classes, {DEFAULT}; {case}", row["ratio"], 1.1, "<="


def agreement_bars(result: dict[str, Any]) -> Iterator[Bar]:
    """Yield the bars on cosines between gradients; of micro-batches only in float32."""
    for row in result.get("agreement", []):
        between_devices = row["what"].startswith("GPU")
        if between_devices or row["precision"] == "float32":
            case = f"{row['backbone']} in {row['precision']}, {row['image_size']} px"
            bound = 0.999 if between_devices else 0.9999
            yield f"gradient, least cosine of {row['what']}; {case}", min(row["cosines"]), bound, ">="


def accuracy_bars(result: dict[str, Any]) -> Iterator[Bar]:
    """Yield the bars on the time to LGM's final accuracy and on the accuracies at the end."""
    if "accuracy" in result:
        accuracy = result["accuracy"]
        sfm_seconds, lgm_seconds = (accuracy["seconds_to_target"][method] for method in ("ours", "lgm"))
        ratio = None if sfm_seconds is None else sfm_seconds / lgm_seconds
        yield "time to LGM's final accuracy, ours / LGM", ratio, 1 / 5, "<="
        (sfm_top1, _), (lgm_top1, _) = (accuracy["top1"][method] for method in ("ours", "lgm"))
        yield "final top-1, ours - LGM, points", 100 * (sfm_top1 - lgm_top1), 0, ">="
