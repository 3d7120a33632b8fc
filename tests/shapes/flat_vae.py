"""The Wan VAE as the 2D network that it is at one frame.

    vae = new_vae()                    # a small AutoencoderKLWan
    flatten(vae)                       # in place: every causal 3D convolution becomes its last temporal slice
    ...                                # train it on [B, 3, 1, H, W]
    restore(flat_state, vae)           # the slices go back to where the 3D network reads them; the past gets zeros

At one frame a causal convolution sees zeros as the past, so the last temporal slice of its kernel is the whole truth.
The 2D network has a third of the weights and trains about twice as fast.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import Tensor, nn
from torch.nn import functional

STRIDE = 8
BASE_DIM = 16


def new_vae(
    base_dim: int = BASE_DIM, mean: list[float] | None = None, std: list[float] | None = None
) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=mean or [0.0] * 16,
        latents_std=std or [1.0] * 16,
    )


class LastSlice(nn.Module):
    """A causal 3D convolution at one frame: x is [B, C, 1, H, W], the weight [out, in, kh, kw]."""

    def __init__(self, conv: WanCausalConv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach()[:, :, -1].clone(memory_format=torch.channels_last))
        self.bias = nn.Parameter(conv.bias.detach().clone())
        self.stride, self.padding = conv.stride[1:], conv._padding[2]

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        return functional.conv2d(x.squeeze(2), self.weight, self.bias, self.stride, self.padding).unsqueeze(2)


class _Normalize(torch.autograd.Function):
    """y = gain * x / |x| over the channels, with the backward pass in six sweeps over memory instead of twenty."""

    @staticmethod
    def forward(context, x: Tensor, gain: Tensor) -> Tensor:  # x: [B, C, ...], gain: [C, 1, ...]
        inverse = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
        context.save_for_backward(x, inverse, gain)
        return (x * inverse).mul_(gain.to(x.dtype))

    @staticmethod
    def backward(context, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, inverse, gain = context.saved_tensors
        unit = x * inverse
        grad_gain = (grad * unit).sum(dim=(0, *range(2, x.ndim))).reshape(gain.shape).to(gain.dtype)
        grad_unit = grad * gain.to(grad.dtype)
        along = (grad_unit * unit).sum(1, keepdim=True)
        return grad_unit.sub_(unit.mul_(along)).mul_(inverse), grad_gain


class Normalize(nn.Module):
    """The VAE's RMS norm, written for speed: it was half of the training time."""

    def __init__(self, norm: WanRMS_norm) -> None:
        super().__init__()
        self.gamma, self.scale = norm.gamma, norm.scale

    def forward(self, x: Tensor) -> Tensor:
        return _Normalize.apply(x, self.gamma * self.scale)


def flatten(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Replace every causal 3D convolution by its last temporal slice (and its norms by a faster one), in place."""
    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, WanCausalConv3d):
                setattr(parent, name, LastSlice(child))
            elif isinstance(child, WanRMS_norm):
                setattr(parent, name, Normalize(child))
    return vae


def restart_convolutions(vae: AutoencoderKLWan, seed: int) -> None:
    """Kaiming-normal kernels: with the default initialisation almost nothing is learned in the first thousand steps."""
    torch.manual_seed(seed)
    for name, parameter in vae.named_parameters():
        if name.endswith("weight") and parameter.ndim >= 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def restore(flat_state: dict[str, Tensor], vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Write the 2D weights into the 3D network: last temporal slice filled, the others zero."""
    state = {}
    for name, target in vae.state_dict().items():
        flat = flat_state[name]
        if "time_conv" in name:  # one frame never reaches it
            state[name] = torch.zeros_like(target)
        elif flat.ndim == target.ndim:
            state[name] = flat
        else:
            state[name] = torch.zeros_like(target)
            state[name][:, :, -1] = flat
    vae.load_state_dict(state)
    return vae


def encode(flat: AutoencoderKLWan, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the latents: [B, 3, 1, H, W] -> two [B, 16, 1, h, w]."""
    mean, log_variance = flat.quant_conv(flat.encoder(images)).chunk(2, dim=1)
    return mean, log_variance.clamp(-20, 10)


def decode(flat: AutoencoderKLWan, latents: Tensor) -> Tensor:
    return flat.decoder(flat.post_quant_conv(latents))
