"""The command line of the store: ``sfm store``."""

from typing import Annotated

import typer

from sfm import terminal
from sfm.command import AsJson, Quiet

store_app = typer.Typer(help="Look into a store of statistics.", no_args_is_help=True)

Url = Annotated[str, typer.Argument(metavar="URL", help="The store: a path, s3://, gs:// or az:// URL.")]


@store_app.command(
    "ls", epilog="Examples:\n\n  $ sfm store ls ./store\n\n  $ sfm store ls s3://team/stats --json"
)
def store_ls(url: Url, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the entries of a store."""
    with terminal.reporting():
        from sfm.stats_store.store import open_store

        entries = open_store(url).summaries()
        if as_json:
            terminal.print_json({"entries": [s.model_dump(mode="json") for s in entries]})
        else:
            terminal.entry_table(f"Store {url}: {len(entries)} entries", entries)


@store_app.command("show", epilog="Examples:\n\n  $ sfm store show ./store fashion-mnist-6k --backbone lite0")
def store_show(
    url: Url,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="NAME, NAME@DIGEST or NAME@tuning.")],
    backbone: Annotated[str | None, typer.Option(help="The backbone's spec, as `ls` shows it.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Input size in pixels.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show one entry: backbone, dataset, classes, how it was extracted, and its arrays."""
    with terminal.reporting():
        from sfm.stats_store.select import only
        from sfm.stats_store.store import open_store

        store = open_store(url)
        summary = only(store.summaries(), dataset=dataset, backbone=backbone, image_size=image_size)
        document = terminal.entry_document(store.open(summary))
        if as_json:
            terminal.print_json(document)
        else:
            terminal.print_entry(document)
