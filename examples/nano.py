"""The whole idea in one file: ViT-5 blocks that learn a flow from noise to emoji. Read it from top to bottom.

    python examples/nano.py --output nano.png        # about five minutes on two cores; a grid is written on the way

Nothing of the package is used but its pictures and its small autoencoder, yet losses and samples equal those of
`vit5gen train` and `SiTPipeline` bit for bit from the same seed (tests/test_examples_nano.py): what the package adds is
speed, choice, safety and scale, not other mathematics.

Sources: flow matching with a transformer, SiT (arXiv 2401.08740); the block, ViT-5 (arXiv 2602.08071); conditioning by
adaLN-Zero, DiT (arXiv 2212.09748); guidance without a classifier (arXiv 2207.12598).
"""

import argparse
import copy
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from vit5gen.data import load_emoji
from vit5gen.data.sources import emoji

CLASSES = ["smileys", "people", "symbols", "flags"]
WIDTH, DEPTH, HEADS, GRID, CHANNELS = 128, 6, 4, 8, 4  # a latent is 4 x 8 x 8, each of its 64 pixels is a token
REGISTERS, NULL = 4, len(CLASSES)  # NULL is the label of "no class"
EPS = 1e-6


# --- Positions: a learnable table for the patches, and rotations by row and column. ---------------------------------


