"""What the records of this run will mean, and how the arithmetic is done: contract and numerics out of the
configuration, the teacher's folder and the loaded teacher.

    contract = make_contract(config, teacher.facts, teacher.fingerprints, teacher.compute_dtype)
    require_same_meaning(config, facts)       before a weight is read: another meaning is refused here already
"""

import dataclasses

from common.cleaning import CLEANING, clean_prompt
from common.errors import BadUsage, Refused
from common.log import Log
from common.record import Contract, Numerics
from common.schedule import EULER, HIGH_NOISE, contract_grid, expert_of
from common.shards import CONTRACT_NAME, ShardSet
from harvest.config import HarvestConfig
from harvest.solvers import require_known, solver_of
from harvest.teacher import Fingerprints, Teacher, TeacherFacts


def make_contract(config: HarvestConfig, facts: TeacherFacts, prints: Fingerprints, compute_dtype: str) -> Contract:
    num_experts = 1 if facts.boundary is None else 2
    if len(config.guidance) < num_experts:
        raise BadUsage(
            wrong="guidance", found=f"{config.guidance} for {num_experts} experts", mend="give one number per expert"
        )
    values = dataclasses.asdict(facts) | dataclasses.asdict(prints)
    scheduler = values.pop("scheduler")
    if config.source != "images":
        values["vae"] = ""
    if config.solver != EULER:
        require_known(scheduler)
    if config.shift is not None:
        values["shift"] = config.shift
    contract = Contract(
        **values,
        text_cleaning=CLEANING,
        guidance=config.guidance[:num_experts],
        negative_prompt=clean_prompt(config.negative_prompt),  # as stock Wan does, and as all prompts are
        latent_dtype=config.latent_dtype,
        source=config.source,
        solver=EULER if config.solver == EULER else scheduler,
        jitter=config.jitter,
        steps=config.steps,
        keep=config.keep,
        keep_at=config.pinned_steps,
        compute_dtype=compute_dtype,
        encoding=config.encoding,
        branches=config.branches,
    )
    solver_of(contract)  # refuses what it could not walk, before hours of loading
    return contract


def require_same_meaning(config: HarvestConfig, facts: TeacherFacts) -> None:
    """As the set at `out`, if there is one. What only a loaded teacher can say (fingerprints, the dtype that `auto`
    means) is taken from the set here, and compared once it is loaded."""
    if not (config.out / CONTRACT_NAME).exists():
        _require_each_expert(make_contract(config, facts, Fingerprints(weights="", text_encoder="", tokenizer=""), ""))
        return
    shards = ShardSet.open(config.out)
    held = shards.contract
    prints = Fingerprints(weights=held.weights, text_encoder=held.text_encoder, tokenizer=held.tokenizer, vae=held.vae)
    dtype = held.compute_dtype if config.teacher.dtype == "auto" else config.teacher.dtype
    shards.require(make_contract(config, facts, prints, dtype))


def _require_each_expert(contract: Contract) -> None:
    """Of a set that begins: a student learns nothing of the levels of one that is never kept."""
    grid = contract_grid(dataclasses.replace(contract, jitter=False), seed=0)
    experts = expert_of(grid.timesteps, contract.boundary, train_steps=contract.train_steps)
    unkept = set(experts.tolist()) - {int(experts[step]) for step in contract.keep_at}
    if len(contract.keep_at) + len(unkept) > contract.keep:
        name = "high-noise" if HIGH_NOISE in unkept else "low-noise"
        raise BadUsage(
            wrong=f"keep: nothing of the {name} expert would be kept",
            found=f"keep {contract.keep}, keep_at {list(contract.keep_at)}",
            mend=f"keep: {len(contract.keep_at) + len(unkept)} or more, or a keep_at that names a step of that expert",
        )


def make_numerics(config: HarvestConfig, teacher: Teacher) -> Numerics:
    import diffusers
    import torch

    device = torch.cuda.get_device_name(teacher.device) if teacher.device.startswith("cuda") else teacher.device
    return Numerics(
        micro_batch=config.micro_batch,
        batched_guidance=config.teacher.batched_guidance,
        collapsed_padding=config.teacher.collapsed_padding and teacher.facts.text_padding == "zeros",
        attention=teacher.attention,
        device=device,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        sdpa=teacher.sdpa,
        encoder="" if _kind(teacher.encoder_device) == _kind(teacher.device) else _kind(teacher.encoder_device),
        compiled=config.teacher.compile,
    )


def _kind(device: str) -> str:
    return device.split(":")[0]


def say_numerics(shards: ShardSet, mine: Numerics, log: Log, *, strict: bool) -> None:
    """Other numerics move last bits, not meaning: they are said, and refused only when asked to."""
    others = {receipt.numerics for receipt in shards.manifest().receipts} - {mine}
    for other in others:
        told = ", ".join(mine.difference(other))
        if not told:  # of before receipts said all of it
            continue
        if strict:
            raise Refused(wrong="the set holds shards of other numerics", found=told, mend="run without --strict")
        log.say(f"the set holds shards of other numerics (this run | those): {told}")
