"""Run cases for a while, and keep one small case of every fault that shows.

``python tests/fuzz/campaign.py replay CASE.json ...`` runs kept cases again and prints all about them.
"""

import contextlib
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.cases import Cases, Problem, run_case
from fuzz.mutations import InapplicableMutation, Json
from fuzz.seeds import Seeds, make_seeds
from fuzz.worker import Outcome, Worker, open_worker
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st


@dataclass
class Fuzzer:
    """Runs cases, each in an empty folder.

    Attributes
    ----------
    ran : int
        Cases so far.
    """

    seeds: Seeds
    worker: Worker
    scratch: Path
    ran: int = field(default=0, init=False)

    def __call__(self, case: Json) -> tuple[list[Problem], Outcome]:
        """Run a case; return what must not be, and how its command ended."""
        self.ran += 1
        self.scratch.mkdir()
        try:
            return run_case(case, self.seeds, self.worker, self.scratch)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def shrink(self, case: Json, kind: str) -> Json:
        """Return the case with the fewest mutations that still shows a problem of this kind."""
        smaller = [
            case | {"mutations": [m for m in case["mutations"] if m is not left]}
            for left in case["mutations"]
        ]
        if case["signed"]:
            smaller.append(case | {"signed": False})
        for candidate in smaller:
            if candidate["mutations"] and any(problem.kind == kind for problem in self.problems(candidate)):
                return self.shrink(candidate, kind)
        return case

    def problems(self, case: Json) -> list[Problem]:
        """Return what must not be about a case; nothing if it means nothing."""
        try:
            return self(case)[0]
        except InapplicableMutation:
            return []


@contextmanager
def open_fuzzer(folder: Path) -> Iterator[Fuzzer]:
    """Make the seeds in a folder, and yield what runs cases there."""
    (folder / "home").mkdir(parents=True)
    (folder / "seeds").mkdir()
    with open_worker(folder / "home") as worker:
        yield Fuzzer(make_seeds(folder / "seeds", worker), worker, folder / "case")


def fuzz(fuzzer: Fuzzer, until: float, start: int, tell: Callable[[Json, Problem], None]) -> None:
    """Draw and run cases until a time of the monotonic clock."""
    drawn = Cases(fuzzer.seeds)

    @seed(start)
    @settings(
        max_examples=10**6,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(rng=st.randoms(use_true_random=True))
    def run_one(rng: Random) -> None:
        if time.monotonic() > until:
            raise TimeUp
        case = drawn.draw(rng)
        for problem in fuzzer.problems(case):
            tell(case, problem)

    with contextlib.suppress(TimeUp):
        run_one()


class TimeUp(BaseException):
    """Time is up: nothing that hypothesis would look into."""


@dataclass
class Findings:
    """What a campaign found: one case per command and kind of problem, in a folder.

    Attributes
    ----------
    seen : dict of (str, str) to int
        How often a problem of a kind was met, by command.
    """

    fuzzer: Fuzzer
    folder: Path
    seen: dict[tuple[str, str], int] = field(default_factory=dict, init=False)

    def __call__(self, case: Json, problem: Problem) -> None:
        """Count a problem; the first of its kind is made small, written and printed."""
        group = (f"{case['subject']}: {case['command']}", problem.kind)
        self.seen[group] = self.seen.get(group, 0) + 1
        if self.seen[group] > 1:
            return
        small = self.fuzzer.shrink(case, problem.kind)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{len(self.seen):03d}.json"
        about = {"problem": problem.kind, "detail": problem.detail}
        file.write_text(json.dumps(small | about, indent=1))
        print(f"{file}: {group[0]}: {problem.kind}: {problem.detail}"[:400], flush=True)


def replay_cases(files: list[str]) -> None:
    """Run kept cases again and print everything about them."""
    folder = Path(tempfile.mkdtemp(prefix="sfm-fuzz-"))
    try:
        with open_fuzzer(folder / "w") as fuzzer:
            for file in files:
                case = json.loads(Path(file).read_bytes())
                print(f"== {file}: {json.dumps(case)[:2000]}")
                try:
                    found, outcome = fuzzer(case)
                except InapplicableMutation as error:
                    print(f"stale: {error}")
                    continue
                print(f"status {outcome.status}, {outcome.seconds:.1f} s, {outcome.growth >> 20} MiB")
                print(ascii(outcome.out[-2000:]))
                print(outcome.err[-6000:].encode("ascii", "backslashreplace").decode())
                print("\n".join(f"PROBLEM {p.kind}: {p.detail}" for p in found) or "no problem", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_campaign(folder: Path, minutes: float, start: int) -> None:
    """Fuzz for some minutes; findings go to a folder."""
    scratch = Path(tempfile.mkdtemp(prefix="sfm-fuzz-"))
    try:
        with open_fuzzer(scratch / "w") as fuzzer:
            findings = Findings(fuzzer, folder)
            fuzz(fuzzer, time.monotonic() + 60 * minutes, start, findings)
            print(f"{fuzzer.ran} cases, {len(findings.seen)} groups")
            for group, count in sorted(findings.seen.items(), key=lambda item: item[0][1]):
                print(f"{count:5d}  {group[1]}  [{group[0]}]")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))  # Mutations are no sounder than the rest.
    if sys.argv[1] == "replay":
        replay_cases(sys.argv[2:])
    else:
        run_campaign(Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
