"""Stable Diffusion 1.x and 2.x as a teacher: a UNet that predicts epsilon or v on a variance-preserving process.

The proof that the Protocol is one. Its text is 77 tokens, padding included: all of them are attended, so all are kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import Refused
from common.log import Log
from common.schedule import VP_SCHEDULES
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.loading.folder import Resolved, read_json, scheduler_told
from harvest.loading.kernels import Ask
from harvest.loading.measure import TEXT_ENCODER, Needs, tile_bytes
from harvest.loading.parts import Parts, choose_dtype, count_tokens, dtype_name, load_parts
from harvest.loading.transfer import sent
from harvest.teacher import ExpertListener, TeacherFacts, Work

UNET = "unet"
SCALING_FACTOR = 0.18215
"""Of the VAE, where its folder is older than the entry."""
KINDS = {"epsilon": "epsilon", "v_prediction": "v"}


@dataclass(frozen=True, slots=True)
class Condition:
    cond: Tensor  # [B, 77, D]
    uncond: Tensor  # [B, 77, D]


class SdTeacher:
    """Implements harvest.teacher.Teacher."""

    attention = "sdpa"
    listener: ExpertListener | None = None
    """A Wan-Lite is not cut from a UNet: it is never told anything."""

    def __init__(self, facts: TeacherFacts, parts: Parts, *, batched_guidance: bool) -> None:
        self.facts, self.fingerprints, self.device = facts, parts.fingerprints, parts.device
        self.compute_dtype, self._dtype = dtype_name(parts.dtype), parts.dtype
        self._tokenizer, self._networks, self._batched_guidance = parts.tokenizer, parts.networks, batched_guidance
        self._kernels, self.sdpa, self.in_flight = parts.kernels, parts.kernels.told, parts.networks.in_flight
        self.encoder_device = parts.networks.device_of(TEXT_ENCODER)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        return [self._encode_one(prompt) for prompt in prompts]

    def make_room(self) -> None:
        self._networks.make_room()

    def count_tokens(self, prompts: list[str]) -> list[int]:
        return count_tokens(self._tokenizer, prompts)

    def condition(self, texts: list[Tensor], negative: Tensor) -> Condition:
        cond, uncond = torch.stack(texts), torch.stack([negative] * len(texts))
        return Condition(*(sent(text.to(self._dtype), self.device) for text in (cond, uncond)))

    @torch.inference_mode()
    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        latents, timesteps = latents.to(self.device, self._dtype), sent(timesteps, self.device)
        if self._batched_guidance:
            text = torch.cat([condition.cond, condition.uncond])
            cond, uncond = self._forward(torch.cat([latents] * 2), torch.cat([timesteps] * 2), text).chunk(2)
            return cond, uncond
        return self._forward(latents, timesteps, condition.cond), self._forward(latents, timesteps, condition.uncond)

    def _forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        unet = self._networks.ready(UNET)
        self._kernels.compile(unet)
        with self._kernels.at_work():
            out: Tensor = unet(latents, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        return out.float()

    def _encode_one(self, prompt: str) -> Tensor:
        tokens = self._tokenizer(
            [prompt], padding="max_length", max_length=self.facts.text_length, truncation=True, return_tensors="pt"
        )
        device, encoder = self._networks.device_of(TEXT_ENCODER), self._networks.ready(TEXT_ENCODER)
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        rows: Tensor = encoder(tokens.input_ids.to(device), attention_mask=mask)[0][0].float().cpu()
        return rows


def facts_of(resolved: Resolved) -> TeacherFacts:
    """Everything the contract wants of a Stable Diffusion folder, from its JSON files."""
    unet, vae = resolved.components[UNET].config, resolved.components["vae"].config
    settings = read_json(resolved.components["scheduler"].folder / "scheduler_config.json")
    kind = settings.get("prediction_type", "epsilon")
    if kind not in KINDS:
        raise Refused(wrong="a UNet of this prediction is not known", found=kind, mend=f"use one of {', '.join(KINDS)}")
    _refuse_other_betas(settings)
    channels = unet["in_channels"]
    betas = f"{settings['beta_schedule']} {settings['beta_start']:g} {settings['beta_end']:g}"
    return TeacherFacts(
        teacher=resolved.components[UNET].class_name,
        text_length=resolved.components[TEXT_ENCODER].config["max_position_embeddings"],
        text_padding="tokens",
        text_dim=unet["cross_attention_dim"],
        prediction=KINDS[kind],
        noise=f"vp1 {betas}",
        train_steps=settings["num_train_timesteps"],
        shift=1.0,
        boundary=None,
        latent_channels=channels,
        latent_stride=2 ** (len(vae["block_out_channels"]) - 1),
        latent_patch=2 ** (len(unet["block_out_channels"]) - 1),  # what the UNet's own halvings want
        latent_mean=(0.0,) * channels,
        latent_std=(1.0 / vae.get("scaling_factor", SCALING_FACTOR),) * channels,
        scheduler=scheduler_told(settings),
    )


def _refuse_other_betas(settings: dict[str, Any]) -> None:
    odd = {name: settings[name] for name in ("trained_betas", "rescale_betas_zero_snr") if settings.get(name)}
    if settings["beta_schedule"] not in VP_SCHEDULES:
        odd["beta_schedule"] = settings["beta_schedule"]
    if odd:
        raise Refused(wrong="the scheduler's noise levels are not ones that are known", found=str(odd)[:200],
                      mend=f"a teacher of beta_schedule {' or '.join(VP_SCHEDULES)} without these")  # fmt: skip


def networks_of(resolved: Resolved) -> tuple[str, ...]:
    return (TEXT_ENCODER, UNET)


def attention_of(config: TeacherConfig, resolved: Resolved, work: Work) -> tuple[Ask, ...]:
    """Of each level that attends: of its positions among themselves, and to the text."""
    unet, facts = resolved.components[UNET].config, facts_of(resolved)
    rows, side = work.records * (2 if config.batched_guidance else 1), facts.latent_stride
    told = unet["attention_head_dim"]  # what diffusers calls so is the number of heads
    asks = []
    for level, (kind, width) in enumerate(zip(unet["down_block_types"], unet["block_out_channels"], strict=True)):
        if "CrossAttn" in kind:
            heads = told if isinstance(told, int) else told[level]
            positions = (work.height // side >> level) * (work.width // side >> level)
            asks += [Ask(rows=rows, queries=positions, keys=keys, heads=heads, dim=width // heads)
                     for keys in (positions, facts.text_length)]  # fmt: skip
    return tuple(asks)


def work_bytes(config: TeacherConfig, resolved: Resolved, work: Work, dtype: torch.dtype) -> int:
    """What a forward needs beside the weights: the skips of the way down and the widest moment of a block."""
    rows = work.records * (2 if config.batched_guidance else 1)
    stride, channels = facts_of(resolved).latent_stride, resolved.components[UNET].config["block_out_channels"][0]
    return int(rows * (work.height // stride) * (work.width // stride) * channels * 40 * dtype.itemsize)


def needs_of(config: TeacherConfig, resolved: Resolved, work: Work, dtype: torch.dtype) -> Needs:
    facts = facts_of(resolved)
    return Needs(
        work_bytes=work_bytes(config, resolved, work, dtype),
        text_bytes=work.records * 2 * facts.text_length * facts.text_dim * dtype.itemsize,
        tile_bytes=tile_bytes(resolved, work),
        attention=attention_of(config, resolved, work),
    )


def load_teacher(config: TeacherConfig, resolved: Resolved, watch: Watch, log: Log, work: Work) -> SdTeacher:
    dtype = choose_dtype(config.dtype, config.device)
    needs = needs_of(config, resolved, work, dtype)
    parts = load_parts(config, resolved, networks_of(resolved), watch, log, needs)
    return SdTeacher(facts_of(resolved), parts, batched_guidance=config.batched_guidance)
