"""Where networks go: never over the budget on any machine, and the same numbers wherever they are."""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import BadUsage, Fault, Refused
from common.log import Log
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.latents import encode_in_tiles
from harvest.loading.arrivals import Arrivals
from harvest.loading.folder import Component, Resolved, resolve
from harvest.loading.measure import sizes_of, tile_bytes
from harvest.loading.networks import Networks
from harvest.loading.transfer import on_own_pages
from harvest.loading.weights import load_model
from harvest.meaning import make_contract
from harvest.placing.placement import MAP, place
from harvest.placing.places import CONTEXT_BYTES, CPU, STREAMED_BLOCKS, Machine, Place, Placement, Size, Wish
from harvest.placing.ways import WAYS
from harvest.plan import WorkItem
from harvest.rollout import rollout
from harvest.teacher import Work
from harvest.teachers import facts_of, load_teacher, placement_of
from harvest.teachers.wan import networks_of, work_bytes
from tests.made import harvest_config, planned
from tests.micro import TI2V_VAE, VAE, write_micro_wan

GB = 1_000_000_000


def made_sizes(rng: np.random.Generator) -> list[Size]:
    def one(name: str) -> Size:
        blocks = {f"blocks.{n}": int(rng.integers(1, 2 * GB)) for n in range(int(rng.integers(1, 40)))}
        return Size(name=name, is_encoder=name == "text_encoder", modules={"head": int(rng.integers(0, GB)), **blocks})

    sizes = [one(name) for name in ("text_encoder", "transformer", "transformer_2")[: int(rng.integers(2, 4))]]
    vae = Size(
        name="vae", is_encoder=True, modules={"all": int(rng.integers(1, 3 * GB))}, own_work=int(rng.integers(GB))
    )
    return [*sizes, vae] if rng.integers(2) else sizes


def made_machine(rng: np.random.Generator) -> Machine:
    num_gpus = int(rng.choice([0, 1, 1, 2, 4, 8]))
    gpus = {f"cuda:{n}": int(rng.uniform(2, 100) * GB) for n in range(num_gpus)}
    return Machine(gpus=gpus, host=int(rng.uniform(8, 600) * GB))


