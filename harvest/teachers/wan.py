"""Wan as a teacher of single frames: Wan 2.2 T2V A14B (two experts), Wan 2.1 (one), TI2V 5B (one, a timestep per
token), through diffusers' own networks.

Text is zero-padded to the encoder's length and attended without a mask, as the stock pipeline does it; the padding may
be collapsed (wan_attention). At one frame
the latents' time axis has length one; it exists only inside `predict`.
"""

from typing import Any

import torch
from torch import Tensor

from common.errors import Refused
from common.log import Log
from common.schedule import HIGH_NOISE, expert_of
from common.watch import Watch
from harvest.activations import EVERY
from harvest.config import TeacherConfig
from harvest.loading.folder import MODEL_INDEX, Resolved, read_json, scheduler_told
from harvest.loading.kernels import Ask, uncompiled
from harvest.loading.measure import TEXT_ENCODER, Needs, tile_bytes
from harvest.loading.parts import Parts, choose_dtype, count_tokens, dtype_name, load_parts
from harvest.loading.transfer import sent
from harvest.teacher import ExpertListener, TeacherFacts, Work
from harvest.teachers.wan_attention import PADDING_KEYS, Text, attending, collapse, padding_bias
from harvest.teachers.wan_check import doubts

EXPERTS = ("transformer", "transformer_2")
TEXT_LENGTH = 512
"""The stock pipeline's default; it stands in no file of the folder."""
ROWS_TOGETHER = 64
"""Compiled, a text's rows come in multiples of it: each length is a shape of its own."""
KERNEL_KEYS = 8
"""A GPU's kernels with a bias want the keys in multiples of it."""


