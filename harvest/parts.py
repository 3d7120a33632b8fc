"""What every teacher needs of its folder: device and dtype chosen, networks loaded, their identity taken.

parts = load_parts(config, resolved, ("text_encoder", "transformer", "transformer_2"), watch, log)
parts.networks["transformer"], parts.tokenizer, parts.fingerprints
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import Refused
from common.log import Log, gpu_label
from common.watch import Watch
from harvest.config import TeacherConfig
from harvest.folder import Component, Resolved
from harvest.loading import fingerprint, fingerprint_files, load_model, load_tokenizer, tensor_digests
from harvest.prepare import from_prepared, prepare, prepared_digests
from harvest.teacher import Fingerprints

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    device: str
    dtype: torch.dtype
    networks: dict[str, Any]
    tokenizer: Any
    fingerprints: Fingerprints


def load_parts(config: TeacherConfig, resolved: Resolved, names: Sequence[str], watch: Watch, log: Log) -> Parts:
    """The named networks in memory, one after the other, the text encoder among them."""
    device, dtype = choose_device(config.device), choose_dtype(config.dtype, config.device)
    if config.prepared is not None:
        watch.moved(preparing=str(config.prepared))
        resolved = from_prepared(resolved, prepare(resolved, config.prepared, dtype, log))
    log.say(f"teacher {resolved.folder} on {device_name(device)} in {dtype_name(dtype)}: {resolved.summary()}")
    networks = {name: load_model(resolved.components[name], dtype, moved=watch.moved).to(device) for name in names}
    _require_embeddings(networks[TEXT_ENCODER])
    watch.moved(loading="fingerprints")
    tokenizer = resolved.components[TOKENIZER]
    digests = {name: _digests(resolved.components[name], model, config) for name, model in networks.items()}
    prints = Fingerprints(
        weights=fingerprint(told for name, told in digests.items() if name != TEXT_ENCODER),
        text_encoder=fingerprint([digests[TEXT_ENCODER]]),
        tokenizer=fingerprint_files(path for path in tokenizer.folder.iterdir() if path.is_file()),
    )
    return Parts(
        device=device, dtype=dtype, networks=networks, tokenizer=load_tokenizer(tokenizer), fingerprints=prints
    )


def _digests(part: Component, model: Any, config: TeacherConfig) -> dict[str, str]:
    return prepared_digests(part, model) if part.prepared and not config.rehash else tensor_digests(model)


def choose_device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """bfloat16 where the hardware has it: Wan and its text encoder degrade in float16."""
    if wanted != "auto":
        chosen: torch.dtype = getattr(torch, wanted)
        return chosen
    if choose_device(device) == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: str) -> str:
    """For people: an index alone means nothing under CUDA_VISIBLE_DEVICES."""
    if not device.startswith("cuda"):
        return device
    index = torch.device(device).index or 0
    return gpu_label(index=index, uuid=str(torch.cuda.get_device_properties(index).uuid), rank=0)


def _require_embeddings(encoder: Any) -> None:
    """An encoder whose file lacks the embeddings gets random or empty ones without a word where they are tied."""
    if not encoder.get_input_embeddings().weight.any():
        raise Refused(
            wrong="the text encoder's embeddings are empty", found="only zeros", mend="fetch text_encoder again"
        )
