"""One batch through everything that a run will do, each part timed under a deadline: minutes before hours.

    check(config, world)          the run is OUT/check, made anew; nothing of OUT itself is touched

A part that does not come to an end is left with every thread's stack, by the process's own end.
"""

import contextlib
import faulthandler
import shutil
import time
from collections.abc import Iterator

from common.log import Log, human_bytes
from common.stop import StopRequest
from common.watch import Watch
from train.config import TrainConfig
from train.dist import World
from train.loop import set_up
from train.optim import gather
from train.room import require_room
from train.saver import Saver
from train.state import Keep
from train.step import Stepper


def check(config: TrainConfig, world: World) -> None:
    out = config.out / "check"
    if world.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
    world.any(False)  # all wait until it is gone
    asked, config = config, config.model_copy(update={"out": out, "save_samples": True})
    run_dir = out if world.rank == 0 else out / "ranks" / str(world.rank)
    log = Log("train", run_dir, quiet=world.rank != 0)
    with Watch(run_dir, log) as watch:

        @contextlib.contextmanager
        def part(name: str) -> Iterator[None]:
            began = time.monotonic()
            faulthandler.dump_traceback_later(config.deadline_s, exit=True)
            try:
                with watch.stage(name, deadline_s=config.deadline_s):
                    yield
            finally:
                faulthandler.cancel_dump_traceback_later()
            seconds = time.monotonic() - began
            log.say(f"check: {name}", seconds=f"{seconds:.2f}", peak=human_bytes(world.memory()["peak_bytes"]))
            log.metric(event="check", part=name, seconds=round(seconds, 4), **world.memory())

        with part("load"):
            run = set_up(config, world, log, StopRequest(), follow_s=0.0)
        watch.running()
        log.say(run.summary())
        if world.rank == 0:
            require_room(asked, run.state, run.total_steps, log)
        with part("untrained"):
            run.onlooker.measure_untrained(run.state)
        stepper = Stepper(config, world, run.state, run.objective, run.level_weights, run.total_steps)
        feed = run.feed(log, config.batch_size)
        try:
            with part("first batch"):
                step = next(iter(feed))
            with part("forward and backward"):
                stepper.rehearse(step.micros[0])
            with part("step"):
                taken = stepper.take(step)
            log.say("check: the gradient's norm", norm=f"{float(taken.norm):.4f}", finite=not taken.skipped)
        finally:
            feed.close()
        with part("held-out forward"):
            run.onlooker.measure(run.state, log)
        with part("save"):
            if world.rank == 0:
                saver = Saver(out, Keep(newest=1), log)
                saver.save(run.state, run.facts())
                saver.finish()
            else:
                gather(run.state.student, run.state.optimizers)
        with part("sample"):
            if run.onlooker.wants_pictures(run.state.step, last=True):
                run.onlooker.draw(run.state, log)
        world.any(False)
        log.say("check: all parts work", folder=out)
