"""Whatever anybody made of a store, a run, a dataset or a file: one line, exit 0, 1 or 2, within bounds.

Nobody else's file is touched either. `make test` runs the faults found so far and a few fixed cases; `make
torture` runs new ones for SFM_FUZZ_MINUTES (30), from SFM_FUZZ_SEED (random, printed). What it finds is
written to a folder that it prints, one case a file, and runs again with

    python tests/fuzz/campaign.py replay FILE
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from fuzz.campaign import Findings, Fuzzer, fuzz, open_fuzzer
from fuzz.cases import COMMANDS, Cases
from fuzz.mutations import Json
from fuzz.worker import MAX_MEMORY_GROWTH
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

EXPECTED_STATUS = {
    ("run", "distill again"): 2,
    ("stopped", "report"): 2,
    ("config", "distill only"): 2,
    ("config", "extract only"): 2,
}
"""Commands that refuse what is sound: runs that are finished or not, files that name places."""

KNOWN_FAULT_FILES = sorted(Path(__file__).with_name("found").glob("*.json"))
"""Cases that showed a fault once: a file that the fuzzer wrote goes there once the fault is mended."""

N_FIXED_CASES = 20


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with open_fuzzer(tmp_path_factory.mktemp("fuzz") / "w") as made:
        yield made


@pytest.mark.parametrize("file", KNOWN_FAULT_FILES, ids=lambda file: file.stem)
def test_known_fault_does_not_recur(fuzzer: Fuzzer, file: Path) -> None:
    found, outcome = fuzzer(json.loads(file.read_bytes()))
    assert not found, outcome


def test_fixed_fuzz_cases_show_no_problem(fuzzer: Fuzzer) -> None:
    drawn = Cases(fuzzer.seeds)

    @settings(
        max_examples=N_FIXED_CASES,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(rng=st.randoms(use_true_random=True))
    def run_one(rng: Random) -> None:
        case = drawn.draw(rng)
        assert not fuzzer.problems(case), case

    run_one()


@pytest.mark.torture
@pytest.mark.parametrize(("subject", "command"), [(s, c) for s, own in COMMANDS.items() for c in own])
def test_unmutated_case_has_the_expected_exit_code_and_bounded_memory(
    fuzzer: Fuzzer, subject: str, command: str
) -> None:
    """Without a mutation every command does its work, far below the bounds: the cases mean something."""
    found, outcome = fuzzer({"subject": subject, "command": command, "signed": True, "mutations": []})
    assert not found
    assert outcome.status == EXPECTED_STATUS.get((subject, command), 0), outcome.err
    assert outcome.growth < MAX_MEMORY_GROWTH / 2


@pytest.mark.torture
def test_re_signed_mutations_pass_digest_checks(fuzzer: Fuzzer) -> None:
    """What the fuzzer signs passes every digest: what is refused is refused for what it says."""
    same: Json = {"file": "commit/birds-1", "kind": "json", "how": "set", "path": ["run"], "value": "0" * 32}
    elsewhere = {"subject": "store", "command": "verify", "signed": True, "mutations": [same]}
    assert "objects missing" in fuzzer(elsewhere)[1].out or fuzzer(elsewhere)[1].status == 1
    name = same | {"path": ["summary", "dataset"], "value": "sparrows"}
    renamed = elsewhere | {"mutations": [name], "command": "ls"}
    assert "sparrows" in fuzzer(renamed)[1].out


@pytest.mark.torture
def test_random_fuzz_campaign_finds_no_problem(fuzzer: Fuzzer) -> None:
    minutes = float(os.environ.get("SFM_FUZZ_MINUTES", "30"))
    start = int(os.environ.get("SFM_FUZZ_SEED", random.SystemRandom().getrandbits(32)))
    findings = Findings(fuzzer, Path(tempfile.mkdtemp(prefix="sfm-fuzz-found-")))
    print(f"\nfuzzing for {minutes:g} minutes, SFM_FUZZ_SEED={start}; findings go to {findings.folder}")
    ran, until = fuzzer.ran, time.monotonic() + 60 * minutes
    fuzz(fuzzer, until, start, findings)
    print(f"{fuzzer.ran - ran} cases, {len(findings.seen)} kinds of problems")
    assert not findings.seen, f"{len(findings.seen)} kinds of problems, see {findings.folder}"
