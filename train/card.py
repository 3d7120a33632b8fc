"""What a student says of itself to a stranger: a model card with its provenance and how to open it."""

import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.record import Contract
from train.objective import Objective
from train.student.config import StudentConfig

PACKAGE = "wan-lite"
STOCK_TEXT_ROWS = 512
"""What other programs feed of a prompt, padding included."""


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


def text_note(student: StudentConfig, contract: Contract) -> str:
    """What other programs would do otherwise with a prompt; empty: nothing."""
    if {student.text_max_length, student.text_length, contract.text_length} == {STOCK_TEXT_ROWS}:
        return ""
    return (f"It was trained on the first {student.text_max_length} text rows of a prompt, padded to "
            f"{student.text_length}; other programs feed the whole prompt, padded to {STOCK_TEXT_ROWS}.")  # fmt: skip


def pipeline_use(student: StudentConfig, objective: Objective, *, has_text_encoder: bool) -> str:
    walk = objective.grid(None)
    parts = "" if has_text_encoder else ", text_encoder=..., tokenizer=..."
    lines = ["from diffusers import WanPipeline", "", f'pipe = WanPipeline.from_pretrained("this folder"{parts})']
    prompt, note = '"..."', text_note(student, objective.contract)
    if note:
        prompt, note = "prompt_embeds=text", f" {note} The call below cuts them so."
        lines = ["import torch", *lines, *_cut_text(student, objective.contract)]
    if objective.spans is not None:
        sigmas = [round(float(sigma), 7) for sigma in walk.sigmas[:-1]]
        lines += [
            f"walk, sigmas = pipe.scheduler.set_timesteps, {sigmas}",
            "pipe.scheduler.set_timesteps = lambda num, device=None: walk(sigmas=sigmas, device=device)",
        ]
    lines.append(
        f"pipe({prompt}, num_frames=1, guidance_scale=1.0, num_inference_steps={walk.num_steps}, height=..., width=...)"
    )
    code = "\n".join(["```python", *lines, "```"])
    many = "as many steps as you like" if objective.spans is None else f"these {walk.num_steps} steps and no others"
    return f"Guidance is inside: `guidance_scale=1.0`, and {many}.{note}\n\n{code}"


def _cut_text(student: StudentConfig, contract: Contract) -> list[str]:
    """As train/sample.py feeds a record's text."""
    rows = max(contract.text_length, student.text_length)
    kept = "" if rows == student.text_length else f"[:, :{student.text_length}]"
    return [
        "with torch.no_grad():",
        f'    text = pipe.encode_prompt("...", do_classifier_free_guidance=False, max_sequence_length={rows})[0]{kept}',
        f"text[:, {student.text_max_length}:] = 0",
    ]


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
