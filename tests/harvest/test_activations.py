"""What is heard is what was computed, and listening changes no answer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harvest.activations import EVERY, Listener
from tests.made import command, write_student_json
from tests.micro import TRANSFORMER


@pytest.fixture(scope="module")
def expert() -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(**TRANSFORMER).eval()


def asked(expert: torch.nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(2, 16, 1, 8, 8, generator=generator)
    text = torch.randn(2, 5, TRANSFORMER["text_dim"], generator=generator)
    with torch.inference_mode():
        out: torch.Tensor = expert(video, torch.tensor([900.0, 10.0]), text, return_dict=False)[0]
    return out


def test_mean_squares_are_those_of_the_forwards_that_were_listened_to(expert: torch.nn.Module) -> None:
    inputs: list[torch.Tensor] = []
    hook = expert.blocks[1].ffn.net[2].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    listener = Listener()
    for seed in range(EVERY + 1):
        listener.attend("transformer", expert)
        asked(expert, seed)
    listener.close()
    hook.remove()
    means = listener.means()
    wanted = torch.stack([inputs[0], inputs[EVERY]]).square().mean(dim=(0, 1, 2))
    torch.testing.assert_close(means["transformer.blocks.1.ffn"], wanted)
    assert means["transformer.blocks.0.attn1"].shape == (48,) and means["transformer.blocks.0.change"] > 0
    assert len(means) == 5 * TRANSFORMER["num_layers"]


def test_listening_changes_nothing_and_leaves_nothing_behind(expert: torch.nn.Module) -> None:
    before = asked(expert, 7)
    listener = Listener()
    listener.attend("transformer", expert)
    assert torch.equal(asked(expert, 7), before)
    listener.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in expert.modules())


def test_a_harvest_leaves_what_a_student_is_cut_by(tmp_path: Path, micro_set: Path, micro_wan: Path) -> None:
    """Through both ends: heard while harvesting, read by `train init --set`."""
    heard = load_file(micro_set / "assets/activations.safetensors")
    assert {name.split(".")[0] for name in heard} == {"transformer", "transformer_2"}
    assert all(value.isfinite().all() and (value > 0).all() for value in heard.values())
    student = write_student_json(tmp_path / "s.json", hidden_size=24, num_heads=2, depth=1, ffn_dim=48)
    done = command("train", "init", "--teacher", micro_wan, "--student", student, "--set", micro_set, "--out",
                   tmp_path / "init")  # fmt: skip
    assert done.returncode == 0 and "chosen by activations" in done.stdout, done.stderr
    # The feed-forward channels that stay are those that were excited most, as their readers weigh them.
    from train.student.network import load_student

    reader = load_file(micro_wan / "transformer_2/diffusion_pytorch_model.safetensors")["blocks.0.ffn.net.2.weight"]
    worth = heard["transformer_2.blocks.0.ffn"].sqrt() * reader.norm(dim=0)
    best = worth.topk(48).indices.sort().values
    writer = load_file(micro_wan / "transformer_2/diffusion_pytorch_model.safetensors")["blocks.0.ffn.net.0.proj.bias"]
    kept = load_student(tmp_path / "init").state_dict()["blocks.0.ffn.net.0.proj.bias"]
    assert torch.equal(kept, writer[best])
