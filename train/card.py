"""What a student says of itself to a stranger: a model card with its provenance and how to open it."""

import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.record import Contract
from train.objective import Objective
from train.student.config import StudentConfig

PACKAGE = "wan-lite"


def card(student: StudentConfig, contract: Contract, use: str, provenance: Mapping[str, str]) -> str:
    """Markdown, with the front matter that model hubs read; `use` is one of the next two."""
    return f"""---
license: {provenance["license"]}
pipeline_tag: text-to-image
tags: [wan-lite, distilled]
---

# A Wan-Lite student

A 2D, image-only transformer of {student.num_layers} blocks and {student.width} channels, distilled from what a
{contract.teacher} said. Latents of {contract.latent_channels} channels, stride {contract.latent_stride}.

{use}

{_table(provenance)}
"""


def adapter_card(provenance: Mapping[str, str]) -> str:
    """Of low-rank adapters: nothing without the weights that they were trained beside."""
    return f"""---
license: {provenance["license"]}
library_name: peft
tags: [wan-lite, distilled, lora]
---

# Adapters of a Wan-Lite student

They belong beside the init whose model.safetensors has the sha256 below:

```python
from pathlib import Path
from peft import PeftModel
from train.student.network import load_student

student = PeftModel.from_pretrained(load_student(Path("the init")), "this folder")
```

{_table(provenance)}
"""


def _table(provenance: Mapping[str, str]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in provenance.items())
    return f"| provenance | |\n|---|---|\n{rows}"


def plain_use(student: StudentConfig) -> str:
    told = ", guidance" if student.guidance_embeds else ""
    return f"""```python
from pathlib import Path
from train.student.network import load_student

student = load_student(Path("this folder")).eval()
velocity = student(latents, timesteps, text, lengths{told})     # see train/student/network.py
```"""


def pipeline_use(objective: Objective, *, has_text_encoder: bool) -> str:
    walk = objective.grid(None)
    parts = "" if has_text_encoder else ", text_encoder=..., tokenizer=..."
    lines = ["from diffusers import WanPipeline", "", f'pipe = WanPipeline.from_pretrained("this folder"{parts})']
    if objective.spans is not None:
        sigmas = [round(float(sigma), 7) for sigma in walk.sigmas[:-1]]
        lines += [
            f"walk, sigmas = pipe.scheduler.set_timesteps, {sigmas}",
            "pipe.scheduler.set_timesteps = lambda num, device=None: walk(sigmas=sigmas, device=device)",
        ]
    lines.append(
        f'pipe("...", num_frames=1, guidance_scale=1.0, num_inference_steps={walk.num_steps}, height=..., width=...)'
    )
    code = "\n".join(["```python", *lines, "```"])
    many = "as many steps as you like" if objective.spans is None else f"these {walk.num_steps} steps and no others"
    return f"Guidance is inside: `guidance_scale=1.0`, and {many}.\n\n{code}"


def code_version() -> str:
    """The release, and the commit where this is a checkout."""
    try:
        release = version(PACKAGE)
    except PackageNotFoundError:
        release = "unreleased"
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(words, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{PACKAGE} {release}" + (f" ({commit})" if commit else "")
