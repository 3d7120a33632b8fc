"""`harvest plan`: what a run would do, said before a weight is read; with `--probe` after a minute of its teacher.

    for line in report(config, Means(...)): ...        raises Refused at its end where the plan does not fit

records, those that the set does not hold yet, their forwards and bytes -> hours, from the probe or a pace that is
given -> what would fit the hours, GPUs and disk
"""

import dataclasses
import math
import operator
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import Fault, Refused
from common.log import human_bytes, human_seconds
from common.schedule import contract_grid, expert_of, kept_steps
from harvest.config import HarvestConfig
from harvest.doctor import nearest_folder
from harvest.forecast import NO_PRINTS, CountTokens, crowded, forecast, shard_bytes
from harvest.loading.folder import Resolved
from harvest.meaning import make_contract
from harvest.plan import WorkItem
from harvest.probe import Pace, probe
from harvest.running.task import Task, read_task
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
    facts, plan, todo = task.facts, task.plan, left_of(task)
    count_tokens = tokens_of(task.resolved)
    experts = _experts(task)
    answers = answers_of(todo)
    branches = 1 if config.teacher.batched_guidance else 2
    yield f"teacher   {facts.teacher} from {config.teacher.folder}: {task.resolved.summary()}"
    yield f"prompts   {plan.summary}"
    sizes = Counter[tuple[int, int]]()
    for item in plan.items:
        sizes[item.height, item.width] += len(item.questions)
    told = ", ".join(f"{count} of {height}x{width}" for (height, width), count in sizes.items())
    yield f"records   {told} in {len(plan.items)} shards"
    if task.shards is not None:
        yield f"to do     {todo.plan.num_records} of them, in {len(todo.plan.items)} shards: what follows is of these"
    yield f"forwards  {answers[0] * branches:.0f} high-noise, {answers[1] * branches:.0f} low-noise"
    shift = config.shift or facts.shift
    walked = "none" if config.source == "images" else f"{config.steps} walked"
    yield f"steps     {walked} ({experts.count(0)} of {config.steps} high-noise), {config.keep} kept, shift {shift:g}"
    needed, free = forecast(config, facts, todo.plan, count_tokens), shutil.disk_usage(nearest_folder(config.out)).free
    fields = ", ".join(f"{name} {human_bytes(size)}" for name, size in dataclasses.asdict(needed).items())
    yield f"disk      {human_bytes(needed.total)} ({fields})"
    yield f"          {human_bytes(_bytes_there(task))} there already, {human_bytes(free)} free"
    yield from (f"text      {line}" for line in crowded(config, facts, todo.plan.items, count_tokens))
    pace = _pace(config, task, means, branches)
    yield from _kill(todo, pace)
    yield from (f"placement {line}" for line in _placement(task))
    if pace is not None:
        seconds = _seconds(todo, pace)
        others = "; other sizes by their area" if plan.sizes - {pace.size} else ""
        yield f"pace      {pace.told()}, micro-batch {config.micro_batch}{others}"
        yield f"time      {seconds / 3600 / means.gpus:.3g} h on {means.gpus} GPUs, {seconds / 3600:.3g} GPU-hours"
    ways = list(_ways(task, means, pace, count_tokens))
    yield from (f"fits      {line}" for line, _ in ways)
    late = [] if pace is None or means.hours is None else _too_long(seconds / 3600 / means.gpus, means.hours)
    room = free if means.disk is None else means.disk
    tight = [f"{human_bytes(needed.total)} of {human_bytes(room)}"] if needed.total > room else []
    if late or tight:
        fewer = "prompts.limit" if config.images is None else "pictures"
        mend = f"{fewer}: {ways[0][1]}, or another of the lines above" if ways else "harvest fewer prompts"
        raise Refused(wrong="the plan does not fit", found=" and ".join(late + tight), mend=mend)


def left_of(task: Task) -> Task:
    """What a run would still do: without what the set holds, gave elsewhere or set aside."""
    if task.shards is None:
        return task
    return dataclasses.replace(task, plan=dataclasses.replace(task.plan, items=tuple(task.plan.remaining(task.shards))))


def answers_of(task: Task) -> tuple[float, float]:
    """Micro-batches that each expert answers."""
    high, low = sum(answers_by_size(task).values(), np.zeros(2))
    return float(high), float(low)


