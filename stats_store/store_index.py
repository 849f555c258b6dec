"""The index of a store: list its commits by key."""

from collections import defaultdict
from dataclasses import dataclass

from obstore.store import ObjectStore

from sfm.stats_store.commits import COMMIT_PATH, KEY_FOLDER_PATH, PUBLISHED_SUFFIX, parse_generation
from sfm.stats_store.folder_walk import explain_unlisted_folder
from sfm.stats_store.location import translate_errors
from sfm.stats_store.objects import list_objects_and_unlisted_folders


@dataclass(frozen=True)
class StoreIndex:
    """The paths of the commits in a store.

    Attributes
    ----------
    commit_paths_by_key : dict of str to list of str
        Paths of all commits by key (backbone hash/fingerprint/options), oldest first.
    unlisted_folder_notes : list of str
        One line per folder on a disk that could not be listed.
    """

    commit_paths_by_key: dict[str, list[str]]
    unlisted_folder_notes: list[str]


def read_store_index(objects: ObjectStore, store_url: str, entry_key: str = "") -> StoreIndex:
    """List the commits of all keys, or of one.

    A newest commit that was published and is missing is included: reading it then fails, where its absence
    would restore the entry that it replaced or removed.

    Parameters
    ----------
    objects : obstore.store.ObjectStore
        Objects of the store.
    store_url : str
        URL of the store, for errors.
    entry_key : str, optional
        The key whose commits to list; default: all.

    Raises
    ------
    InputError
        If the store cannot be reached.
    """
    with translate_errors(store_url):
        prefix = f"index/{entry_key}" if entry_key else "index"
        listed, unreadable = list_objects_and_unlisted_folders(
            objects, prefix, should_enter_folder=KEY_FOLDER_PATH.fullmatch
        )
    commits: dict[str, set[str]] = defaultdict(set)
    published: dict[str, set[str]] = defaultdict(set)
    for item in listed:
        if match := COMMIT_PATH.fullmatch(item["path"]):
            paths = published if match[3] == PUBLISHED_SUFFIX else commits
            paths[match[1]].add(item["path"].removesuffix(match[3]) + ".json")
    for folder, marked_paths in published.items():
        newest = max(map(parse_generation, commits[folder]), default=0)
        commits[folder] |= {path for path in marked_paths if parse_generation(path) > newest}
    return StoreIndex(
        {folder: sorted(paths, key=parse_generation) for folder, paths in commits.items() if paths},
        [explain_unlisted_folder(folder) for folder in unreadable],
    )
