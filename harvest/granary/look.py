"""`harvest inspect SET KEY`: one record in numbers, and the picture that its teacher drew.

record, receipt = find(shards, "514fcb31")          a key, or the start of one
for line in describe(record, receipt, shards.contract): ...
picture(shards, record).save("514fcb31.png")        by the VAE in the set's assets: no teacher is needed
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from common.errors import BadUsage
from common.manifest import Receipt
from common.record import Contract, Record
from common.seals import sound
from common.shards import ASSETS, ShardSet
from common.tensor_file import weight_files
from harvest.running.health import rms


def find(shards: ShardSet, key: str) -> tuple[Record, Receipt]:
    """By the start of its key; no two may share it."""
    found = [
        (receipt, row)
        for receipt in shards.manifest().receipts
        for row, other in enumerate(shards.read(receipt).header.keys)
        if other.startswith(key)
    ]
    if len(found) != 1:
        some = ", ".join(shards.read(receipt).header.keys[row] for receipt, row in found[:3])
        raise BadUsage(wrong=f"no single record of {shards.path} is named {key}", found=f"{len(found)}: {some}",
                       mend="give its whole key, as in a shard's header or a quarantine note")  # fmt: skip
    ((receipt, row),) = found
    return shards.read(receipt).record(row), receipt


def describe(record: Record, receipt: Receipt, contract: Contract) -> Iterator[str]:
    yield f"key      {record.key} in item {receipt.item} ({receipt.stem}.{receipt.container.split('+')[0]})"
    yield f"prompt   {record.prompt}"
    yield f"seed     {record.seed}, {record.height}x{record.width}, {len(record.text)} text rows"
    columns = {name: getattr(record, name) for name in record.point_fields}
    moved = _moved(record, contract)
    heads = [*(f"{name:>8}" for name in columns), *([] if moved is None else [f"{'guidance':>9}"])]
    yield f"{'point':>5} {'t':>8} {'sigma':>8} expert {' '.join(heads)}"
    for point, (t, sigma, expert) in enumerate(zip(record.timesteps, record.sigmas, record.expert, strict=True)):
        sizes = [f"{rms(array[point]):8.4f}" for array in columns.values()]
        sizes += [] if moved is None else [f"{moved[point]:9.4f}"]
        yield f"{point:>5} {t:8.2f} {sigma:8.5f} {expert:>6} {' '.join(sizes)}"
    final = record.final.astype(np.float32)
    yield f"final    rms {rms(final):.4f}, from {final.min():.3f} to {final.max():.3f}"


def _moved(record: Record, contract: Contract) -> list[float] | None:
    """Per point, how far guidance moves the prediction, in sizes of uncond; None: it is not known any more."""
    if record.uncond is None:
        return None
    pairs = zip(record.combination(contract), record.uncond.astype(np.float32), strict=True)
    return [rms(guided - uncond) / rms(uncond) for guided, uncond in pairs]


def picture(shards: ShardSet, record: Record) -> Any:
    """A PIL image of the end point."""
    import torch
    from PIL import Image

    contract = shards.contract
    column = (-1, 1, 1)
    mean, std = (torch.tensor(numbers).view(column) for numbers in (contract.latent_mean, contract.latent_std))
    latents = torch.from_numpy(record.final.astype(np.float32)) * std + mean
    vae = _vae(shards)
    with torch.inference_mode():
        if "Wan" in type(vae).__name__:  # a video of one frame
            pixels = vae.decode(latents[None, :, None]).sample[0, :, 0]
        else:
            pixels = vae.decode(latents[None]).sample[0]
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(scaled.permute(1, 2, 0).numpy())


def _vae(shards: ShardSet) -> Any:
    import torch

    from harvest.loading.folder import Component, read_json
    from harvest.loading.weights import load_model

    folder = sound(shards.path / ASSETS, "vae")
    if not (folder / "config.json").exists():
        raise BadUsage(wrong=f"{shards.path} holds no VAE", found=f"no {folder}", mend="see the numbers without --out")
    config = read_json(folder / "config.json")
    files, variant = weight_files(folder, None), None
    if not files:
        files, variant = weight_files(folder, "fp16"), "fp16"
    part = Component(name="vae", library="diffusers", class_name=config["_class_name"], folder=folder, config=config,
                     variant=variant, files=files)  # fmt: skip
    return load_model(part, torch.float32)
