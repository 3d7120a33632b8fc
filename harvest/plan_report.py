"""`harvest plan`: what a run would do, said before a weight is read; with `--probe` after a minute of its teacher.

    for line in report(config, Means(...)): ...        raises Refused at its end where the plan does not fit

records, forwards, bytes -> hours, from the probe or a pace that is given -> what would fit the hours, GPUs and disk
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import Fault, Refused
from common.log import human_bytes, human_seconds
from common.schedule import contract_grid, expert_of, kept_steps
from common.shards import CONTRACT_NAME, ShardSet
from harvest.config import HarvestConfig
from harvest.doctor import nearest_folder
from harvest.forecast import NO_PRINTS, CountTokens, forecast, shard_bytes
from harvest.loading.folder import Resolved
from harvest.meaning import make_contract
from harvest.plan import WorkItem
from harvest.probe import Pace, probe
from harvest.running.loop import Task, read_task
from harvest.teacher import work_of
from harvest.teachers import placement_of

SAMPLED = 64
"""Items whose kept steps are looked at; their mean stands for all."""
LONGEST_LOSS_S = 600.0
KEEPS, SHRINKS = (4, 8, 16), (1.0, 0.75, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What there is to harvest with; None: not said."""

    hours: float | None = None
    gpus: int = 1
    disk: int | None = None
    seconds_per_forward: float | None = None
    probe: bool = False


def report(config: HarvestConfig, means: Means) -> Iterator[str]:
    task = read_task(config)
    facts, plan = task.facts, task.plan
    count_tokens = tokens_of(task.resolved)
    experts = _experts(task)
    answers = answers_of(task)
    branches = 1 if config.teacher.batched_guidance else 2
    yield f"teacher   {facts.teacher} from {config.teacher.folder}: {task.resolved.summary()}"
    yield f"prompts   {plan.summary}"
    sizes = Counter[tuple[int, int]]()
    for item in plan.items:
        sizes[item.height, item.width] += len(item.questions)
    told = ", ".join(f"{count} of {height}x{width}" for (height, width), count in sizes.items())
    yield f"records   {told} in {len(plan.items)} shards"
    yield f"forwards  {answers[0] * branches:.0f} high-noise, {answers[1] * branches:.0f} low-noise"
    shift = config.shift or facts.shift
    walked = "none" if config.source == "images" else f"{config.steps} walked"
    yield f"steps     {walked} ({experts.count(0)} of {config.steps} high-noise), {config.keep} kept, shift {shift:g}"
    needed, free = forecast(config, facts, plan, count_tokens), shutil.disk_usage(nearest_folder(config.out)).free
    fields = ", ".join(f"{name} {human_bytes(size)}" for name, size in dataclasses.asdict(needed).items())
    there = _bytes_there(config)
    yield f"disk      {human_bytes(needed.total)} ({fields})"
    yield f"          {human_bytes(there)} of it there, {human_bytes(free)} free"
    pace = _pace(config, task, means, branches)
    yield from _kill(task, answers, pace)
    yield from (f"placement {line}" for line in _placement(config, task.resolved))
    if pace is not None:
        seconds = _seconds(task, answers, pace)
        yield f"pace      {pace.told()}, micro-batch {config.micro_batch}"
        yield f"time      {seconds / 3600 / means.gpus:.3g} h on {means.gpus} GPUs, {seconds / 3600:.3g} GPU-hours"
    ways = list(_ways(task, means, pace, count_tokens))
    yield from (f"fits      {line}" for line, _ in ways)
    late = [] if pace is None or means.hours is None else _too_long(seconds / 3600 / means.gpus, means.hours)
    room = free if means.disk is None else means.disk
    tight = [f"{human_bytes(needed.total - there)} of {human_bytes(room)}"] if needed.total - there > room else []
    if late or tight:
        fewer = "prompts.limit" if config.images is None else "pictures"
        mend = f"{fewer}: {ways[0][1]}, or another of the lines above" if ways else "harvest fewer prompts"
        raise Refused(wrong="the plan does not fit", found=" and ".join(late + tight), mend=mend)


