"""A student in the forms that other tools open. Neither diffusers nor transformers is imported.

    export(run_or_checkpoint, out, form="diffusers", text_encoder=teacher_dir)

diffusers   a folder that stock WanPipeline opens: the student as `transformer`, the set's VAE, the scheduler that
            `train sample` walks; the text encoder's weights by link, or copied
comfyui     one safetensors file with the original Wan tensor names (heads of 128 channels, freq_dim 256)
wanlite     config.json and model.safetensors, sealed, as `train init` writes them: the next run's init
adapter     of a run with `lora`: the adapters alone, as peft opens them beside the run's init

Every other form has the adapters merged into its weights. A student that is told the guidance stays one as wanlite;
for other programs, which tell nothing, one w is baked in. All of them say where they come from: teacher, contract,
training, licence.
"""

from pathlib import Path
from typing import Literal

from safetensors.torch import save

from common.errors import BadUsage
from common.files import write_atomic, write_folder
from common.seals import seals_of
from common.wan_names import original_name
from train.card import adapter_card, plain_use, text_note
from train.finished import Finished, at_one_guidance, read_finished, with_time
from train.guidance import refuse_guidance
from train.lora import adapter_files
from train.pipeline import write_pipeline
from train.student.network import StudentConfig, student_files

Form = Literal["diffusers", "comfyui", "wanlite", "adapter"]
COMFY_HEAD_DIM, COMFY_FREQ_DIM = 128, 256


def export(source: Path, out: Path, *, form: Form, averaged: bool = True, guidance: float | None = None,
           text_encoder: Path | None = None, copy: bool = False, license_name: str = "unknown") -> str:  # fmt: skip
    """`source` is a run (its newest checkpoint) or a checkpoint; `averaged`: its EMA, else the raw weights; `guidance`:
    the w that is baked in. Returns what its user must know of prompts, or nothing."""
    if out.exists():
        raise BadUsage(wrong="--out exists", found=str(out), mend="give another name, or remove it")
    if form != "diffusers" and (text_encoder is not None or copy):
        raise BadUsage(wrong="--text-encoder and --copy", found=f"the form {form}, which holds no text encoder",
                       mend="leave them away, or --format diffusers")  # fmt: skip
    finished = read_finished(source, averaged=averaged, license_name=license_name)
    if form == "adapter":
        refuse_guidance(guidance)
        _write_adapter(finished, out)
        return ""
    if guidance is not None or form != "wanlite":
        finished = at_one_guidance(finished, guidance)
    if form == "wanlite":
        files = student_files(finished.student, finished.weights, **finished.provenance)
        card = finished.card(plain_use(finished.student)).encode()
        write_folder(out, {**files, **seals_of(files), "README.md": card})
        return ""
    if form == "comfyui":
        _refuse_what_comfyui_cannot_open(finished.student)
        named = {original_name(name): tensor for name, tensor in with_time(finished.weights).items()}
        write_atomic(out, save(named, metadata={"format": "pt", **finished.provenance}))
    else:
        write_pipeline(finished, out, text_encoder, copy=copy)
    return text_note(finished.student, finished.contract)


def _write_adapter(finished: Finished, out: Path) -> None:
    if finished.lora is None:
        raise BadUsage(wrong="--adapter wants a run with `lora`", found="a run that trained the student itself",
                       mend="leave --adapter away")  # fmt: skip
    files = adapter_files(finished.adapters, finished.lora)
    write_folder(out, {**files, "README.md": adapter_card(finished.provenance).encode()})


def _refuse_what_comfyui_cannot_open(student: StudentConfig) -> None:
    """It derives the heads from the width, 128 channels each, and expects Wan's own timestep embedding."""
    if student.head_dim != COMFY_HEAD_DIM or student.freq_dim != COMFY_FREQ_DIM:
        raise BadUsage(
            wrong="ComfyUI opens Wan models of 128 channels a head and freq_dim 256 only",
            found=f"{student.head_dim} and {student.freq_dim}",
            mend="export --format diffusers, or train a student of such heads",
        )
