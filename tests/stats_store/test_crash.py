"""Writers are killed, disks fill, servers fail: what is visible is whole, and the same command completes."""

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_faults import Fault, Proxy, Request, run_fault_proxy
from store_processes import (
    compute_array_digests,
    compute_toy_digests,
    make_forkserver_context,
    publish_toy,
    run_sfm_command,
    start_process,
)

from sfm.errors import InputError
from sfm.stats_store import location
from sfm.stats_store.garbage_collection import collect_garbage
from sfm.stats_store.objects import list_objects
from sfm.stats_store.store import Store, open_store
from sfm.stats_store.verification import verify_entries

PUBLISHED = compute_toy_digests(1)

EXTRACT = [
    "extract",
    "builtin:fashion-mnist-6k",
    *("--limit-per-class", "10", "--image-size", "32", "--backbone", "lite0", "--sub-classes", "2"),
]


def verify_and_read_digests(url: str) -> list[dict[str, str]]:
    """Check what a crash left behind; return the digests of the entries that are visible."""
    try:
        store = open_store(url)
    except InputError:
        # Killed before the store's first object: there is no store yet, and nothing in the way of one.
        assert not Path(url).is_dir() or not list_objects(location.connect_object_store(url))
        return []
    assert [v.problems for v in verify_entries(store) if v.problems] == []
    return list(compute_array_digests(store).values())


def list_run_ids(store: Store) -> set[str]:
    """Return the ids of all runs of which anything is there."""
    paths = [item["path"].split("/") for item in list_objects(store.objects, "runs")]
    return {parts[1] for parts in paths if len(parts) > 2}


