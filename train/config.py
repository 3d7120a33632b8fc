"""What a training run can be told. configs/train/ holds complete, commented files.

What the set says of itself (channels, text, guidance, shift) is read from it, never told here.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from common.config import Section


class TrainConfig(Section):
    set: Path
    """The shard set; partial is fine, what is committed at an epoch's start is that epoch."""
    init: Path
    """What `python -m train init` wrote."""
    out: Path
    """The run: epochs, checkpoints, metrics, pictures."""
    num_epochs: float = Field(default=10, gt=0)
    """Length of the run in passes over what the set holds at its start."""
    objective: Literal["output", "segment"] = "output"
    """See train/objective.py."""
    segments: PositiveInt | None = None
    """Of objective: segment, and the steps of the student's walk; None: one from each stored point to the next."""
    batch_size: PositiveInt = 32
    """Per process and forward."""
    global_batch: PositiveInt | None = None
    """Samples per optimizer step over all processes; None: batch_size x processes, at the run's first start."""
    lr: float = Field(default=1e-3, gt=0)
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 50
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    ema_on_host: bool = False
    """The moving average in the memory of the CPU: the price is one copy of the weights a step."""
    guidance: tuple[float, ...] | None = None
    """w of the target uncond + w (cond - uncond), per expert; None: the set's own; 1: no guidance."""
    level_shares: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] | None = None
    """Of the loss, for the four quarters of sigma from low to high; None: as the harvest put its points."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward; weights, optimizer and EMA are float32. float16 scales the loss."""
    gradient_checkpointing: bool = False
    """Blocks are computed again in the backward pass: a third more time for much less memory."""
    sharded_optimizer: bool = False
    """Each process holds the optimizer's moments of its part of the parameters; checkpoints are the same."""
    compile: bool = False
    """torch.compile of the student."""
    frozen: tuple[str, ...] = ()
    """Parameters whose names begin so stay as they are."""
    fit: Literal["exact", "auto"] = "exact"
    """auto: a batch_size that does not fit the memory is halved, at the same global batch."""
    seed: int = 0
    """Of the sample order."""
    checkpoint_every: PositiveInt = 500
    """Steps."""
    keep_checkpoints: PositiveInt = 2
    """The newest ones."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of so many steps are kept for ever."""
    save_samples: bool = False
    """Pictures while it trains, each beside its teacher's own."""
    sample_interval: PositiveInt = 1
    """Epochs between them."""
    sample_dir: Path | None = None
    """None: `samples` in the run."""
    sample_prompts: tuple[str, ...] | None = None
    """Prompts that the set holds; None: its first held-out ones."""
    log_every: PositiveInt = 20
    device: str = "auto"
    """auto: the GPUs that are visible, else the CPU; cpu | cuda | cuda:N."""
    processes: PositiveInt | None = None
    """Started by `train run` itself, one per GPU; None: all visible GPUs, or one on a CPU."""
    threads: PositiveInt | None = None
    reader: Literal["offset", "library"] = "offset"
    """library: through zarr-python and tarfile, slowly; archives are always read so."""
    read_workers: NonNegativeInt = 0
    """Processes that read ahead, per training process; 0: a thread of its own."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """skip: a good sample of the same micro-batch takes the place of a damaged one; counted and said."""
    deadline_s: float = Field(default=300.0, gt=0)
    """A stage that does not move for so long is reported with every thread's stack."""