def held_in_phase(plan: Placement, sizes: list[Size], phase: Size, wish: Wish) -> dict[str, int]:
    """What lies where while `phase` computes, counted anew from the places alone."""
    work_bytes, in_flight = wish.work_bytes, plan.in_flight
    held: dict[str, int] = {}

    def add(device: str, num_bytes: int) -> None:
        held[device] = held.get(device, 0) + num_bytes

    for size in sizes:
        at = plan.of(size.name)
        if at.kept in ("pinned", "memory"):
            add(CPU, size.num_bytes * plan.workers)
        if at.how == "resident":
            add(at.device, size.num_bytes)
        if at.how == "split":
            for module, num_bytes in size.modules.items():
                add(at.modules[module], num_bytes)
        if size is phase and at.how == "turns":
            add(at.device, size.num_bytes)
        if size is phase and at.how == "stream":
            add(at.device, sum(size.modules.values()) - sum(size.blocks.values()))
            add(at.device, min(STREAMED_BLOCKS, len(size.blocks)) * max(size.blocks.values()))
        if size is phase and size.own_work:
            add(at.device, size.own_work)
        if size is phase and not size.is_encoder:
            for device in set(at.modules.values()) or {at.device}:
                add(device, work_bytes - wish.kept_bytes + (in_flight - 1) * wish.text_bytes)
            for block in size.blocks:
                add(at.modules.get(block, at.device), in_flight * wish.kept_bytes // len(size.blocks))
    for device in list(held):
        add(device, CONTEXT_BYTES if device != CPU else 0)
    return held


@pytest.mark.parametrize("strategy", ["auto", *WAYS])
def test_no_plan_is_over_the_budget_on_any_machine(strategy: str) -> None:
    rng = np.random.default_rng(sum(map(ord, strategy)))
    num_placed = 0
    for _ in range(400):
        sizes, machine = made_sizes(rng), made_machine(rng)
        wish = Wish(
            strategy=strategy, text_encoder=str(rng.choice(["auto", "gpu", "cpu"])), budget=rng.uniform(0.3, 1.0),
            work_bytes=int(rng.uniform(0, 8) * GB), prepared=bool(rng.integers(2)),
        )  # fmt: skip
        wish = replace(wish, kept_bytes=int(wish.work_bytes * rng.uniform(0, 0.8)), text_bytes=wish.work_bytes // 50)
        try:
            plan = place(sizes, machine, wish)
        except Refused as refused:
            assert "GB" in refused.mend
            continue
        num_placed += 1
        free = {**machine.gpus, CPU: machine.host}
        for phase in sizes:
            for device, num_bytes in held_in_phase(plan, sizes, phase, wish).items():
                assert num_bytes <= free[device] * wish.budget
                assert num_bytes <= plan.peaks[device] or device == CPU
        assert {at.name for at in plan.places} == {size.name for size in sizes}
        if plan.workers > 1:  # every other GPU holds as much
            assert max(plan.peaks[gpu] for gpu in machine.gpus) <= min(machine.gpus.values()) * wish.budget
        if wish.text_encoder == "gpu" and machine.gpus and strategy != "cpu":
            assert plan.of("text_encoder").how != "host"
        if any(at.kept == "mapped" for at in plan.places):
            assert wish.prepared
        if "vae" in {size.name for size in sizes}:
            assert plan.of("vae").how == ("host" if plan.strategy == "cpu" else "turns")
            assert plan.of("vae").kept == "memory"
    assert num_placed > 40


A14B = [
    Size(name="text_encoder", is_encoder=True, modules={f"block.{n}": 473_000_000 for n in range(24)}),
    *(
        Size(name=name, is_encoder=False,
             modules={"head": 400_000_000, **{f"blocks.{n}": 705_000_000 for n in range(40)}})
        for name in ("transformer", "transformer_2")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("num_gpus", "gpu", "host", "strategy", "expected"), [
    (1, 141, 256, "auto", "replicate"), (1, 80, 256, "auto", "replicate"), (1, 48, 128, "auto", "swap"),
    (1, 24, 128, "auto", "stream"), (4, 24, 128, "auto", "balanced"), (8, 80, 1024, "auto", "replicate"),
    (0, 0, 128, "auto", "cpu"), (1, 60, 256, "auto", "swap"), (2, 48, 64, "auto", "balanced"),
])  # fmt: skip
def test_the_way_that_moves_least_is_taken(num_gpus: int, gpu: int, host: int, strategy: str, expected: str) -> None:
    machine = Machine(gpus={f"cuda:{n}": gpu * GB for n in range(num_gpus)}, host=host * GB)
    assert place(A14B, machine, Wish(strategy=strategy, work_bytes=4 * GB)).strategy == expected


def test_what_does_not_fit_is_refused_with_what_would_do() -> None:
    machine = Machine(gpus={"cuda:0": 4 * GB}, host=64 * GB)
    with pytest.raises(Refused, match=r"4.0 GB free on cuda:0.*stream wants .* GB free on each GPU and 7.* GB of host"):
        place(A14B, machine, Wish(work_bytes=4 * GB))
    told = place(A14B, Machine(gpus={"cuda:0": 24 * GB}, host=48 * GB), Wish(work_bytes=4 * GB, prepared=True))
    assert told.strategy == "stream" and "read from its prepared file" in "\n".join(told.lines())


@pytest.mark.parametrize(("modules", "fault", "what"), [
    ({"text_encoder": "cuda:3", "transformer": "cpu", "transformer_2": "cpu"}, BadUsage, "not there.*cuda:3"),
    ({"text_encoder": "cpu", "transformer.blocks": "cpu", "transformer_2": "cpu"}, BadUsage,
     "leaves.*transformer.head"),
    ({"text_encoder": "cpu", "transformer": "cuda:0", "transformer_2": "cuda:0"}, Refused, "too much on cuda:0"),
    ({"text_encoder": "cpu", "transformer": "disk", "transformer_2": "cpu"}, BadUsage, "wants teacher.prepared"),
])  # fmt: skip
def test_a_map_of_ones_own_is_held_to_the_same(modules: dict[str, str], fault: type[Fault], what: str) -> None:
    machine = Machine(gpus={"cuda:0": 48 * GB}, host=256 * GB)
    with pytest.raises(fault, match=what):
        place(A14B, machine, Wish(strategy=MAP, modules=modules))


def test_a_map_by_its_longest_names() -> None:
    machine = Machine(gpus={"cuda:0": 48 * GB, "cuda:1": 48 * GB}, host=256 * GB)
    modules = {"text_encoder": "cpu", "transformer": "cuda:0", "transformer_2": "cuda:1",
               "transformer.blocks.39": "cuda:1"}  # fmt: skip
    plan = place(A14B, machine, Wish(strategy=MAP, modules=modules))
    assert (
        plan.of("transformer").modules["blocks.39"] == "cuda:1" and plan.of("transformer").modules["head"] == "cuda:0"
    )
    assert plan.peaks["cuda:1"] == CONTEXT_BYTES + A14B[2].num_bytes + 705_000_000


def test_sizes_are_those_of_the_loaded_network_and_what_is_tied_counts_once(micro_wan: Path) -> None:
    resolved = resolve(micro_wan, "auto")
    for size in sizes_of(resolved, networks_of(resolved), torch.bfloat16):
        model = load_model(resolved.components[size.name], torch.bfloat16)
        assert size.num_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert list(size.blocks) == ["blocks.0", "blocks.1"]


class LiveBytes(TorchDispatchMode):
    """Counts what lives of all that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self._seen = 0, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key and key not in self._seen:
            self._seen.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= num_bytes


def loaded(folder: Path, tmp_path: Path, work: Work, **teacher: Any) -> Any:
    config = TeacherConfig(**{"folder": folder, "dtype": "float32", "device": "cpu", **teacher})
    with Watch(tmp_path / "run", Log("test", quiet=True)) as watch:
        return load_teacher(config, resolve(folder, "auto", config.rest), watch, Log("test", quiet=True), work)


def predicted(teacher: Any, *, rows: int = 2, side: int = 8) -> list[torch.Tensor]:
    """Both experts, with a text."""
    texts = teacher.encode(["a red cat", "a small blue house on the sea"] * (rows // 2))
    condition = teacher.condition(texts, teacher.encode([""])[0])
    latents = torch.randn(rows, 16, side, side, generator=torch.Generator().manual_seed(1))
    found = []
    for t in (990.0, 300.0, 990.0):
        found += teacher.predict(latents, torch.full((rows,), t), condition)
    return found


@pytest.mark.parametrize("collapsed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_forward_needs_no_more_than_is_reserved(tmp_path: Path, dtype: str, collapsed: bool) -> None:
    shape = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 691}
    folder = write_micro_wan(tmp_path / "wan", transformer=shape)
    work = Work(records=4, height=512, width=512)
    teacher = loaded(folder, tmp_path, work, dtype=dtype, collapsed_padding=collapsed)
    config = TeacherConfig(folder=folder, dtype=dtype, device="cpu", collapsed_padding=collapsed)
    reserve = work_bytes(config, resolve(folder, "auto"), work, getattr(torch, dtype))
    texts = teacher.encode(["a red cat"] * 4)
    condition = teacher.condition(texts, texts[0])
    latents = torch.randn(4, 16, 64, 64)
    with LiveBytes() as live:
        teacher.predict(latents, torch.full((4,), 990.0), condition)
    assert 0.1 * reserve < live.most <= reserve


VAES: list[tuple[str, dict[str, Any]]] = [
    ("wan", VAE | {"base_dim": 16, "num_res_blocks": 2}),
    ("ti2v", TI2V_VAE | {"base_dim": 16, "num_res_blocks": 2}),
    ("sd", {"block_out_channels": (16, 32, 32), "norm_num_groups": 4, "layers_per_block": 2,
            "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), VAES, ids=lambda told: told if isinstance(told, str) else "")
def test_a_tile_needs_no_more_than_is_reserved(kind: str, config: dict[str, Any]) -> None:
    """A picture larger than a tile does not need more than one."""
    from diffusers import AutoencoderKL, AutoencoderKLWan

    vae = (AutoencoderKL if kind == "sd" else AutoencoderKLWan)(**config).eval().requires_grad_(False)
    stride = {"wan": 8, "ti2v": 16, "sd": 4}[kind]
    part = Component(name="vae", library="diffusers", class_name="", folder=Path(), variant=None, files=(),
                     config=dict(vae.config))  # fmt: skip
    told = Resolved(folder=Path(), pipeline="", scalars={}, components={"vae": part})
    for height, width in ((128, 192), (640, 512)):
        reserve = tile_bytes(told, Work(height=height, width=width, pictures=True))
        with torch.inference_mode(), LiveBytes() as live:
            encode_in_tiles(vae, torch.zeros(3, height, width), stride, lambda: None)
        assert reserve is not None and 0.2 * reserve < live.most <= reserve


def test_the_vae_is_in_the_plan_where_pictures_are_encoded(tmp_path: Path, micro_wan: Path) -> None:
    config = TeacherConfig(folder=micro_wan, device="cpu")
    resolved, work = resolve(micro_wan, "auto"), Work(height=64, width=64)
    without = placement_of(config, resolved, work)
    told = placement_of(config, resolved, replace(work, pictures=True))
    size = sum(parameter.nbytes for parameter in load_model(resolved.components["vae"], torch.float32).parameters())
    assert told.of("vae").num_bytes == size and told.peaks[CPU] >= without.peaks[CPU] + size
    assert "vae" not in {at.name for at in without.places}


def test_a_map_of_ones_own_leaves_room_for_the_vae() -> None:
    vae = Size(name="vae", is_encoder=True, modules={"all": 3 * GB}, own_work=6 * GB)
    wish = Wish(strategy=MAP, modules={size.name: "cuda:0" for size in A14B}, budget=1.0)
    held = sum(size.num_bytes for size in A14B) + CONTEXT_BYTES
    machine = Machine(gpus={"cuda:0": held + 8 * GB}, host=64 * GB)
    assert place(A14B, machine, wish).peaks == {"cuda:0": held}
    with pytest.raises(Refused, match="too much on cuda:0"):
        place([*A14B, vae], machine, wish)
    roomy = Machine(gpus={"cuda:0": held + 9 * GB}, host=64 * GB)
    assert place([*A14B, vae], roomy, wish).peaks == {"cuda:0": held + 9 * GB, CPU: 3 * GB}


def test_who_takes_turns_makes_room_for_pictures(resolved: Resolved, tmp_path: Path, micro_wan: Path) -> None:
    teacher = loaded(micro_wan, tmp_path, Work(records=2, height=64, width=64))
    teacher._networks = networks_at(resolved, "turns", tmp_path)
    home = teacher._networks.model("transformer").proj_out.weight.data_ptr()
    predicted(teacher)
    assert teacher._networks.model("transformer").proj_out.weight.data_ptr() != home

    class Looking:
        """Comes to encode pictures, and has none."""

        def latents(self, item: WorkItem) -> dict[str, torch.Tensor]:
            found.append(teacher._networks.model("transformer").proj_out.weight.data_ptr())
            return {}

    found: list[int] = []
    config = harvest_config(tmp_path / "set", micro_wan)
    contract = make_contract(config, teacher.facts, teacher.fingerprints, teacher.compute_dtype)
    (item, *_) = planned(config).items
    assert not rollout(teacher, item, contract, micro_batch=2, moved=lambda: None, pictures=Looking())
    assert found == [home]


@pytest.fixture
def resolved(micro_wan: Path) -> Resolved:
    return resolve(micro_wan, "auto")


def networks_at(resolved: Resolved, how: str, tmp_path: Path) -> Networks:
    """As the planner would have it, but that the device is the CPU. The encoder takes turns."""
    names = networks_of(resolved)
    places = tuple(
        Place(name=name, num_bytes=0, how="turns" if name == "text_encoder" else how, device=CPU, kept="pinned")
        for name in names
    )
    plan = Placement(strategy=how, workers=1, device=CPU, places=places, peaks={}, budgets={})
    arrivals = Arrivals(Watch(tmp_path / "run", Log("test", quiet=True)), Log("test", quiet=True), {})
    networks = Networks([resolved.components[name] for name in names], plan, torch.float32, arrivals)
    networks.start()
    return networks


@pytest.mark.parametrize("shape", [(), (3,), (5, 7, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_will_be_pinned_has_pages_of_its_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    first, second = on_own_pages(tensor), on_own_pages(tensor)
    assert torch.equal(first, tensor) and first.shape == tensor.shape and first.dtype == dtype
    assert first.data_ptr() % 4096 == second.data_ptr() % 4096 == 0 and first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("how", ["turns", "stream"])
def test_moved_weights_compute_the_same(resolved: Resolved, tmp_path: Path, micro_wan: Path, how: str) -> None:
    teacher = loaded(micro_wan, tmp_path, Work(records=2, height=64, width=64))
    expected = predicted(teacher)
    teacher._networks = networks_at(resolved, how, tmp_path)
    for mine, other in zip(predicted(teacher), expected, strict=True):
        assert torch.equal(mine, other)


def test_one_at_a_time_is_on_the_device_and_nothing_is_copied_back(resolved: Resolved, tmp_path: Path) -> None:
    networks = networks_at(resolved, "turns", tmp_path)
    high, low = networks.model("transformer"), networks.model("transformer_2")
    home = [tensor.data_ptr() for tensor in high.parameters()]
    networks.ready("transformer")
    there = [tensor.data_ptr() for tensor in high.parameters()]
    assert not set(home) & set(there)
    networks.ready("transformer")
    assert [tensor.data_ptr() for tensor in high.parameters()] == there
    networks.ready("transformer_2")
    assert [tensor.data_ptr() for tensor in high.parameters()] == home and low is networks.ready("transformer_2")


@pytest.mark.parametrize("how", ["resident", "stream", "turns"])
def test_an_encoder_that_takes_turns_is_gone_while_experts_work(resolved: Resolved, tmp_path: Path, how: str) -> None:
    networks = networks_at(resolved, how, tmp_path)
    home = networks.model("text_encoder").shared.weight.data_ptr()
    assert networks.ready("text_encoder").shared.weight.data_ptr() != home
    networks.ready("transformer")
    assert networks.model("text_encoder").shared.weight.data_ptr() == home


SPLIT = {
    "text_encoder": "cpu", "transformer": "cpu", "transformer.blocks.1": "disk", "transformer_2": "disk",
    "transformer_2.blocks.0": "cpu",
}  # fmt: skip


def test_an_expert_split_over_cpu_and_disk_computes_the_same(micro_wan: Path, tmp_path: Path) -> None:
    work = Work(records=2, height=64, width=64)
    expected = predicted(loaded(micro_wan, tmp_path, work))
    split = loaded(micro_wan, tmp_path, work, prepared=tmp_path / "ready", placement=SPLIT)
    network = split._networks.model("transformer")
    assert network.hf_device_map["rope"] == "cpu", "it has only buffers, and wants a device all the same"
    assert all(parameter.is_meta for parameter in network.blocks[1].parameters())
    assert not any(parameter.is_meta for parameter in network.blocks[0].parameters())
    for mine, other in zip(predicted(split), expected, strict=True):
        assert torch.equal(mine, other)


def test_a_plan_is_said_before_a_weight_is_read(micro_wan: Path) -> None:
    config = TeacherConfig(folder=micro_wan, device="cpu", placement="swap")
    with pytest.raises(Refused, match="swap tried"):
        placement_of(config, resolve(micro_wan, "auto"), Work())
    told = placement_of(TeacherConfig(folder=micro_wan, device="cpu"), resolve(micro_wan, "auto"), Work()).lines()
    assert told[0].startswith("cpu") and len(told) == 5 and facts_of(resolve(micro_wan, "auto")).boundary == 0.875


def test_the_page_says_what_the_planner_says() -> None:
    from tests.placement_page import PAGE, text

    assert PAGE.read_text(encoding="utf-8") == text(), "python -m tests.placement_page > docs/placement.md"


PRESETS = {
    "least_memory": (1, 16, 64, "stream"),
    "balanced": (4, 24, 128, "balanced"),
    "fastest_start": (1, 80, 128, "replicate"),
    "many_gpus": (8, 80, 512, "replicate"),
}


def test_the_presets_fit_the_machines_that_they_are_for() -> None:
    from common.config import load_config
    from harvest.config import HarvestConfig
    from harvest.loading.measure import wish_of
    from harvest.teacher import work_of
    from tests.placement_page import true_needs, true_shapes, true_sizes

    sizes = true_sizes(torch.bfloat16, true_shapes())
    for name, (num_gpus, gpu, host, expected) in PRESETS.items():
        config = load_config(HarvestConfig, Path(f"configs/harvest/wan22_{name}.yaml"))
        machine = Machine(gpus={f"cuda:{n}": gpu * GB for n in range(num_gpus)}, host=host * GB)
        wish = wish_of(config.teacher, true_needs(torch.bfloat16, work_of(config)))
        assert place(sizes, machine, wish).strategy == expected
        assert (config.workers == 1) == (name == "balanced")


def test_the_fp16_preset_harvests_from_fp16_files_in_float16(tmp_path: Path) -> None:
    """All but paths and counts as it is shipped."""
    from common.config import load_config
    from common.shards import ShardSet
    from harvest.config import HarvestConfig
    from tests.made import harvest_here

    folder = write_micro_wan(tmp_path / "wan", variant="fp16")
    changes = [f"out={tmp_path / 'set'}", f"teacher.folder={folder}", "prompts.limit=2", "height=64", "width=64",
               "steps=4", "keep=4", "workers=1"]  # fmt: skip
    config = load_config(HarvestConfig, Path("configs/harvest/wan22_fp16.yaml"), overrides=changes)
    shards = ShardSet.open(harvest_here(config))
    assert shards.contract.compute_dtype == "float16" and shards.manifest().num_records == 2
    resolved = resolve(folder, config.teacher.variant)
    assert all(part.variant == "fp16" for part in resolved.components.values() if part.files)
    expert = load_model(resolved.components["transformer"], torch.float16)
    assert {p.dtype for p in expert.blocks[0].norm2.parameters()} == {torch.float32}
    assert {p.dtype for p in expert.blocks[0].ffn.parameters()} == {torch.float16}


def test_the_older_options_are_taken_with_a_notice(tmp_path: Path, micro_wan: Path) -> None:
    from tests.harvest.test_resume import as_file
    from tests.made import command, harvest_config

    config = harvest_config(tmp_path / "set", micro_wan, prompts={"limit": 1})
    words = ("harvest", "run", as_file(config, tmp_path / "c.yaml"), "--teacher_on_cpu")
    refused = command(*words, "--teacher_device_strategy", "sideways")
    assert refused.returncode == 2 and "teacher.placement" in refused.stderr and "sideways" in refused.stderr
    done = command(*words, "--teacher_device_strategy", "cpu", "--teacher_dtype", "bf16")
    assert done.returncode == 0, done.stderr
    for word in ("teacher.placement=cpu", "teacher.device=cpu", "teacher.dtype=bfloat16"):
        assert f"WanDistiller's: taken as --set {word}" in done.stderr
    assert "in bfloat16" in done.stderr


@pytest.fixture(params=["replicate", "swap", "stream"])
def on_gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_on_a_gpu_every_way_computes_the_same(micro_wan: Path, tmp_path: Path, on_gpu: str) -> None:
    work = Work(records=2, height=64, width=64)
    expected = predicted(loaded(micro_wan, tmp_path, work))
    for mine, other in zip(predicted(loaded(micro_wan, tmp_path, work, device="cuda:0", placement=on_gpu)), expected,
                           strict=True):  # fmt: skip
        assert torch.allclose(mine.cpu(), other, atol=1e-3, rtol=1e-3)