class WanTeacher:
    """Implements harvest.teacher.Teacher."""

    attention = "sdpa"
    listener: ExpertListener | None = None

    def __init__(self, facts: TeacherFacts, parts: Parts, config: TeacherConfig, *, per_token: bool) -> None:
        self.facts, self.fingerprints, self.device = facts, parts.fingerprints, parts.device
        self.compute_dtype, self._dtype = dtype_name(parts.dtype), parts.dtype
        self._tokenizer, self._networks = parts.tokenizer, parts.networks
        self._batched_guidance, self._per_token = config.batched_guidance, per_token
        self._collapse, self._kernels, self._num_heard = config.collapsed_padding, parts.kernels, [0, 0]
        self.in_flight = parts.networks.in_flight
        self.sdpa, self.encoder_device = parts.kernels.told, parts.networks.device_of(TEXT_ENCODER)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        return [self._encode_one(prompt) for prompt in prompts]

    def make_room(self) -> None:
        self._networks.make_room()

    def count_tokens(self, prompts: list[str]) -> list[int]:
        return count_tokens(self._tokenizer, prompts)

    def condition(self, texts: list[Tensor], negative: Tensor) -> list[Text]:
        """One Text per forward: cond and uncond together, or each alone."""
        negatives = [negative] * len(texts)
        groups = [texts + negatives] if self._batched_guidance else [texts, negatives]
        return [self._text(group) for group in groups]

    @torch.inference_mode()
    def predict(self, latents: Tensor, timesteps: Tensor, condition: list[Text]) -> tuple[Tensor, Tensor]:
        return self.predict_with(self._expert_for(timesteps), latents, timesteps, condition)

    def predict_with(
        self, number: int, latents: Tensor, timesteps: Tensor, condition: list[Text]
    ) -> tuple[Tensor, Tensor]:
        """By the expert of that number, whatever the timestep."""
        expert = self._networks.ready(EXPERTS[number])
        if self._collapse:
            collapse(expert)
        video = latents.to(self.device, self._dtype).unsqueeze(2)  # [B, C, 1, H, W]
        timesteps = sent(timesteps, self.device)
        if self.listener and self._kernels.is_compiled:
            self._overhear(number, expert, video, timesteps, condition)
        elif self.listener:
            self.listener.attend(EXPERTS[number], expert)
        self._kernels.compile(expert)
        if self._batched_guidance:
            both = self._forward(expert, torch.cat([video, video]), torch.cat([timesteps, timesteps]), condition[0])
            cond, uncond = both.chunk(2)
            return cond, uncond
        return (
            self._forward(expert, video, timesteps, condition[0]),
            self._forward(expert, video, timesteps, condition[1]),
        )

    def _overhear(self, number: int, expert: Any, video: Tensor, timesteps: Tensor, condition: list[Text]) -> None:
        """An answer of its own that nobody keeps: listening would be compiled in, and last bits would differ."""
        self._num_heard[number] += 1
        if self.listener and self._num_heard[number] % EVERY == 1:
            with uncompiled():
                self.listener.attend(EXPERTS[number], expert)
                rows = torch.cat([video, video]) if self._batched_guidance else video
                times = torch.cat([timesteps, timesteps]) if self._batched_guidance else timesteps
                self._forward(expert, rows, times, condition[0])
                self.listener.close()

    def _forward(self, expert: Any, video: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        if self._per_token:  # at one frame every token has the same one
            patch = self.facts.latent_patch
            num_tokens = (video.shape[3] // patch) * (video.shape[4] // patch)
            timesteps = timesteps[:, None].expand(-1, num_tokens)
        with attending(expert, text), self._kernels.at_work():
            out: Tensor = expert(
                hidden_states=video, timestep=timesteps, encoder_hidden_states=text.rows, return_dict=False
            )[0]
        return out.squeeze(2).float()

    def _expert_for(self, timesteps: Tensor) -> int:
        which = set(
            expert_of(timesteps.cpu().numpy(), self.facts.boundary, train_steps=self.facts.train_steps).tolist()
        )
        assert len(which) == 1, "one micro-batch is on one side of the boundary"
        return 0 if which == {HIGH_NOISE} else 1

    def _encode_one(self, prompt: str) -> Tensor:
        """Its real rows. The encoder masks padding: but for rounding they are the same without it, and far cheaper."""
        tokens = self._tokenizer(
            [prompt],
            padding=False if self._collapse else "max_length",
            max_length=self.facts.text_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device, encoder = self._networks.device_of(TEXT_ENCODER), self._networks.ready(TEXT_ENCODER)
        mask = tokens.attention_mask.to(device)
        hidden = encoder(tokens.input_ids.to(device), mask).last_hidden_state
        rows: Tensor = hidden[0, : int(mask.sum())].float().cpu()
        return rows

    def _text(self, texts: list[Tensor]) -> Text:
        """Zero-padded to the full length, or to what the collapsed padding needs."""
        lengths = [len(text) for text in texts]
        num_rows = self.facts.text_length
        if self._collapse:
            num_rows = keys_of(max(lengths), num_rows, self.device, compiled=self._kernels.is_compiled)
        padded = torch.zeros(len(texts), num_rows, self.facts.text_dim)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = text
        rows = sent(padded.to(self._dtype), self.device)
        if not self._collapse:
            return Text(rows=rows)
        bias = padding_bias(lengths, num_rows, self.facts.text_length)
        return Text(rows=rows, bias=sent(bias.to(self._dtype), self.device))


def keys_of(longest: int, full_length: int, device: str, *, compiled: bool) -> int:
    """How many keys texts of at most `longest` rows are given, the two that stand for the padding among them."""
    num = longest + PADDING_KEYS
    if compiled:
        return max(num, min(-(-num // ROWS_TOGETHER) * ROWS_TOGETHER, full_length))
    return -(-num // KERNEL_KEYS) * KERNEL_KEYS if device.startswith("cuda") else num


def facts_of(resolved: Resolved) -> TeacherFacts:
    """Everything the contract wants of a Wan folder, from its JSON files."""
    network, vae = resolved.components["transformer"].config, resolved.components["vae"].config
    settings = read_json(resolved.components["scheduler"].folder / "scheduler_config.json")
    return TeacherFacts(
        teacher=resolved.components["transformer"].class_name,
        text_length=TEXT_LENGTH,
        text_padding="zeros",
        text_dim=network["text_dim"],
        prediction="flow",
        noise="flow",
        train_steps=settings["num_train_timesteps"],
        shift=float(settings.get("flow_shift") or settings.get("shift") or 1.0),
        boundary=_boundary(resolved) if EXPERTS[1] in resolved.components else None,
        latent_channels=network["in_channels"],
        latent_stride=vae.get("scale_factor_spatial") or 8,
        latent_patch=network["patch_size"][1],
        latent_mean=tuple(vae["latents_mean"]),
        latent_std=tuple(vae["latents_std"]),
        scheduler=scheduler_told(settings),
    )


def _boundary(resolved: Resolved) -> float:
    told = resolved.scalars.get("boundary_ratio")
    if told is None:
        raise Refused(
            wrong="two experts, and nothing says where the second begins",
            found=f"no boundary_ratio in {resolved.folder / MODEL_INDEX}",
            mend="add it there (Wan 2.2 T2V A14B: 0.875), or take teacher.rest from a folder of the same model",
        )
    return float(told)


def networks_of(resolved: Resolved) -> tuple[str, ...]:
    return (TEXT_ENCODER, *(expert for expert in EXPERTS if expert in resolved.components))


def attention_of(config: TeacherConfig, resolved: Resolved, work: Work) -> tuple[Ask, ...]:
    """Of the picture's tokens among themselves, and to the text."""
    network, facts = resolved.components[EXPERTS[0]].config, facts_of(resolved)
    side = facts.latent_stride * facts.latent_patch
    rows, tokens = work.records * (2 if config.batched_guidance else 1), (work.height // side) * (work.width // side)
    heads, dim = network["num_attention_heads"], network["attention_head_dim"]
    return (
        Ask(rows=rows, queries=tokens, keys=tokens, heads=heads, dim=dim),
        Ask(rows=rows, queries=tokens, keys=TEXT_LENGTH, heads=heads, dim=dim, biased=config.collapsed_padding),
    )


def work_bytes(config: TeacherConfig, resolved: Resolved, work: Work, dtype: torch.dtype) -> int:
    """What a forward needs beside the weights: the widest moment of a block, and the texts' keys and values."""
    network, facts = resolved.components[EXPERTS[0]].config, facts_of(resolved)
    side = facts.latent_stride * facts.latent_patch
    rows = work.records * (2 if config.batched_guidance else 1)
    tokens = rows * (work.height // side) * (work.width // side)
    width = network["num_attention_heads"] * network["attention_head_dim"]
    # Seven times the stream in float32: norms and modulation are computed so; the feed-forward part twice.
    block = tokens * (7 * width * 4 + 2 * network["ffn_dim"] * dtype.itemsize)
    modulation = 2 * 6 * width * 4 * (tokens if resolved.scalars.get("expand_timesteps") else rows)
    texts = rows * TEXT_LENGTH * (facts.text_dim + width) * 2 * dtype.itemsize
    return int(block + modulation + texts + kept_bytes(config, resolved, work, dtype))


def kept_bytes(config: TeacherConfig, resolved: Resolved, work: Work, dtype: torch.dtype) -> int:
    """Of it, the texts' keys and values, where the padding is collapsed: both branches', as long as a micro-batch."""
    network = resolved.components[EXPERTS[0]].config
    width = network["num_attention_heads"] * network["attention_head_dim"]
    num_bytes: int = work.records * 2 * TEXT_LENGTH * width * 2 * dtype.itemsize * network["num_layers"]
    return num_bytes if config.collapsed_padding else 0


def needs_of(config: TeacherConfig, resolved: Resolved, work: Work, dtype: torch.dtype) -> Needs:
    return Needs(
        work_bytes=work_bytes(config, resolved, work, dtype),
        kept_bytes=kept_bytes(config, resolved, work, dtype),
        text_bytes=work.records * 2 * TEXT_LENGTH * facts_of(resolved).text_dim * dtype.itemsize,
        tile_bytes=tile_bytes(resolved, work),
        attention=attention_of(config, resolved, work),
    )


def load_teacher(config: TeacherConfig, resolved: Resolved, watch: Watch, log: Log, work: Work) -> WanTeacher:
    """Text encoder, then the experts in the order in which they are needed."""
    dtype = choose_dtype(config.dtype, config.device)
    needs = needs_of(config, resolved, work, dtype)
    facts, per_token = facts_of(resolved), bool(resolved.scalars.get("expand_timesteps"))

    def made(parts: Parts) -> WanTeacher:
        return WanTeacher(facts, parts, config, per_token=per_token)

    def check(parts: Parts) -> str:
        return doubts(made(parts), resolved, watch.heed)

    return made(load_parts(config, resolved, networks_of(resolved), watch, log, needs, check))
