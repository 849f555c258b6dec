"""Locks on output files and folders, which the operating system releases when their holder ends.

A lock is ``flock`` on a separate file, so a killed process leaves nothing that blocks the next one. It
holds between processes of one machine, and between machines on a shared disk whose file system passes locks
on (NFS version 4, Lustre mounted with ``flock``, CephFS, SMB). A file system without locks locks nothing.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sfm.deletion import delete_without_following_links
from sfm.errors import InputError
from sfm.text import sanitize_line
from sfm.untrusted_files import parse_json, read_bounded_file

LOCK_NAME = ".lock"
"""Name of the lock file in a folder; hidden, so that it is not taken for content."""

MAX_WAIT_SECONDS = 2.0
"""Time to wait for a lock, which a process that is being killed may still hold."""

MAX_HOLDER_BYTES = 2**12
"""Longest lock file that is read for the description of its holder."""

UNSUPPORTED_ERRNOS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""Errors of a file system without locks."""


@contextmanager
def lock_output_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from writing a folder. It is created if missing, and deleted if it stays empty.

    Nothing is locked if no lock file can be written or the file system has no locks: writing the output
    itself reports the error.

    Raises
    ------
    InputError
        If another process holds the lock; names the process, its machine, and since when.
    """
    with _remove_new_empty_folder_and_parents(folder), _hold_lock(folder / LOCK_NAME, folder):
        yield


@contextmanager
def lock_output_path(path: Path) -> Iterator[None]:
    """Keep other processes from writing a file, or a folder atomically; see :func:`lock_output_folder`."""
    with (
        _remove_new_empty_folder_and_parents(path.parent),
        _hold_lock(path.with_name(f".{path.name}{LOCK_NAME}"), path),
    ):
        yield


@contextmanager
def _remove_new_empty_folder_and_parents(folder: Path) -> Iterator[None]:
    """Delete a folder and its parents at the end if they were missing at the start and are empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def acquire_file_lock(lock_path: Path) -> IO[str] | None:
    """Acquire the lock of a lock file, which is created if missing.

    Returns
    -------
    file or None
        Holds the lock until it is closed; None if another process has the lock.
    """
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while True:
        # The holder may delete the file, and the folder with it.
        with suppress(FileNotFoundError):
            lock_path.parent.mkdir(parents=True, exist_ok=True)
            lock = open_lock_file(lock_path)
            if try_lock_if_still_at_path(lock, lock_path):
                return lock
            lock.close()
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


def open_lock_file(lock_path: Path) -> IO[str]:
    """Open a lock file, created if missing; one of another user can be locked, though not written.

    Raises
    ------
    InputError
        If it is a link: the description of the holder would overwrite its target.
    """
    try:
        return os.fdopen(
            _open_regular_file_refusing_links(lock_path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+"
        )
    except PermissionError:
        if not lock_path.exists():
            raise
        return os.fdopen(_open_regular_file_refusing_links(lock_path, os.O_RDONLY), "r")


def _open_regular_file_refusing_links(path: Path, open_flags: int) -> int:
    """Return the descriptor of a regular file that has no other name; do not wait for a pipe."""
    try:
        descriptor = os.open(path, open_flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{path} is a symbolic link, and cannot be a lock: delete it") from None
    state = os.fstat(descriptor)
    if stat.S_ISREG(state.st_mode) and state.st_nlink < 2:
        return descriptor
    os.close(descriptor)
    raise InputError(f"{path} has other hard links or is not a file, and cannot be a lock: delete it")


def try_lock_if_still_at_path(lock_file_handle: IO[str], lock_path: Path) -> bool:
    """Lock an open lock file without waiting; return whether this process holds the lock."""
    try:
        fcntl.flock(lock_file_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRNOS:
            raise
    # A lock on a file that its holder has deleted excludes no one: check that the path is the same file.
    return lock_path.exists() and os.path.samestat(os.fstat(lock_file_handle.fileno()), lock_path.stat())


@contextmanager
def _hold_lock(lock_path: Path, output_path: Path) -> Iterator[None]:
    """Hold the lock of an output and write the holder to the lock file, which is deleted at the end."""
    try:
        lock = acquire_file_lock(lock_path)
    except OSError:
        yield
        return
    if lock is None:
        raise InputError(
            f"{output_path} is being written by {_describe_lock_holder(lock_path)}: "
            f"wait for it, or write to another place"
        )
    try:
        with suppress(OSError):
            holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            lock.truncate(0)
            lock.write(json.dumps(holder))
            lock.flush()
        yield
    finally:
        with suppress(OSError):
            delete_without_following_links(lock_path.parent, lock_path.name)
        with suppress(OSError):
            lock.close()


def _describe_lock_holder(lock_path: Path) -> str:
    """Return the description of a lock's holder from its file."""
    try:
        holder = parse_json(read_bounded_file(lock_path, MAX_HOLDER_BYTES))
        return sanitize_line(f"process {holder['process']} on {holder['host']} since {holder['since']}", 200)
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
