"""One process at a time where two would only waste hours: a courtesy on one host. What is committed needs no lock.

    with claimed(run_dir / "lock.json", "the training run out/run"): ...

The system frees a claim with its holder, however that one ends, so a stale lock does not exist.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import Refused

WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system answers that cannot lock: then nobody is refused."""


@contextlib.contextmanager
def claimed(path: Path, what: str, *, waiting: bool = False) -> Iterator[None]:
    """`what` is ours while it is entered; refused, with who holds it, when it is another's; or waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Refused(
                wrong=f"{what} is being worked on", found=_holder(file.read()), mend="wait for it, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        file.truncate()
        me = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.write(json.dumps(me).encode())
        yield


def _holder(told: bytes) -> str:
    try:
        holder = json.loads(told)
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process that has just begun"
