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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from common.errors import Refused

WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system answers that cannot lock: then nobody is refused."""
LOOK_EVERY_S = 0.5


@contextlib.contextmanager
def claimed(path: Path, what: str, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """`what` is ours while it is entered; refused, with who holds it, when it is another's. With `waiting` it is waited
    for instead: that is called with the holder every LOOK_EVERY_S, and may raise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as file:
        while not _locked(file):
            file.seek(0)
            holder = _holder(file.read())
            if waiting is None:
                raise Refused(wrong=f"{what} is being worked on", found=holder, mend="wait for it, or stop it")
            waiting(holder)
            time.sleep(LOOK_EVERY_S)
        file.seek(0)
        file.truncate()
        me = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.write(json.dumps(me).encode())
        yield


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    return True


def _holder(told: bytes) -> str:
    try:
        holder = json.loads(told)
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process that has just begun"
