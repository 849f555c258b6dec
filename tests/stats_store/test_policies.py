"""The rights that docs/store.md asks for on S3 are enough for each role, and no more than it says."""

import datetime
import json
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from s3_server import REGION, create_bucket, environment, run_s3_server
from toy_entries import publish_random_entry, publish_with_placeholder_cards, write_random_arrays

from sfm.errors import InputError
from sfm.stats_store.cards import Summary
from sfm.stats_store.entry_copy import copy_entries
from sfm.stats_store.entry_history import remove_entry
from sfm.stats_store.garbage_collection import collect_garbage
from sfm.stats_store.publication import Draft
from sfm.stats_store.store import open_or_create_store, open_store
from sfm.stats_store.verification import verify_entries

DOCS = Path(__file__).parents[2] / "docs" / "store.md"
POLICIES = dict(re.findall(r"<!-- policy: (\w+) -->\n\n```json\n(.*?)```", DOCS.read_text(), flags=re.DOTALL))
URL = "s3://company-bucket/team/stats"


@pytest.fixture(scope="module")
def policy_server() -> Iterator[tuple[dict[str, dict[str, str]], Summary]]:
    """A server that enforces policies, with a store: what each role has in its environment, and an entry."""
    with run_s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        owner = environment(endpoint)
        for name, value in owner.items():
            patch.setenv(name, value)
        create_bucket(endpoint, "company-bucket")
        summary = publish_random_entry(open_or_create_store(URL))
        iam = boto3.client("iam", endpoint_url=endpoint, region_name=REGION)
        roles = {}
        for role, policy in POLICIES.items():
            document = json.loads(policy.replace("BUCKET", "company-bucket").replace("PREFIX", "team/stats"))
            if "s3:DeleteObject" in policy:
                # moto asks for this right on the bucket when many objects go at once; Amazon on each object.
                document["Statement"].append(
                    {
                        "Effect": "Allow",
                        "Action": ["s3:DeleteObject"],
                        "Resource": ["arn:aws:s3:::company-bucket"],
                    }
                )
            iam.create_user(UserName=role)
            iam.put_user_policy(UserName=role, PolicyName=role, PolicyDocument=json.dumps(document))
            key = iam.create_access_key(UserName=role)["AccessKey"]
            roles[role] = owner | {
                "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
                "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            }
        enforce = urllib.request.Request(
            f"{endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(enforce, timeout=10).close()
        yield roles, summary


@pytest.fixture
def assume_role(policy_server, monkeypatch) -> Callable[[str], Summary]:
    """Take on a role; returns the entry that is in the store from the beginning."""
    roles, summary = policy_server

    def take(role: str) -> Summary:
        for name, value in roles[role].items():
            monkeypatch.setenv(name, value)
        return summary

    return take


def test_docs_define_three_s3_policies():
    assert sorted(POLICIES) == ["keeper", "reader", "writer"]


def test_reader_policy_allows_reading_verifying_and_copying(assume_role, tmp_path):
    summary = assume_role("reader")
    store = open_store(URL)
    assert store.open_entry(summary).read_array("train/count").sum() > 0
    assert all(v.is_sound for v in verify_entries(store))
    (done,) = copy_entries(store, open_or_create_store(str(tmp_path)), [summary])
    assert done.outcome == "copied"


def test_reader_policy_denies_publishing_and_removing(assume_role):
    summary = assume_role("reader")
    with pytest.raises(InputError, match="permission denied by the server"):
        open_or_create_store(URL)
    with pytest.raises(InputError, match="permission denied by the server"):
        remove_entry(open_store(URL), summary)
    assert summary in open_store(URL).list_summaries()


def test_writer_policy_allows_publishing_and_removing_but_not_gc(assume_role):
    summary = assume_role("writer")
    store = open_or_create_store(URL)
    mine = publish_random_entry(store, 1, fingerprint="a" * 64)
    assert mine in store.list_summaries()
    draft = Draft(store)
    write_random_arrays(draft)
    assert publish_with_placeholder_cards(draft).outcome == "already there"
    remove_entry(store, mine)
    assert mine not in store.list_summaries()
    with pytest.raises(InputError, match="cannot use s3"):
        collect_garbage(store, min_age=datetime.timedelta(0), delete_replaced_now=True)
    assert summary in store.list_summaries()


def test_keeper_policy_allows_gc_but_not_publishing(assume_role):
    assume_role("writer")
    write_random_arrays(Draft(open_or_create_store(URL)))
    summary = assume_role("keeper")
    store = open_store(URL)
    assert len(collect_garbage(store, min_age=datetime.timedelta(0), delete_replaced_now=True).deleted) >= 1
    assert collect_garbage(store, min_age=datetime.timedelta(0), delete_replaced_now=True).deleted == []
    assert store.open_entry(summary).read_array("train/count").sum() > 0
    with pytest.raises(InputError, match="permission denied by the server"):
        open_or_create_store(URL)