@pytest.mark.parametrize(
    ("where", "kills"),
    [
        ("disk", 4),
        ("s3", 2),
        pytest.param("disk", 50, marks=pytest.mark.torture),
        pytest.param("s3", 50, marks=pytest.mark.torture),
    ],
)
def test_killed_writer_leaves_no_entry_or_a_complete_one(
    tmp_path: Path, request: pytest.FixtureRequest, where: str, kills: int
) -> None:
    base = str(request.getfixturevalue("s3_url")) if where == "s3" else str(tmp_path / "store")
    context, rng = make_forkserver_context(), random.Random(kills)
    start_process(context, publish_toy, f"{base}-first", 1).join()
    begin = time.perf_counter()
    start_process(context, publish_toy, f"{base}-undisturbed", 1).join()
    seconds = time.perf_counter() - begin
    killed, visible = 0, 0
    for number in range(10 * kills):
        url = f"{base}-{number}"
        process = start_process(context, publish_toy, url, 1)
        time.sleep(rng.uniform(0, 1.2 * seconds))
        process.kill()
        process.join()
        killed += process.exitcode == -9
        after = verify_and_read_digests(url)
        assert after in ([], [PUBLISHED])
        visible += bool(after)
        publish_toy(url, 1)
        assert verify_and_read_digests(url) == [PUBLISHED]
        store = open_store(url)
        collect_garbage(store, min_age=location.datetime.timedelta(0))
        assert len(list_run_ids(store)) == 1
        assert verify_and_read_digests(url) == [PUBLISHED]
        if killed == kills:
            break
    assert killed == kills
    print(
        f"\ntorture: {killed} writers killed while publishing to {where}: {visible} had published, "
        f"{number + 1 - visible} had not, none left a torn entry"
    )


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.torture)])
@pytest.mark.slow
def test_killed_extraction_resumes_to_the_digests_of_an_uninterrupted_one(tmp_path: Path, kills: int) -> None:
    context, rng = make_forkserver_context(), random.Random(kills)
    output = str(tmp_path / "output")

    def extraction(store: Path):  # type: ignore[no-untyped-def]
        return start_process(context, run_sfm_command, [*EXTRACT, "--store", str(store)], output)

    extraction(tmp_path / "first").join()
    begin = time.perf_counter()
    undisturbed = extraction(tmp_path / "undisturbed")
    undisturbed.join()
    seconds = time.perf_counter() - begin
    assert undisturbed.exitcode == 0, Path(output).read_text()
    wanted = verify_and_read_digests(str(tmp_path / "undisturbed"))
    assert len(wanted) == 1

    killed, attempts, resumed = 0, 0, 0
    while killed < kills:
        attempts += 1
        store = tmp_path / f"store-{attempts}"
        for _ in range(rng.randint(1, 3)):
            process = extraction(store)
            time.sleep(rng.uniform(0.1, 1.1) * seconds)
            process.kill()
            process.join()
            killed += process.exitcode == -9
            assert verify_and_read_digests(str(store)) in ([], wanted)
        resumed += any(store.glob("staging/*/*/*.npy"))
        last = extraction(store)
        last.join()
        assert last.exitcode == 0, Path(output).read_text()
        assert verify_and_read_digests(str(store)) == wanted
        assert not [p for p in store.glob("staging/*") if p.is_dir()]
        shutil.rmtree(store)
    print(
        f"\ntorture: {killed} extractions killed in {attempts} stores, {resumed} resumed from staged "
        f"features; all ended with the digests of an undisturbed run"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Returns a function that mounts a disk of so many KiB, or makes the mounted one so large."""
    mounted: list[Path] = []

    def disk(size: int) -> Path:
        options = f"size={size}k" + (",remount" if mounted else "")
        target = tmp_path / "disk"
        target.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted[:] = [target]
        return target

    yield disk
    for target in mounted:
        subprocess.run(["umount", "--lazy", str(target)], check=True)


@pytest.mark.parametrize("sizes", [4, pytest.param(40, marks=pytest.mark.torture)])
def test_publishing_to_a_full_disk_leaves_no_entry_and_a_retry_completes(
    small_disk: Callable[[int], Path], sizes: int
) -> None:
    for number in range(sizes):
        disk = small_disk(4 + round(number * 100 / sizes))
        url = str(disk / "store")
        with pytest.raises(InputError, match=r"no space left on the disk of .* run the same command again"):
            publish_toy(url, 1)
        assert verify_and_read_digests(url) == []
        small_disk(4096)
        publish_toy(url, 1)
        assert verify_and_read_digests(url) == [PUBLISHED]
        shutil.rmtree(url)
    print(f"\ntorture: {sizes} disks filled up while publishing: no torn entry, all completed with more room")


@pytest.mark.parametrize("sizes", [1, pytest.param(8, marks=pytest.mark.torture)])
def test_extraction_on_a_full_disk_exits_2_and_completes_after_space_is_freed(
    tmp_path: Path, small_disk: Callable[[int], Path], sizes: int
) -> None:
    context, output = make_forkserver_context(), tmp_path / "output"

    def extraction(store: Path) -> int | None:
        process = start_process(context, run_sfm_command, [*EXTRACT, "--store", str(store)], str(output))
        process.join()
        return process.exitcode

    assert extraction(tmp_path / "undisturbed") == 0
    wanted = verify_and_read_digests(str(tmp_path / "undisturbed"))
    needed = sum(f.stat().st_size for f in (tmp_path / "undisturbed").rglob("*") if f.is_file()) // 1024
    for number in range(sizes):
        disk = small_disk(64 + number * needed // sizes)
        assert extraction(disk / "store") == 2
        lines = output.read_text().splitlines()
        assert lines[-1].startswith("error: no space left on the disk")
        assert verify_and_read_digests(str(disk / "store")) == []
        small_disk(64 * 1024)
        assert extraction(disk / "store") == 0
        assert verify_and_read_digests(str(disk / "store")) == wanted
        shutil.rmtree(disk / "store")
    print(f"\ntorture: {sizes} extractions on a disk that filled up, completed with more room")


@pytest.fixture
def proxy(s3_endpoint: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that everything goes through; breaks nothing until told to."""
    with run_fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


FAULTS: list[Fault] = ["500", "503", "drop", "truncate", "short", "lose answer", "500 after"]


def make_random_fault_chooser(seed: int, share: float) -> Callable[[Request], Fault | None]:
    """Return a choice of faults that befall a share of all requests."""
    rng = random.Random(seed)

    def choose(request: Request) -> Fault | None:
        fault = rng.choice(FAULTS) if rng.random() < share else None
        # A short answer that claims to be whole can only be told where there is a digest to compare it with.
        return None if fault == "short" and request.method != "GET" else fault

    return choose


@pytest.mark.parametrize("rounds", [1, pytest.param(15, marks=pytest.mark.torture)])
def test_failed_s3_requests_are_retried(proxy: Proxy, s3_url: str, rounds: int) -> None:
    for number in range(rounds):
        proxy.choose = make_random_fault_chooser(number, 0.2)
        url = f"{s3_url}-{number}"
        publish_toy(url, 1)
        assert verify_and_read_digests(url) == [PUBLISHED]
        proxy.choose = lambda _: None
        assert verify_and_read_digests(url) == [PUBLISHED]
    print(
        f"\ntorture: {len(proxy.broken)} of {len(proxy.seen)} S3 requests failed, broke off or lost their "
        f"answer; {rounds} entries published and read, none torn"
    )


def test_conditional_write_with_a_truncated_response_is_retried(proxy: Proxy, s3_url: str) -> None:
    first = True

    def choose(request: Request) -> Fault | None:
        nonlocal first
        # The second creation of this object is refused: it is there already. Half of that answer arrives.
        again = request.creates and any(r.path == request.path and r.creates for r in proxy.seen[:-1])
        fault: Fault | None = "truncate" if again and first else None
        first = first and fault is None
        return fault

    proxy.choose = choose
    publish_toy(s3_url, 1)
    assert not first
    assert verify_and_read_digests(s3_url) == [PUBLISHED]


@pytest.mark.torture
def test_extraction_to_an_unreliable_server_gives_the_same_digests(
    proxy: Proxy, s3_url: str, tmp_path: Path
) -> None:
    def extraction(url: str) -> int | None:
        arguments = [*EXTRACT, "--store", url, "--staging", str(tmp_path / "staging")]
        process = start_process(
            make_forkserver_context(), run_sfm_command, arguments, str(tmp_path / "output")
        )
        process.join()
        return process.exitcode

    assert extraction(str(tmp_path / "undisturbed")) == 0
    wanted = verify_and_read_digests(str(tmp_path / "undisturbed"))
    for number in range(5):
        proxy.choose = make_random_fault_chooser(number, 0.2)
        assert extraction(f"{s3_url}-{number}") == 0, (tmp_path / "output").read_text()
        proxy.choose = lambda _: None
        assert verify_and_read_digests(f"{s3_url}-{number}") == wanted
    print(
        f"\ntorture: 5 extractions to S3 while {len(proxy.broken)} of {len(proxy.seen)} requests "
        f"failed: the digests of an undisturbed run"
    )


@pytest.mark.parametrize("rounds", [1, pytest.param(30, marks=pytest.mark.torture)])
def test_unavailable_server_gives_a_one_line_error_and_a_later_retry_completes(
    proxy: Proxy, s3_url: str, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(location.LONG_RETRY, "max_retries", 1)
    monkeypatch.setitem(location.SHORT_RETRY, "max_retries", 1)
    rng = random.Random(rounds)
    for number in range(rounds):
        url = f"{s3_url}-{number}"
        good = len(proxy.seen) + rng.randrange(40)
        proxy.choose = lambda r, good=good: "503" if r.number >= good else None  # type: ignore[misc]
        with pytest.raises(InputError, match="its endpoint stays busy") as failure:
            publish_toy(url, 1)
        assert "\n" not in str(failure.value)
        proxy.choose = lambda _: None
        publish_toy(url, 1)
        assert verify_and_read_digests(url) == [PUBLISHED]
    print(f"\ntorture: {rounds} servers that went away halfway: no torn entry, all completed later")
