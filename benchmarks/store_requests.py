"""Time and requests of the store's commands on a bucket that answers after 50 ms.

``python benchmarks/store_requests.py [--entries 200] [--latency 0.05] [--before CHECKOUT] [--json FILE]``

A real S3 server (moto) behind a proxy that delays and counts. ``--before`` runs the same commands from
another checkout of this project too, and gives the ratio.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from s3_faults import Proxy, run_fault_proxy  # noqa: E402
from s3_server import create_bucket, environment, open_bucket, run_s3_server  # noqa: E402
from toy_entries import FEATURES, make_backbone_card, publish_random_entry, publish_with_placeholder_cards  # noqa: E402

from sfm.stats_store.publication import Draft  # noqa: E402
from sfm.stats_store.store import open_or_create_store  # noqa: E402


def write_benchmark_store(folder: Path, entries: int, chunks: int) -> None:
    """Write a store of many small entries and one of many chunks."""
    store = open_or_create_store(str(folder))
    for number in range(entries):
        publish_random_entry(store, number, dataset=f"set{number:04d}", fingerprint=f"{number:064x}")
    if chunks:
        draft = Draft(store)
        draft.write_array("test/feature", np.zeros((4096 * chunks, FEATURES), dtype=np.float16))
        backbone = make_backbone_card("lite1")
        publish_with_placeholder_cards(draft, dataset="long", backbone=backbone, test_samples=4096 * chunks)


def upload_store(folder: Path, url: str) -> None:
    """Upload the files of a store to a bucket."""
    bucket = open_bucket(url)
    files = [file for file in folder.rglob("*") if file.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda f: obstore.put(bucket, f.relative_to(folder).as_posix(), f.read_bytes()), files))


def measure_command(checkout: Path, words: list[str], proxy: Proxy, env: dict[str, str]) -> dict[str, Any]:
    """Run ``sfm store`` from a checkout; return seconds, requests and most concurrent ones."""
    proxy.seen.clear()
    proxy.most = 0
    started = time.perf_counter()
    command = [sys.executable, "-m", "sfm", "store", *words]
    done = subprocess.run(
        command, cwd=checkout, env=env | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "requests": len(proxy.seen), "at_a_time": proxy.most}


def main() -> None:
    """Run every command from every checkout, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=200)
    parser.add_argument("--chunks", type=int, default=100, help="of the long entry; 0: none")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--before", type=Path, help="another checkout, measured too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    checkouts = {"now": REPOSITORY} | ({"before": arguments.before.resolve()} if arguments.before else {})
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        run_s3_server() as endpoint,
        run_fault_proxy(endpoint) as proxy,
    ):
        write_benchmark_store(Path(scratch) / "store", arguments.entries, arguments.chunks)
        env = os.environ | environment(proxy.endpoint)
        os.environ.update(env)
        for name, checkout in checkouts.items():
            for bucket in (name, f"{name}-copy"):
                create_bucket(endpoint, f"store-{bucket}")
            url, proxy.latency = f"s3://store-{name}/s", 0.0
            upload_store(Path(scratch) / "store", url)
            proxy.latency = arguments.latency
            commands = {
                "ls": ["ls", url],
                "show": ["show", url, "set0000"],
                "verify": ["verify", url],
                **(
                    {"verify, one long entry": ["verify", url, "--dataset", "long"]}
                    if arguments.chunks
                    else {}
                ),
                "copy": ["copy", url, f"s3://store-{name}-copy/s"],
                "rm, one": ["rm", url, "set0000"],
                "rm --all": ["rm", url, "set0001", "--all"],
                "gc --now": ["gc", url, "--now"],
            }
            for command, words in commands.items():
                rows.setdefault(command, {})[name] = measure_command(
                    checkout, [*words, "--quiet"], proxy, env
                )
    table = Table(title=f"{arguments.entries} entries, {1000 * arguments.latency:.0f} ms a request")
    for column in (
        "command",
        *(f"{n} {w}" for n in checkouts for w in ("s", "requests", "at a time")),
        "ratio",
    ):
        table.add_column(column, justify="left" if column == "command" else "right")
    for command, found in rows.items():
        cells = [f"{f['seconds']:.1f} {f['requests']} {f['at_a_time']}".split() for f in found.values()]
        ratio = found["before"]["seconds"] / found["now"]["seconds"] if "before" in found else None
        table.add_row(command, *(c for cell in cells for c in cell), f"{ratio:.1f}" if ratio else "–")
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"entries": arguments.entries, "latency": arguments.latency, "commands": rows})
        )


if __name__ == "__main__":
    main()
