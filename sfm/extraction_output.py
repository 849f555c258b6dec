"""Output of ``sfm extract``: entries, rates, files, precision and unusual pixels."""

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sfm.pipeline.extract_config import ExtractConfig
from sfm.pixel_warnings import (
    list_composited_and_dark_image_warnings,
    make_composited_and_dark_image_document,
)
from sfm.tables import print_entry_table
from sfm.terminal import print_line, print_next_command

if TYPE_CHECKING:
    from sfm.pipeline.extract import ExtractionResult

MAX_SKIPPED_SHOWN = 20


def make_extraction_document(config: ExtractConfig, extraction: "ExtractionResult") -> dict[str, Any]:
    """Return the document of ``sfm extract --json``."""
    entries = [
        {
            "outcome": p.outcome,
            **p.summary.model_dump(mode="json"),
            **make_composited_and_dark_image_document(card),
        }
        for p, card in zip(extraction.published, extraction.cards, strict=True)
    ]
    return {
        "store": config.store,
        "entries": entries,
        "images_read": extraction.pass_summary.images_read,
        "images_resumed": extraction.pass_summary.images_resumed,
        "seconds": extraction.pass_summary.seconds,
        "statistics_seconds": extraction.statistics_seconds,
        "images_per_second": extraction.pass_summary.images_per_second,
        "skipped": extraction.skipped,
        "flow_cosines": extraction.flow_cosines,
        "files": extraction.files.model_dump() if extraction.files else None,
        "notes": extraction.notes,
    }


def print_extraction_result(config: ExtractConfig, extraction: "ExtractionResult") -> None:
    """Print the published entries, the numbers of images read and skipped, and the next command."""
    from sfm.pipeline.file_counts import describe_file_counts

    summaries = [p.summary for p in extraction.published]
    print_entry_table(f"Store {config.store}", summaries, [p.outcome for p in extraction.published])
    summary = extraction.pass_summary
    if summary.images_read:
        rate = f"{summary.images_per_second:.0f} images/s"
        print_line(f"{summary.images_read} images read in {summary.seconds:.0f} s ({rate})")
    else:
        print_line(
            "nothing was read: the source's listing is that of the stored entries (--rehash reads anyway)"
        )
    if extraction.statistics_seconds:
        seconds = f"{extraction.statistics_seconds:.0f} s"
        print_line(f"then classifiers, sub-class centres and publishing in {seconds}")
    if extraction.files:
        print_line(describe_file_counts(extraction.files))
    for line in (
        *extraction.notes,
        *describe_flow_agreement_with_float32(extraction, config.precision),
        *list_composited_and_dark_image_warnings(list(zip(summaries, extraction.cards, strict=True))),
    ):
        print_line(line)
    print_undecodable_images(extraction.skipped, config.store)
    first = summaries[0]
    print_next_command(
        "distill",
        *("--store", config.store, "--backbone", first.backbone, "--dataset", first.dataset),
        *("--image-size", first.image_size, "--out", f"{first.dataset}-distilled"),
    )


def print_undecodable_images(undecodable_images: list[str], store_url: str) -> None:
    """Print the images that could not be decoded, if there are any."""
    if not undecodable_images:
        return
    print_line(f"{len(undecodable_images)} images could not be decoded and are not in the entries:")
    for line in undecodable_images[:MAX_SKIPPED_SHOWN]:
        print_line(f"  {line}")
    if len(undecodable_images) > MAX_SKIPPED_SHOWN:
        print_line(f"  … `sfm store show {shlex.quote(store_url)} … --json` lists all of them")


def describe_flow_agreement_with_float32(extraction: "ExtractionResult", precision: str) -> Iterator[str]:
    """Yield for every backbone how far flows in this precision are from those in float32."""
    from sfm.pipeline.flow_agreement import MIN_FAITHFUL_COSINE

    for summary in {p.summary.backbone_hash: p.summary for p in extraction.published}.values():
        if summary.backbone_hash in extraction.flow_cosines:
            cosine = extraction.flow_cosines[summary.backbone_hash]
            effect = "its effect on the flows is not known: all images looked at are of one class"
            if cosine is not None:
                verdict = (
                    "equivalent to float32" if cosine >= MIN_FAITHFUL_COSINE else "float32 is safer for it"
                )
                effect = f"cosine of the flows with those in float32 {cosine:.5f} ({verdict})"
            yield f"{precision} on {summary.backbone}: {effect}"
