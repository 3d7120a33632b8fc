"""Wan as a teacher of single frames: Wan 2.2 T2V A14B (two experts), Wan 2.1 (one), through diffusers' own networks.

Text is zero-padded to the encoder's length and attended without a mask, as the stock pipeline does it. At one frame
the latents' time axis has length one; it exists only inside `predict`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import Refused
from common.log import Log, gpu_label
from common.schedule import HIGH_NOISE, expert_of
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.folder import Resolved, read_json
from harvest.loading import fingerprint, fingerprint_files, load_model, load_tokenizer
from harvest.prepare import from_prepared, prepare
from harvest.teacher import Fingerprints, TeacherFacts

EXPERTS = ("transformer", "transformer_2")
TEXT_LENGTH = 512
"""The stock pipeline's default; it stands in no file of the folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Padded text of a micro-batch."""

    cond: Tensor  # [B, 512, D]
    uncond: Tensor  # [B, 512, D]


class WanTeacher:
    """Implements harvest.teacher.Teacher."""

    attention = "sdpa"

    def __init__(self, *, facts: TeacherFacts, tokenizer: Any, text_encoder: Any, experts: list[Any], device: str,
                 dtype: torch.dtype, fingerprints: Fingerprints, batched_guidance: bool) -> None:  # fmt: skip
        self.facts, self.fingerprints, self.device = facts, fingerprints, device
        self.compute_dtype = str(dtype).removeprefix("torch.")
        self._tokenizer, self._text_encoder, self._experts = tokenizer, text_encoder, experts
        self._dtype, self._batched_guidance = dtype, batched_guidance

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        return [self._encode_one(prompt) for prompt in prompts]

    def condition(self, texts: list[Tensor], negative: Tensor) -> Condition:
        return Condition(cond=self._padded(texts), uncond=self._padded([negative] * len(texts)))

    @torch.inference_mode()
    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        expert = self._expert_for(timesteps)
        video = latents.to(self.device, self._dtype).unsqueeze(2)  # [B, C, 1, H, W]
        timesteps = timesteps.to(self.device)
        if self._batched_guidance:
            text = torch.cat([condition.cond, condition.uncond])
            both = self._forward(expert, torch.cat([video, video]), torch.cat([timesteps, timesteps]), text)
            cond, uncond = both.chunk(2)
            return cond, uncond
        return (
            self._forward(expert, video, timesteps, condition.cond),
            self._forward(expert, video, timesteps, condition.uncond),
        )

    def _forward(self, expert: Any, video: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        out: Tensor = expert(hidden_states=video, timestep=timesteps, encoder_hidden_states=text, return_dict=False)[0]
        return out.squeeze(2).float()

    def _expert_for(self, timesteps: Tensor) -> Any:
        which = set(
            expert_of(timesteps.cpu().numpy(), self.facts.boundary, train_steps=self.facts.train_steps).tolist()
        )
        assert len(which) == 1, "one micro-batch is on one side of the boundary"
        return self._experts[0 if which == {HIGH_NOISE} else 1]

    def _encode_one(self, prompt: str) -> Tensor:
        tokens = self._tokenizer(
            [prompt],
            padding="max_length",
            max_length=self.facts.text_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self.device)
        hidden = self._text_encoder(tokens.input_ids.to(self.device), mask).last_hidden_state
        rows: Tensor = hidden[0, : int(mask.sum())].float().cpu()
        return rows

    def _padded(self, texts: list[Tensor]) -> Tensor:
        padded = torch.zeros(len(texts), self.facts.text_length, self.facts.text_dim)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = text
        return padded.to(self.device, self._dtype)


def facts_of(resolved: Resolved) -> TeacherFacts:
    """Everything the contract wants of a Wan folder, from its JSON files."""
    network, vae = resolved.components["transformer"].config, resolved.components["vae"].config
    if resolved.scalars.get("expand_timesteps"):
        raise Refused(
            wrong="a teacher with per-token timesteps is not read yet",
            found=str(resolved.folder),
            mend="use Wan 2.1 or 2.2 T2V A14B",
        )
    boundary = resolved.scalars.get("boundary_ratio") if EXPERTS[1] in resolved.components else None
    settings = read_json(resolved.components["scheduler"].folder / "scheduler_config.json")
    return TeacherFacts(
        teacher=resolved.components["transformer"].class_name,
        text_length=TEXT_LENGTH,
        text_padding="zeros",
        text_dim=network["text_dim"],
        prediction="flow",
        train_steps=settings["num_train_timesteps"],
        shift=float(settings.get("flow_shift") or settings.get("shift") or 1.0),
        boundary=boundary,
        latent_channels=network["in_channels"],
        latent_stride=vae.get("scale_factor_spatial") or 8,
        latent_patch=network["patch_size"][1],
        latent_mean=tuple(vae["latents_mean"]),
        latent_std=tuple(vae["latents_std"]),
    )


def load(config: TeacherConfig, resolved: Resolved, watch: Watch, log: Log) -> WanTeacher:
    """The whole teacher in memory: text encoder, then the experts, one at a time."""
    device, dtype = choose_device(config.device), choose_dtype(config.dtype, config.device)
    if config.prepared is not None:
        watch.moved(preparing=str(config.prepared))
        resolved = from_prepared(resolved, prepare(resolved, config.prepared, dtype, log))
    log.say(f"teacher {resolved.folder} on {device_name(device)} in {str(dtype)[6:]}: {resolved.summary()}")
    models = {}
    for name in ("text_encoder", *(expert for expert in EXPERTS if expert in resolved.components)):
        watch.moved(loading=name)
        models[name] = load_model(resolved.components[name], dtype, moved=watch.moved).to(device)
    experts = [models[name] for name in EXPERTS if name in models]
    encoder = models["text_encoder"]
    _require_embeddings(encoder)
    watch.moved(loading="fingerprints")
    fingerprints = Fingerprints(
        weights=fingerprint(experts),
        text_encoder=fingerprint([encoder]),
        tokenizer=fingerprint_files(path for path in (resolved.folder / "tokenizer").iterdir() if path.is_file()),
    )
    return WanTeacher(
        facts=facts_of(resolved),
        tokenizer=load_tokenizer(resolved.components["tokenizer"]),
        text_encoder=encoder,
        experts=experts,
        device=device,
        dtype=dtype,
        fingerprints=fingerprints,
        batched_guidance=config.batched_guidance,
    )


def choose_device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """For people: an index alone means nothing under CUDA_VISIBLE_DEVICES."""
    if not device.startswith("cuda"):
        return device
    index = torch.device(device).index or 0
    return gpu_label(index=index, uuid=str(torch.cuda.get_device_properties(index).uuid), rank=0)


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """bfloat16 where the hardware has it: Wan and its text encoder degrade in float16."""
    if wanted != "auto":
        chosen: torch.dtype = getattr(torch, wanted)
        return chosen
    if choose_device(device) == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _require_embeddings(encoder: Any) -> None:
    """An encoder whose file lacks the embeddings gets random ones without a word where they are tied."""
    embeddings = encoder.get_input_embeddings().weight
    if not bool(torch.isfinite(embeddings).all()) or not bool(embeddings.any()):
        raise Refused(
            wrong="the text encoder's embeddings are empty", found="zeros or NaN", mend="fetch text_encoder again"
        )
