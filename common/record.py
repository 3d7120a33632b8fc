"""What is stored, and what it means.

    Record     one prompt with one seed at one size, and K points of the teacher's path for it
    Contract   what every record of a set means: another contract is another set
    Numerics   how the arithmetic was done: it moves last bits, not meaning

A new field of a record is declared here, once, and then in the formats (common/shards_*.py).
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import Refused

FORMAT_VERSION = 1
BOTH, GUIDED = "both", "guided"
POINT_FIELDS = {BOTH: ("latents", "cond", "uncond"), GUIDED: ("latents", "guided")}
"""What a contract says of branches -> the arrays of a point, in the order in which they are stored."""

SAID_LATER = {"branches": BOTH, "vae": ""}
"""What contracts did not say from the beginning -> what they mean without it."""

Array = NDArray[Any]


def record_key(prompt: str, seed: int, height: int, width: int) -> str:
    """A record's identity: a function of what was asked for, never of when or where."""
    return hashlib.sha256(f"{prompt}\n{seed}\n{height}x{width}".encode()).hexdigest()[:16]


def item_id(keys: list[str]) -> str:
    """A work item's identity: the hash of its keys."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """One prompt with one seed at one size, and K points of its trajectory."""

    key: str
    prompt: str
    """Cleaned by the contract's rule."""
    seed: int
    height: int
    width: int
    text: Array  # [L, D], not padded
    timesteps: Array  # [K] float32, exactly as fed
    sigmas: Array  # [K] float32
    expert: Array  # [K] uint8, 0 = transformer (high noise), 1 = transformer_2
    latents: Array  # [K, C, H, W], what the teacher saw
    cond: Array | None = None  # [K, C, H, W]
    uncond: Array | None = None  # [K, C, H, W]
    guided: Array | None = None  # [K, C, H, W], where only the combination is kept; then the two others are not there
    final: Array  # [C, H, W], the end point

    def __post_init__(self) -> None:
        num_points = len(self.timesteps)
        assert self.timesteps.dtype == self.sigmas.dtype == np.float32, "timesteps and sigmas are float32, never half"
        assert self.point_fields in POINT_FIELDS.values(), "cond and uncond, or guided alone"
        assert {getattr(self, name).shape for name in self.point_fields} == {(num_points, *self.final.shape)}
        assert len(self.sigmas) == len(self.expert) == num_points

    @property
    def point_fields(self) -> tuple[str, ...]:
        """The arrays that its points have."""
        return tuple(name for name in ("latents", "cond", "uncond", "guided") if getattr(self, name) is not None)

    def combination(self, contract: "Contract") -> Array:  # [K, C, H, W] float32
        """The guided prediction at the set's own w, whether it is stored or what it is made of."""
        if self.guided is not None:
            return self.guided.astype(np.float32, copy=False)
        assert self.cond is not None and self.uncond is not None
        w = np.asarray(contract.guidance, np.float32)[self.expert][:, None, None, None]
        uncond = self.uncond.astype(np.float32, copy=False)
        combined: Array = uncond + w * (self.cond.astype(np.float32, copy=False) - uncond)
        return combined

    def digest(self) -> str:
        """sha256 over the fields that are there in declared order, each name|dtype|shape|little-endian bytes."""
        running = hashlib.sha256()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            array = np.frombuffer(value.encode(), np.uint8) if isinstance(value, str) else np.asarray(value)
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            running.update(f"{field.name}|{array.dtype.str}|{'x'.join(map(str, array.shape))}|".encode())
            running.update(array.tobytes())
        return running.hexdigest()

    def bad_field(self, dtype: np.dtype[Any]) -> str | None:
        """The first array that would hold NaN or Inf in `dtype`, with its point; None when all is finite."""
        for name in ("text", *self.point_fields, "final"):
            array = getattr(self, name)
            finite = np.abs(array) <= np.finfo(dtype).max
            if not finite.all():
                if array.ndim != 4:
                    return name
                point = int(np.argmin(finite.all(axis=(1, 2, 3))))
                return f"{name}[{point}] (t={self.timesteps[point]:.1f}, expert {self.expert[point]})"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What every record of a set means."""

    format_version: int = FORMAT_VERSION
    teacher: str
    """Class of the network, e.g. WanTransformer3DModel."""
    weights: str
    """Fingerprint over the loaded tensors after the dtype policy, sorted by name."""
    text_encoder: str
    tokenizer: str
    text_cleaning: str
    text_length: int
    """Rows that the teacher attends to, padding included."""
    text_padding: str
    """zeros: rows beyond a prompt's own are zero, attended without a mask; tokens: padding is text like any other."""
    text_dim: int
    prediction: str
    """flow | epsilon | v | x0, see common/schedule.py."""
    noise: str
    """flow, or `vp1 SCHEDULE BETA_START BETA_END`: see common/schedule.py. Older sets say `vp`: their walks began
    at a + b times the seed's noise, not at it."""
    train_steps: int
    shift: float
    boundary: float | None
    """Share of train_steps at and above which the high-noise expert serves."""
    guidance: tuple[float, ...]
    """Per expert."""
    negative_prompt: str
    latent_channels: int
    latent_stride: int
    latent_patch: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    latent_dtype: str
    """The state is rounded to it at every step before the teacher sees it."""
    source: str
    """Where the states come from. trajectory: the teacher's own path; renoise: its end point under fresh noise."""
    solver: str
    """euler, or the folder's own scheduler: its class, then its settings."""
    jitter: bool
    steps: int
    keep: int
    keep_at: tuple[int, ...]
    compute_dtype: str
    encoding: str
    """float16 | float32 | int8-block64, see common/encoding.py: how points are stored."""
    # What contracts did not say from the beginning: without it they mean its default, which is never written, so that
    # a set's digest is what it was.
    branches: str = BOTH
    """both: a point holds cond and uncond; guided: their combination at `guidance` alone."""
    vae: str = ""
    """Fingerprint of what made states of pictures (source: images), in float32; empty: of no picture, or not said."""

    def to_json(self) -> bytes:
        return json.dumps(self._said(), indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        values: dict[str, Any] = json.loads(data)
        odd = (set(values) ^ {field.name for field in dataclasses.fields(cls)}) - set(SAID_LATER)
        branches = values.get("branches", BOTH)
        if values.get("format_version") != FORMAT_VERSION or odd or branches not in tuple(POINT_FIELDS):
            raise Refused(
                wrong="contract.json is of another format",
                found=f"version {values.get('format_version')}, odd fields {sorted(odd)}, branches {branches!r}",
                mend=f"read it with the release that wrote it; this one knows version {FORMAT_VERSION}",
            )
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)

    def digest(self) -> str:
        canonical = json.dumps(self._said(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _said(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items()
                if name not in SAID_LATER or value != SAID_LATER[name]}  # fmt: skip

    def difference(self, other: "Contract") -> list[str]:
        """An older set does not say its VAE: then any is the same."""
        return _difference(self, other if self.vae else dataclasses.replace(other, vae=""))

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """Of texts and end points, and of the fields where they are stored as they are."""
        return np.dtype("float32" if self.encoding == "float32" else "float16")

    @property
    def point_fields(self) -> tuple[str, ...]:
        """The arrays of a point: what is said of them anywhere is derived from here."""
        return POINT_FIELDS[self.branches]

    def num_experts(self) -> int:
        return 1 if self.boundary is None else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How the arithmetic was done. Two shards of one set may differ in it; `status` says so."""

    micro_batch: int
    batched_guidance: bool
    """cond and uncond in one forward."""
    collapsed_padding: bool
    attention: str
    device: str
    threads: int
    torch: str
    diffusers: str
    # What receipts did not say from the beginning: without it they mean its default.
    sdpa: str = ""
    """Kernels of torch's attention, `+` between those of different layers; empty: not written down."""
    encoder: str = ""
    """Where prompts were encoded; empty: on `device`."""
    compiled: bool = False
    """The repeated blocks, by torch.compile."""

    def difference(self, other: "Numerics") -> list[str]:
        """What is known to differ: where one side does not say its kernels, nothing is."""
        known = self if self.sdpa and other.sdpa else dataclasses.replace(self, sdpa=other.sdpa)
        return _difference(known, other)


def _difference(mine: Any, theirs: Any) -> list[str]:
    """Field by field: `name: mine | theirs`."""
    pairs = ((field.name, getattr(mine, field.name), getattr(theirs, field.name)) for field in dataclasses.fields(mine))
    return [f"{name}: {a!r} | {b!r}" for name, a, b in pairs if a != b]
