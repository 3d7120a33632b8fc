"""A ring of slots in shared memory, filled by processes. A PartReader (train/feed/reading.py); no torch.

    ring = Ring(shards.path, 2, Options(text_rows=77, on_corrupt="stop"), say, deadline_s=300)
    slot = ring.slot(plan)                        lies in the shared memory
    ring.submit(Part(batch=17, slot=slot, samples=samples))     to all workers, who share it
    filled = ring.wait(part)

    samples, named in the slot -> a line to each worker that says which slot -> each reads into it what no other reads
    already (train/feed/pieces.py) -> a line of answer each

Together at one micro-batch they need as few slots as a single reader, and what is soon written again stays in the
caches: with a slot for each worker, two of them were no faster than one.

The memory is a file without a name: whoever dies, nothing stays in /dev/shm. A worker that dies closes its channel:
that is heard when its answer is due, it is replaced, and the new one reads what the dead one had taken. A worker whose
parent died hears the same and ends.
"""

import contextlib
import dataclasses
import functools
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import common.errors
from common.errors import BadUsage, Fault, Partial
from common.record import Array
from train.feed.filling import Options
from train.feed.pieces import Filled, Piece, finished
from train.feed.reading import NOT_BEGUN, Part, late
from train.feed.ring_worker import PROGRESS_BYTES, progress_of
from train.feed.slots import Slot, SlotPlan

MAX_DEATHS = 3
"""Of one worker and those that took its place, at one and the same part."""
MOST_GIVEN = 64
"""Parts that one worker has not answered: their lines fit its channel, so that neither waits for the other to read."""
END_S = 10.0
"""After a kill: a process in a disk that does not answer cannot be waited for."""
MAX_WORKERS = PROGRESS_BYTES // 8
ANSWER_BYTES = 1 << 12
_ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # glibc gives what a decoder frees back to the kernel, and zeroed pages cost five times the decoding.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}

Say = Callable[..., None]


@dataclass(slots=True, kw_only=True, eq=False)
class Hand:
    """A worker as its parent sees it."""

    number: int
    process: subprocess.Popen[bytes]
    channel: socket.socket
    progress: Array  # [1] int64
    rest: bytes = b""
    """Of an answer whose line has not come to its end."""
    parts: deque[Part] = field(default_factory=deque)
    """Given to it and not answered yet; it is at the first one."""

    def __str__(self) -> str:
        return f"worker {self.number} (pid {self.process.pid})"

    def end(self) -> int | None:
        self.channel.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=END_S)
        return None


class Ring:
    """The workers and the memory that they fill."""

    def __init__(self, set_path: Path, num_workers: int, options: Options, say: Say, *, deadline_s: float) -> None:
        if not hasattr(os, "memfd_create") or num_workers > MAX_WORKERS:
            raise BadUsage(
                wrong=f"read_workers: {num_workers} is not possible here",
                found=f"{sys.platform}, at most {MAX_WORKERS} and only on Linux",
                mend="set read_workers: 0 to read in process",
            )
        self._set_path, self._options, self._say = set_path, options, say
        self._memory_fd = os.memfd_create("wan-lite ring")
        self._num_bytes = 0
        self._num_workers, self._deadline_s = num_workers, deadline_s
        self._tasks: dict[int, bytes] = {}
        self._grow(PROGRESS_BYTES)
        # The kernel's own: Python's would ask twice, whether there is something and then what.
        self._timeout = struct.pack("ll", *divmod(max(1, int(deadline_s * 1e6)), 1_000_000))
        self._hands = {number: self._start(number) for number in range(num_workers)}

    def slot(self, plan: SlotPlan) -> Slot:
        offset = self._grow(plan.num_bytes)
        task = {"offset": offset, "size": plan.size, "num_samples": plan.num_samples, "num_workers": self._num_workers}
        self._tasks[offset] = json.dumps(task).encode() + b"\n"
        return Slot(plan, mmap.mmap(self._memory_fd, plan.num_bytes, offset=offset), offset=offset)

    def submit(self, part: Part) -> None:
        for number in self._hands:
            while len(self._hands[number].parts) >= MOST_GIVEN:
                self._hear(self._hands[number])
            self._give(self._hands[number], part)

    def wait(self, part: Part) -> Filled:
        for number in range(self._num_workers):
            while part.outcome is None and part in self._hands[number].parts:
                self._hear(self._hands[number])
        return part.result()

    def close(self) -> None:
        for hand in self._hands.values():
            hand.end()
        if self._hands:
            os.close(self._memory_fd)
        self._hands = {}

    def _grow(self, num_bytes: int) -> int:
        """Where that much more begins. Pages that nobody has touched take no memory."""
        offset = self._num_bytes
        self._num_bytes += -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self._memory_fd, self._num_bytes)
        return offset

    def _start(self, number: int) -> Hand:
        here, there = socket.socketpair()
        progress = progress_of(self._memory_fd, number)
        progress[0] = NOT_BEGUN
        options = json.dumps(dataclasses.asdict(self._options))
        words = [self._set_path, self._memory_fd, there.fileno(), number, options]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "train.feed.ring_worker", *map(str, words)],
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path},
            pass_fds=(self._memory_fd, there.fileno()),
            stdin=subprocess.DEVNULL,
        )
        there.close()
        here.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, self._timeout)
        return Hand(number=number, process=process, channel=here, progress=progress)

    def _give(self, hand: Hand, part: Part) -> None:
        hand.parts.append(part)
        with contextlib.suppress(OSError):  # it is dead: heard when its channel is read
            hand.channel.sendall(self._tasks[part.slot.offset])

    def _hear(self, hand: Hand) -> None:
        """What one worker has to say."""
        try:
            said = hand.channel.recv(ANSWER_BYTES)
        except BlockingIOError:
            raise late(str(hand), hand.parts[0], int(hand.progress[0]), self._deadline_s) from None
        except ConnectionError:
            said = b""
        if not said:
            self._replace(hand)
        *answers, hand.rest = (hand.rest + said).split(b"\n")
        for answer in answers:
            self._take(hand.parts.popleft(), answer)

    def _take(self, part: Part, answer: bytes) -> None:
        try:
            part.pieces.append(_piece(answer))
            if len(part.pieces) == self._num_workers:
                part.outcome = finished(part.slot, part.pieces)
        except Fault as fault:
            part.outcome = fault

    def _replace(self, dead: Hand) -> None:
        """What it had not answered is read again, by a new one."""
        part, code = dead.parts[0], dead.end()
        doing = part.at(int(dead.progress[0]))
        self._say(f"{dead} died and is replaced", exit=code, was=doing)
        deaths = part.deaths[dead.number] = part.deaths.get(dead.number, 0) + 1
        if deaths == MAX_DEATHS:
            dead.parts.popleft().outcome = Partial(
                wrong=f"{MAX_DEATHS} workers died one after the other while they read batch {part.batch}",
                found=f"the last one was {doing}",
                mend="see what they wrote above and whether memory is short, verify the set; or set read_workers: 0",
            )
        hand = self._hands[dead.number] = self._start(dead.number)
        for part in dead.parts:
            self._give(hand, part)


@functools.lru_cache(maxsize=256)
def _piece(answer: bytes) -> Piece:
    """Nearly all answers are alike."""
    said = json.loads(answer)
    if isinstance(said, list):
        return Piece(*said)
    fault: type[Fault] = getattr(common.errors, said["fault"])
    raise fault(wrong=said["wrong"], found=said["found"], mend=said["mend"])