def answers_of(task: Task) -> tuple[float, float]:
    """Micro-batches that each expert answers: along the walks on the solver's own grid, those of samples included, and
    at the end points where it is asked again."""
    config, experts = task.config, _experts(task)
    items = () if config.source == "images" else task.plan.items
    num_batches = sum(-(-len(group) // config.micro_batch)
                      for group in [task.missing_samples, *(item.questions for item in items)])  # fmt: skip
    walked = [float(num_batches * experts.count(e)) for e in (0, 1)]
    if config.source == "trajectory":
        return walked[0], walked[1]
    chosen = task.plan.items[:: -(-len(task.plan.items) // SAMPLED)]
    share = task.plan.num_records / sum(len(item.questions) for item in chosen)
    again = [share * sum(_asked_again(item, task, expert) for item in chosen) for expert in (0, 1)]
    return walked[0] + again[0], walked[1] + again[1]


def _asked_again(item: WorkItem, task: Task, expert: int) -> int:
    """Micro-batches of the kept levels of one item; a group's are put together."""
    contract = make_contract(task.config, task.facts, NO_PRINTS, "")
    experts, size = _experts_array(task), task.config.micro_batch
    keys = [question.key for question in item.questions]
    kept = [kept_steps(key, contract.steps, contract.keep, experts, contract.keep_at) for key in keys]
    counts = [int((experts[steps] == expert).sum()) for steps in kept]
    return sum(-(-sum(counts[start : start + size]) // size) for start in range(0, len(counts), size))


def _experts(task: Task) -> list[int]:
    return [int(expert) for expert in _experts_array(task)]


def _experts_array(task: Task) -> NDArray[np.uint8]:
    """Of the steps; the same for every record, whatever its jitter."""
    contract = make_contract(task.config, task.facts, NO_PRINTS, "")
    return expert_of(contract_grid(contract, 0).timesteps, contract.boundary, train_steps=contract.train_steps)


def _pace(config: HarvestConfig, task: Task, means: Means, branches: int) -> Pace | None:
    if means.probe:
        return probe(config, task)
    if means.seconds_per_forward is None:
        return None
    return Pace(answers=(means.seconds_per_forward * branches,) * 2)


def _seconds(task: Task, answers: tuple[float, float], pace: Pace) -> float:
    """Of one GPU."""
    prompts = len({question.prompt for item in task.plan.items for question in item.questions})
    changes = len(task.plan.items) * len(pace.answers) * pace.change
    return sum(map(float.__mul__, answers, pace.answers)) + prompts * pace.encode + changes


def _kill(task: Task, answers: tuple[float, float], pace: Pace | None) -> Iterator[str]:
    """An item is being written while the next one is walked: both are done again."""
    most = max(len(item.questions) for item in task.plan.items)
    told = f"2 shards of each worker, {2 * most} records"
    if pace is None:
        yield f"a kill    loses at most {told}"
        return
    seconds = _seconds(task, answers, pace) * most / task.plan.num_records
    yield f"a kill    loses at most {told}, {human_seconds(2 * seconds)} of work"
    if seconds > LONGEST_LOSS_S:
        fewer = max(1, int(most * LONGEST_LOSS_S / seconds))
        yield f"          records_per_shard: {fewer} would keep a shard within {human_seconds(LONGEST_LOSS_S)}"


def _ways(task: Task, means: Means, pace: Pace | None, count_tokens: CountTokens) -> Iterator[tuple[str, int]]:
    """Prompts x kept steps x size within hours and disk, and how many prompts each is; the configured ones first."""
    if (means.hours is None or pace is None) and means.disk is None:
        return
    config, item = task.config, task.plan.items[0]
    unit = task.facts.latent_stride * task.facts.latent_patch
    num_prompts = len({question.prompt for each in task.plan.items for question in each.questions})
    seeds = task.plan.num_records / num_prompts
    keeps = dict.fromkeys([config.keep, *(keep for keep in KEEPS if keep <= config.steps)])
    for shrink in SHRINKS:
        height, width = (max(unit, round(size * shrink / unit) * unit) for size in (config.height, config.width))
        for keep in keeps:
            changed = config.model_copy(update={"keep": keep, "height": height, "width": width})
            if len(changed.pinned_steps) > keep:
                continue
            contract = make_contract(changed, task.facts, NO_PRINTS, "")
            resized = dataclasses.replace(item, height=height, width=width)
            record = shard_bytes(resized, contract, config.container, count_tokens).total / len(item.questions)
            fits = {}
            if means.disk is not None:
                fits["disk"] = means.disk / record
            if means.hours is not None and pace is not None:
                area = height * width / (config.height * config.width)
                other = dataclasses.replace(task, config=changed)
                seconds = _seconds(other, answers_of(other), pace) / task.plan.num_records * area
                fits["time"] = means.hours * 3600 * means.gpus / seconds
            bound = min(fits, key=lambda name: fits[name])
            prompts = int(fits[bound] / seeds)
            yield f"{prompts} prompts, {keep} kept, {height}x{width}: as many as the {bound} allows", prompts


def _too_long(hours: float, given: float) -> list[str]:
    return [f"{hours:.3g} h of {given:g} h"] if hours > given else []


def _bytes_there(config: HarvestConfig) -> int:
    """Of what a run goes on with."""
    return ShardSet.open(config.out).manifest().num_bytes if (config.out / CONTRACT_NAME).exists() else 0


def _placement(config: HarvestConfig, resolved: Resolved) -> list[str]:
    """On this machine, which need not be the one that will run it."""
    try:
        return placement_of(config.teacher, resolved, work_of(config)).lines()
    except Fault as fault:
        return [f"not on this machine: {fault}"]


def tokens_of(resolved: Resolved) -> CountTokens:
    """By the folder's tokenizer alone."""
    from harvest.loading.parts import TOKENIZER, count_tokens, load_tokenizer

    tokenizer = load_tokenizer(resolved.components[TOKENIZER])
    return lambda prompts: count_tokens(tokenizer, prompts)
