"""What the training side needs of the teacher's folder, left in the set once: it never needs the teacher.

assets/vae/                the VAE as it stands in the folder (config.json, safetensors)
assets/negative.npy        the negative text's rows
assets/scheduler.json      the folder's own scheduler settings
beside them: activations.safetensors (harvest/activations.py), samples/ (harvest/samples.py), init/

Each file has its seal (common/seals.py).
"""

import io

import numpy as np

from common.errors import Partial
from common.files import pieces
from common.record import Contract
from common.seals import leave, remove, sealed_as
from common.shards import ASSETS, ShardSet
from harvest.loading.folder import Resolved
from harvest.teacher import Teacher

VAE, NEGATIVE, SCHEDULER = "vae", "negative.npy", "scheduler.json"
VAE_CONFIG = f"{ASSETS}/{VAE}/config.json"


def leave_assets(shards: ShardSet, resolved: Resolved, teacher: Teacher) -> None:
    """Idempotent: what is there is kept. The VAE's config.json comes last: without it, the folder is a part of one."""
    folder = shards.path / ASSETS
    if not (shards.path / VAE_CONFIG).exists():
        for path in [*resolved.components[VAE].files, resolved.folder / VAE / "config.json"]:
            leave(folder, f"{VAE}/{path.name}", pieces(path))
    if sealed_as(folder, NEGATIVE) is None:
        leave(folder, NEGATIVE, _negative(shards.contract, teacher))
    leave(folder, SCHEDULER, pieces(resolved.folder / "scheduler" / "scheduler_config.json"))


def leave_again(name: str, shards: ShardSet, resolved: Resolved, teacher: Teacher) -> None:
    """An asset that is damaged; the VAE as a whole."""
    kind = name.split("/")[0]
    if kind not in (VAE, NEGATIVE, SCHEDULER):
        raise Partial(wrong=f"{ASSETS}/{name} is damaged", found="nothing that the teacher's folder can say again",
                      mend="copy it from where it is sound, or remove it: who needs it says so")  # fmt: skip
    remove(shards.path / ASSETS, kind)
    leave_assets(shards, resolved, teacher)


def _negative(contract: Contract, teacher: Teacher) -> bytes:
    rows = teacher.encode([contract.negative_prompt])[0].numpy().astype(contract.storage_dtype)
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()
