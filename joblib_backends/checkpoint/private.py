"""The files of a checkpoint, and who may have written them.

Entries are pickles that the driver will load, so who can write the file can run code as its user. It is made private,
and it is refused if anybody else could have written it, or any of the files that SQLite keeps beside it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from typing import Final

from ..errors import CheckpointError

try:
    import grp
    import pwd
except ImportError:  # Windows has neither owners nor modes that mean anything here; nothing is refused for them
    grp = pwd = None  # type: ignore[assignment]

__all__ = [
    "Identity",
    "check_files",
    "check_folder",
    "claim_siblings",
    "create_private",
    "identity",
    "move_aside",
    "release_journal",
]

_SIBLINGS: Final = ("-wal", "-shm", "-journal")

#: What tells a file from any other, whatever its name: its device and its number there.
Identity = tuple[int, int]


def identity(path: str) -> Identity | None:
    """Return what tells the file at ``path`` from any other, or None if there is none."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def create_private(path: str) -> None:
    """Make an empty file that only this user can use, unless there is one; SQLite fills it."""
    # O_EXCL follows no link, not even one that leads nowhere.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def move_aside(path: str) -> str:
    """Rename the file and what belongs to it, and return the new name, which nothing had."""
    for n in itertools.count(1):
        aside = f"{path}.damaged" if n == 1 else f"{path}.damaged-{n}"
        if not any(os.path.lexists(aside + suffix) for suffix in ("", *_SIBLINGS)):
            break
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}-shm")  # SQLite makes it anew from the -wal file
    for suffix in ("-wal", "-journal", ""):
        with contextlib.suppress(FileNotFoundError):
            os.rename(path + suffix, aside + suffix)
    return aside


def check_folder(path: str) -> bool:
    """Refuse a folder in which others can replace the file; return whether they can add files to it."""
    folder = os.path.dirname(path)
    try:
        info = os.stat(folder)
    except FileNotFoundError:
        raise CheckpointError(
            f"The checkpoint {path} cannot be opened, because there is no folder {folder}. "
            "Make it, or give another path."
        ) from None
    if pwd is None:
        return False
    if info.st_uid not in (0, os.geteuid()):
        raise _unsafe(path, f"its folder belongs to user {info.st_uid}", "Give a path in a folder of your own.")
    others = info.st_mode & (stat.S_IWOTH if _is_private_group(info.st_gid) else stat.S_IWGRP | stat.S_IWOTH)
    if others and not info.st_mode & stat.S_ISVTX:
        raise _unsafe(path, "others can write to its folder", f"chmod go-w {folder}, or give another path.")
    return bool(others)


def _is_private_group(group: int) -> bool:
    """Return whether the group is this user's own: Ubuntu and Fedora give each user one, which may write."""
    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}


def check_files(path: str) -> None:
    """Refuse the file, and each that SQLite has beside it, if somebody else can have written it."""
    for name in (path, *(path + suffix for suffix in _SIBLINGS)):
        with contextlib.suppress(FileNotFoundError):
            _check_file(path, name, os.lstat(name))


def _check_file(path: str, name: str, info: os.stat_result) -> None:
    if stat.S_ISLNK(info.st_mode):
        raise _unsafe(path, f"{name} is a symbolic link", "Give the path of the file itself.")
    if not stat.S_ISREG(info.st_mode):
        raise _unsafe(path, f"{name} is not a regular file", "Give another path.")
    if pwd is None:
        return
    if info.st_uid != os.geteuid():
        raise _unsafe(path, f"{name} belongs to user {info.st_uid}, who can change it", "Give another path.")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unsafe(path, f"{name} can be written by others", f"If nobody did, chmod go-w {name}.")


def _unsafe(path: str, reason: str, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {path} is refused, because {reason}, and who writes a checkpoint can run code when it is "
        f"loaded. {remedy}"
    )


def claim_siblings(path: str, header: bytes) -> None:
    """Let nobody place a file beside the checkpoint while SQLite opens it, which would take what that holds for ours.

    An empty -wal file is right for a file in WAL mode only, which two bytes at 18 of its header say.
    """
    for suffix in _SIBLINGS if header[18:20] == b"\2\2" else ("-journal",):
        create_private(path + suffix)
    check_files(path)


def release_journal(path: str) -> None:
    # In WAL mode, whose file is there now, no driver uses it any more.
    if os.path.exists(f"{path}-wal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}-journal")