def sincos_table() -> Tensor:
    """Return the (1, 64, D) table at which the learnable positions start: sin and cos of column, then of row."""
    omega = 10000.0 ** -(torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    angles = torch.arange(GRID, dtype=torch.float64)[:, None] * omega
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    table = torch.cat([waves[None].expand(GRID, -1, -1), waves[:, None].expand(-1, GRID, -1)], -1)
    return table.flatten(0, 1)[None].float()


def rotary_angles(side: int, theta: float) -> Tensor:
    """Return (side^2, head_dim / 2) angles: half of a head's channels turn with the row, half with the column."""
    channels = WIDTH // HEADS // 2
    frequencies = 1.0 / theta ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angles = (torch.arange(side, dtype=torch.float32) / side * side)[:, None] * frequencies
    return torch.cat([angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)], -1).flatten(0, 1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring channels of x (B, heads, N, head_dim), as complex numbers, by the angles of their token."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rope).flatten(-2)


# --- The network: ViT-5 blocks between an embedding of patches, time and class, and a head. --------------------------


class Block(nn.Module):
    """``x + gate gamma f(norm(x) (1 + scale) + shift)``, once with f attention and once with f an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(WIDTH // HEADS)) for _ in range(2))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        # LayerScale. ViT-5 starts it at 1e-4; a short run wants 1, because the gate beside it starts at zero already.
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def attention(self, x: Tensor, rope: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        # Queries and keys are normed, which keeps bf16 from overflowing, and only then rotated.
        q, k = F.rms_norm(q, q.shape[-1:], self.q_weight, EPS), F.rms_norm(k, k.shape[-1:], self.k_weight, EPS)
        y = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, conditioning: Tensor, rope: Tensor) -> Tensor:
        # adaLN: time and class choose shift, scale and gate of both halves.
        modulation = self.modulation(F.silu(conditioning))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        y = torch.addcmul(shift1, F.rms_norm(x, x.shape[-1:], eps=EPS), 1 + scale1)
        x = torch.addcmul(x, gate1 * self.gamma_1, self.attention(y, rope))
        y = torch.addcmul(shift2, F.rms_norm(x, x.shape[-1:], eps=EPS), 1 + scale2)
        return torch.addcmul(x, gate2 * self.gamma_2, self.fc2(F.gelu(self.fc1(y))))


class Network(nn.Module):
    """Predict the velocity at latents (B, 4, 8, 8) and times (B,) or (1,) in [0, 1], given labels (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(CHANNELS, WIDTH)
        self.time1, self.time2 = nn.Linear(256, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.label_embed = nn.Embedding(len(CLASSES) + 1, WIDTH)
        self.head_modulation, self.head = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, CHANNELS)
        for layer in (self.patch_embed, self.time1, self.time2, self.head_modulation, self.head):
            start(layer, zero=layer is self.head_modulation)
        for layer in (self.time1, self.time2, self.label_embed):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.weight)  # the prediction starts at zero

        self.registers = nn.Parameter(torch.empty(1, REGISTERS, WIDTH))
        self.positions = nn.Parameter(sincos_table())
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        for block in self.blocks:
            for layer in (block.qkv, block.proj, block.fc1, block.fc2, block.modulation):
                start(layer, zero=layer is block.modulation)
        nn.init.trunc_normal_(self.registers, std=0.02)

        # Registers turn on a 2 x 2 grid of their own, faster (a lower base) than patches do.
        angles = torch.cat([rotary_angles(GRID, 10000.0), rotary_angles(math.isqrt(REGISTERS), 100.0)])
        self.rope = torch.view_as_complex(torch.stack([angles.cos(), angles.sin()], -1))

    def forward(self, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        # The sum of time and class conditions every block.
        angles = t[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32))
        time = self.time2(F.silu(self.time1(torch.cat([angles.cos(), angles.sin()], -1))))
        conditioning = time + self.label_embed(labels)
        # A token is a pixel of the latent; registers take part in attention and are dropped in the end.
        x = self.patch_embed(rearrange(latents, "b c h w -> b (h w) c")) + self.positions
        x = torch.cat([x, self.registers.expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x, conditioning, self.rope)
        shift, scale = self.head_modulation(F.silu(conditioning))[:, None].chunk(2, -1)
        x = torch.addcmul(shift, F.layer_norm(x[:, : GRID**2], (WIDTH,), eps=EPS), 1 + scale)
        return rearrange(self.head(x), "b (h w) c -> b c h w", h=GRID)


def start(layer: nn.Linear, zero: bool = False) -> None:
    """Initialise as SiT does: Xavier-uniform weights (modulations at zero), no bias."""
    (nn.init.zeros_ if zero else nn.init.xavier_uniform_)(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


# --- The data: emoji as latents, and every random number a function of (seed, step, position in the batch). ----------


@torch.no_grad()
def encode(vae: AutoencoderKL) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and standard deviation (N, 4, 8, 8) of all training pictures' latents, and their labels (N,)."""
    images, labels = load_emoji(32, "train")
    number = {emoji.CLASSES.index(name): i for i, name in enumerate(CLASSES)}
    kept = torch.tensor([int(label) in number for label in labels])
    images, labels = images[kept], torch.tensor([number[int(label)] for label in labels[kept]])
    posteriors = [vae.encode(part.float() / 127.5 - 1).latent_dist for part in images.split(16)]
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    mean = torch.cat([(posterior.mean - shift) * scale for posterior in posteriors])
    std = torch.cat([posterior.std * scale for posterior in posteriors])
    return mean.half().float(), std.half().float(), labels  # the package keeps latents in half precision


def philox(seed: int, stream: int, position: int = 0) -> np.random.Generator:
    key, counter = np.array([seed, stream], np.uint64), np.array([0, 0, 0, position], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def batches(
    data: tuple[Tensor, Tensor, Tensor], seed: int, num_steps: int, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield (data x1, noise x0, uniforms u, labels) of every step; each epoch visits every picture once."""
    mean, std, labels = data
    for step in range(num_steps):
        x1, x0, u, y = [], [], [], []
        for position in range(size):
            epoch, place = divmod(step * size + position, len(labels))
            i = int(philox(seed, 2**63 + epoch).permutation(len(labels))[place])
            random = philox(seed, step, position)
            uniform, drop, _ = random.random(3)
            noise, draw = random.standard_normal((2, CHANNELS, GRID, GRID), dtype=np.float32)
            x1.append(mean[i] + std[i] * torch.from_numpy(draw))
            x0.append(torch.from_numpy(noise))
            u.append(uniform)
            y.append(NULL if drop < 0.1 else int(labels[i]))  # one in ten learns "no class", for guidance
        yield torch.stack(x1), torch.stack(x0), torch.tensor(u, dtype=torch.float64), torch.tensor(y)


# --- Learning: on the straight line from noise to data the velocity is their difference. -----------------------------


def flow_loss(network: Network, x1: Tensor, x0: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of ``|v(x_t, t) - (x1 - x0)|^2`` with ``x_t = t x1 + (1 - t) x0``."""
    at = t[:, None, None, None]
    x_t = at * x1 + (1 - at) * x0
    return (network(x_t, t, labels) - (x1 - x0)).square().flatten(1).mean(1).mean()


def train(
    data: tuple[Tensor, Tensor, Tensor],
    seed: int = 0,
    num_steps: int = 2400,
    size: int = 32,
    rate: float = 2e-3,
    warmup: int = 100,
    decay: float = 0.99,
) -> Iterator[tuple[float, Network]]:
    """Yield the loss of every step and the moving average of the weights, which is what one samples from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network()
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    for step, (x1, x0, u, labels) in enumerate(batches(data, seed, num_steps, size)):
        # Times near the middle are drawn more often: the logit of t is normal (arXiv 2403.03206).
        t = torch.sigmoid(torch.special.ndtri(u)).float()
        loss = flow_loss(network, x1, x0, t, labels)
        loss.backward()
        # A linear warm-up, then a cosine down to zero.
        done = (step - warmup) / max(1, num_steps - warmup)
        cosine = rate * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = rate * (step + 1) / warmup if step < warmup else cosine
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)
        yield loss.item(), average


# --- Sampling: start from noise, follow the velocity to t = 1, decode. -----------------------------------------------


@torch.no_grad()
def sample(
    network: Network, vae: AutoencoderKL, labels: Tensor, noise: Tensor, num_steps: int = 20, guidance: float = 2.0
) -> Tensor:
    """Return images (B, 3, 32, 32) uint8 by Heun's method: two velocities a step, and the state moves by their mean."""
    nothing = torch.full_like(labels, NULL)

    def velocity(x: Tensor, t: float) -> Tensor:
        # Guidance: away from what the network says of no class, towards what it says of this one.
        both = network(torch.cat([x, x]), torch.tensor([t]), torch.cat([labels, nothing]))
        conditional, unconditional = both.chunk(2)
        return conditional + (guidance - 1) * (conditional - unconditional)

    x = noise
    for i in range(num_steps):
        t, end = i / num_steps, (i + 1) / num_steps
        first = velocity(x, t)
        second = velocity(x + (end - t) * first, end)
        x = x + (end - t) / 2 * (first + second)
    images = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("nano.png"))
    parser.add_argument("--num-steps", type=int, default=2400)
    options = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(Path(emoji.__file__).parents[1] / "emoji_vae").float().eval()
    labels = torch.arange(len(CLASSES)).repeat_interleave(10)
    noise = torch.randn(len(labels), CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(0))
    for step, (loss, network) in enumerate(train(encode(vae), num_steps=options.num_steps), start=1):
        if step % 200 == 0 or step == options.num_steps:
            rows = sample(network, vae, labels, noise).unflatten(0, (len(CLASSES), -1))
            picture = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()
            Image.fromarray(picture).resize((3 * picture.shape[1], 3 * picture.shape[0]), 0).save(options.output)
            print(f"step {step}: loss {loss:.4f}, samples in {options.output}", flush=True)


if __name__ == "__main__":
    main()
