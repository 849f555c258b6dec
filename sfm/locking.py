"""One writer at a time for an output: locks that the operating system releases when their holder ends.

A lock is ``flock`` on a file of its own, so a killed process leaves nothing that blocks the next one. It
holds between processes of one machine, and between machines on a shared disk whose file system passes locks
on (NFS version 4, Lustre mounted with ``flock``, CephFS, SMB). Where there are no locks, nothing is locked.
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

from sfm.deletion import delete_below
from sfm.errors import InputError
from sfm.text import sanitize_line
from sfm.untrusted_files import parse_json, read_bounded_file

LOCK = ".lock"
"""Name of the lock in a folder; hidden, so that nobody takes it for a part of what the folder holds."""

LOCK_SECONDS = 2.0
"""How long a lock may stay held by a process that is being killed."""

HOLDER_BYTES = 2**12
"""Longest description of a holder that is read."""

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""What a file system without locks answers."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from writing a folder, which is made if need be; left empty, it goes again.

    Where no lock can be made, because the place cannot be written or has no locks, nothing is locked: what
    cannot be written is reported by who writes it.

    Raises
    ------
    InputError
        If another process holds it; names the process, its machine, and since when.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _held(folder / LOCK, folder):
            yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Keep other processes from writing a file, or a folder that appears whole; see :func:`lock_folder`."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        with _held(path.with_name(f".{path.name}{LOCK}"), path):
            yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def acquire_lock(file: Path) -> IO[str] | None:
    """Take a file's lock; the file is made if need be.

    Returns
    -------
    file or None
        Holds the lock until it is closed; None if another process has the lock.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        # The one that holds the lock may take its file away, and the folder with it.
        with suppress(FileNotFoundError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = open_lock(file)
            if take_lock(lock, file):
                return lock
            lock.close()
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


def open_lock(file: Path) -> IO[str]:
    """Open a lock's file, made if need be; one that another user made can be locked, though not written.

    Raises
    ------
    InputError
        If it is a link: the name of a holder would be written over what is behind it.
    """
    try:
        return os.fdopen(_open_itself(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+")
    except PermissionError:
        if not file.exists():
            raise
        return os.fdopen(_open_itself(file, os.O_RDONLY), "r")


def _open_itself(file: Path, flags: int) -> int:
    """Open a file, but nothing that has another name too, and wait for no pipe."""
    try:
        descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{file} is a symbolic link, which cannot be a lock: delete it") from None
    state = os.fstat(descriptor)
    if stat.S_ISREG(state.st_mode) and state.st_nlink < 2:
        return descriptor
    os.close(descriptor)
    raise InputError(f"{file} is not a file of its own, which cannot be a lock: delete it")


def take_lock(lock: IO[str], file: Path) -> bool:
    """Take the lock of an open file, unless another has it; say whether it is held."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    # A file that its holder has deleted meanwhile locks out nobody.
    return file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat())


@contextmanager
def _held(file: Path, what: Path) -> Iterator[None]:
    """Hold a lock that names its holder; its file goes with it."""
    try:
        lock = acquire_lock(file)
    except OSError:
        yield
        return
    if lock is None:
        raise InputError(
            f"{what} is being written by {_holder(file)}: wait for it, or write to another place"
        )
    try:
        with suppress(OSError):
            about = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            lock.truncate(0)
            lock.write(json.dumps(about))
            lock.flush()
        yield
    finally:
        with suppress(OSError):
            delete_below(file.parent, file.name)
        with suppress(OSError):
            lock.close()


def _holder(file: Path) -> str:
    """Return who holds a lock, as its file tells."""
    try:
        about = parse_json(read_bounded_file(file, HOLDER_BYTES))
        return sanitize_line(f"process {about['process']} on {about['host']} since {about['since']}", 200)
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