def answers_by_size(task: Task) -> dict[tuple[int, int], NDArray[np.float64]]:
    """(height, width) -> by expert: along the walks on the solver's own grid, those of samples included, and at the end
    points where it is asked again."""
    config, experts = task.config, _experts(task)
    steps = np.array([experts.count(expert) for expert in (0, 1)], np.float64)
    out = {(config.height, config.width): steps * -(-len(task.missing_samples) // config.micro_batch)}
    for size in sorted(task.plan.sizes):
        items = [item for item in task.plan.items if (item.height, item.width) == size]
        answers = out.setdefault(size, np.zeros(2))
        if config.source != "images":
            answers += steps * sum(-(-len(item.questions) // config.micro_batch) for item in items)
        if config.source != "trajectory":
            chosen = items[:: -(-len(items) // SAMPLED)]
            share = sum(len(item.questions) for item in items) / sum(len(item.questions) for item in chosen)
            answers += [share * sum(_asked_again(item, task, expert) for item in chosen) for expert in (0, 1)]
    return out


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
    return Pace(answers=(means.seconds_per_forward * branches,) * 2, size=(config.height, config.width))


def _seconds(task: Task, pace: Pace) -> float:
    """Of one GPU. A forward takes as long as its picture is large; attention would add to that for larger ones."""
    prompts = len({question.prompt for item in task.plan.items for question in item.questions})
    changes = len(task.plan.items) * len(pace.answers) * pace.change
    answering = sum(
        math.prod(size) / math.prod(pace.size) * sum(map(operator.mul, answers, pace.answers))
        for size, answers in answers_by_size(task).items()
    )
    return float(answering) + prompts * pace.encode + changes


def _kill(task: Task, pace: Pace | None) -> Iterator[str]:
    """An item is being written while the next one is walked: both are done again."""
    if not task.plan.items:
        return
    most = max(len(item.questions) for item in task.plan.items)
    told = f"2 shards of each worker, {2 * most} records"
    if pace is None:
        yield f"a kill    loses at most {told}"
        return
    seconds = _seconds(task, pace) * most / task.plan.num_records
    yield f"a kill    loses at most {told}, {human_seconds(2 * seconds)} of work"
    if seconds > LONGEST_LOSS_S:
        fewer = max(1, int(most * LONGEST_LOSS_S / seconds))
        yield f"          records_per_shard: {fewer} would keep a shard within {human_seconds(LONGEST_LOSS_S)}"


def _ways(task: Task, means: Means, pace: Pace | None, count_tokens: CountTokens) -> Iterator[tuple[str, int]]:
    """Prompts x kept steps x size within hours and disk, and how many prompts each is; the configured ones first.
    Sizes that prompts bring themselves stay what they are."""
    if (means.hours is None or pace is None) and means.disk is None:
        return
    config, plan = task.config, task.plan
    unit = task.facts.latent_stride * task.facts.latent_patch
    own_sizes = plan.sizes != {(config.height, config.width)}
    seeds = plan.num_records / len({question.prompt for item in plan.items for question in item.questions})
    keeps = dict.fromkeys([config.keep, *(keep for keep in KEEPS if keep <= config.steps)])
    for shrink in (1.0,) if own_sizes else SHRINKS:
        height, width = (max(unit, round(size * shrink / unit) * unit) for size in (config.height, config.width))
        resized = [dataclasses.replace(item, height=height, width=width) for item in plan.items]
        other_plan = plan if own_sizes else dataclasses.replace(plan, items=tuple(resized))
        for keep in keeps:
            changed = config.model_copy(update={"keep": keep, "height": height, "width": width})
            if len(changed.pinned_steps) > keep:
                continue
            other, fits = dataclasses.replace(task, config=changed, plan=other_plan), {}
            if means.disk is not None:
                fits["disk"] = means.disk / _record_bytes(other, count_tokens)
            if means.hours is not None and pace is not None:
                fits["time"] = means.hours * 3600 * means.gpus / (_seconds(other, pace) / plan.num_records)
            bound = min(fits, key=lambda name: fits[name])
            prompts, told = int(fits[bound] / seeds), "their own sizes" if own_sizes else f"{height}x{width}"
            yield f"{prompts} prompts, {keep} kept, {told}: as many as the {bound} allows", prompts


def _record_bytes(task: Task, count_tokens: CountTokens) -> float:
    """Of a record among the others of its shard; a shard of each size stands for all of that size."""
    contract = make_contract(task.config, task.facts, NO_PRINTS, "")
    firsts = {(item.height, item.width): item for item in reversed(task.plan.items)}
    each = {size: shard_bytes(item, contract, task.config.container, count_tokens).total / len(item.questions)
            for size, item in firsts.items()}  # fmt: skip
    total = sum(len(item.questions) * each[item.height, item.width] for item in task.plan.items)
    return total / task.plan.num_records


def _too_long(hours: float, given: float) -> list[str]:
    return [f"{hours:.3g} h of {given:g} h"] if hours > given else []


def _bytes_there(task: Task) -> int:
    return 0 if task.shards is None else task.shards.manifest().num_bytes


def _placement(task: Task) -> list[str]:
    """On this machine, which need not be the one that will run it."""
    try:
        work = work_of(task.config, task.plan.sizes)
        return placement_of(task.config.teacher, task.resolved, work).lines()
    except Fault as fault:
        return [f"not on this machine: {fault}"]


def tokens_of(resolved: Resolved) -> CountTokens:
    """By the folder's tokenizer alone."""
    from harvest.loading.parts import TOKENIZER, count_tokens, load_tokenizer

    tokenizer = load_tokenizer(resolved.components[TOKENIZER])
    return lambda prompts: count_tokens(tokenizer, prompts)
