"""What the training side needs of the teacher's folder, left in the set once: it never needs the teacher.

assets/vae/                the VAE as it stands in the folder (config.json, safetensors)
assets/negative.npy        the negative text's rows
assets/scheduler.json      the folder's own scheduler settings
beside them: activations.safetensors (harvest/activations.py) and samples/ (harvest/samples.py)
"""

import io

import numpy as np

from common.files import pieces, write_atomic
from common.shards import ASSETS, ShardSet
from harvest.loading.folder import Resolved
from harvest.teacher import Teacher

VAE_CONFIG = f"{ASSETS}/vae/config.json"


def leave_assets(shards: ShardSet, resolved: Resolved, teacher: Teacher) -> None:
    """Idempotent: what is there is kept. The VAE's config.json comes last: without it, the folder is a part of one."""
    folder = shards.path / ASSETS
    if not (shards.path / VAE_CONFIG).exists():
        for path in [*resolved.components["vae"].files, resolved.folder / "vae" / "config.json"]:
            write_atomic(folder / "vae" / path.name, pieces(path))
    if not (folder / "negative.npy").exists():
        rows = teacher.encode([shards.contract.negative_prompt])[0].numpy().astype(shards.contract.storage_dtype)
        buffer = io.BytesIO()
        np.save(buffer, rows, allow_pickle=False)
        write_atomic(folder / "negative.npy", buffer.getvalue())
    if not (folder / "scheduler.json").exists():
        write_atomic(folder / "scheduler.json", (resolved.folder / "scheduler" / "scheduler_config.json").read_bytes())
