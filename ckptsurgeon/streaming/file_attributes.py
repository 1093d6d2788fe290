"""A file's attributes: permissions, owner, access control list, and the user's extended attributes.

A file that replaces another gets them. Nobody can read the new file who could not read the old one; attributes that can't be kept are
reported.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from ckptsurgeon.storage import platform

_ACL = "system.posix_acl_access"
_OTHER_ACLS = ("system.nfs4_acl", "system.richacl")
_NONE_HERE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODATA)


def hand_over(fd: int, path: str, old: str) -> tuple[str, ...]:
    """Give the open file at `path` the attributes of the file at `old`, which it will replace. Returns those that could not be kept.

    Raises:
        OSError: its permissions can't be set; FileNotFoundError where there is no old file.
    """
    before = os.stat(old)
    attributes, lost = _attributes(old)
    if _ACL not in attributes and hasattr(os, "removexattr"):
        with suppress(OSError):  # one that it got from its folder, which the old file does not have
            os.removexattr(fd, _ACL)
    mode, lost_owner = _owner(fd, before)
    if _ACL in attributes and (mode != stat.S_IMODE(before.st_mode) or not _set(fd, _ACL, attributes[_ACL])):
        mode &= ~(stat.S_IRWXG | stat.S_ISGID)  # of a list these bits are the most that anybody on it may do, and not the group's
        lost.append("its access control list")
        del attributes[_ACL]
    platform.set_mode(fd, path, mode)
    for name, value in attributes.items():
        if not _set(fd, name, value):
            lost.append(f"its extended attribute {name}" if name not in (_ACL, *_OTHER_ACLS) else "its access control list")
    return (*lost_owner, *lost)


def _owner(fd: int, before: os.stat_result) -> tuple[int, list[str]]:
    """Set the owner and group where permitted; returns the mode that the file may have then, and what could not be kept."""
    mode, new = stat.S_IMODE(before.st_mode), os.fstat(fd)
    lost = []
    if before.st_uid != new.st_uid:
        try:
            platform.set_owner(fd, before.st_uid, -1)
        except OSError:
            lost.append("its owner")
    if before.st_gid != new.st_gid:
        try:
            platform.set_owner(fd, -1, before.st_gid)
        except OSError:
            lost.append("its group, whose permissions were taken away")
            mode &= ~(stat.S_IRWXG | stat.S_ISGID)  # it was another group's to read
    return mode, lost


def _attributes(path: str) -> tuple[dict[str, bytes], list[str]]:
    """A file's access control lists and the user's attributes; and what can't be read of them."""
    if not hasattr(os, "listxattr"):
        return {}, []  # macOS and Windows: Python has no way to them
    values, lost = {}, []
    try:
        names = [name for name in os.listxattr(path) if name.startswith("user.") or name in (_ACL, *_OTHER_ACLS)]
    except OSError as error:
        return {}, [] if error.errno in _NONE_HERE else ["its extended attributes"]
    for name in names:
        try:
            values[name] = os.getxattr(path, name)
        except OSError:
            lost.append(f"its extended attribute {name}")
    return values, lost


def _set(fd: int, name: str, value: bytes) -> bool:
    try:
        os.setxattr(fd, name, value)
    except OSError:
        with suppress(OSError):
            return os.getxattr(fd, name) == value
        return False
    return True
