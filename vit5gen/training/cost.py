"""What training costs, from the shapes of a model alone: parameters, FLOPs, memory, communication, time, disk.

A multiply-add counts as two FLOPs, as torch's `FlopCounterMode` and GPU makers count; the GFLOPs of the DiT and SiT
papers (119 for XL/2) count it as one. Elementwise operations are left out.
"""

from dataclasses import dataclass
from math import prod

from timm.layers import to_2tuple
from torch import nn

from vit5gen.config import Config
from vit5gen.models import SiTTransformer2DModel
from vit5gen.models.layers import Attention

ASSUMED_UTILISATION = 0.22  # about that of XL/2 on an H100 (docs/benchmark.md); other sizes and GPUs are not measured
IMAGENET_IMAGES = 1_281_167


@dataclass(frozen=True)
class Gpu:
    """Memory in GB and dense peak in TFLOP/s by precision, from NVIDIA's data sheets (SXM modules)."""

    memory: float
    peak: dict[str, float]


GPUS = {
    "A100": Gpu(80, {"fp64": 19.5, "fp32": 19.5, "tf32": 156, "bf16": 312}),
    "H100": Gpu(80, {"fp64": 67, "fp32": 67, "tf32": 495, "bf16": 989}),
    "H200": Gpu(141, {"fp64": 67, "fp32": 67, "tf32": 495, "bf16": 989}),
}


@dataclass(frozen=True)
class Cost:
    """A model's parameters, and what one training image costs it."""

    parameters: int
    num_blocks: int
    tokens: int
    forward_flops: int
    activation_bytes: int
    recomputes: bool
    entrance_flops: int = 0  # of those of the forward pass, the ones of the layers that latents and times enter

    @property
    def backward_flops(self) -> int:
        """Gradients to inputs and to weights are a product each for every product, but none to latents and times."""
        return 2 * self.forward_flops - self.entrance_flops

    @property
    def training_flops(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def executed_flops(self) -> int:
        """`training_flops`, and a second forward pass under gradient checkpointing."""
        return self.training_flops + self.forward_flops * self.recomputes


def model_cost(model: SiTTransformer2DModel, precision: str = "fp32", recomputes: bool = False) -> Cost:
    """Cost of a model, which may be on the meta device, at the latent size it was built for.

    Every weight of a linear or 1:1 convolutional layer acts once a token, those called ``modulation`` and the time
    embedding once an image. Memory, in eager mode: a linear layer keeps input and output in the precision of products,
    a norm both in fp32, a rotation its output. recomputes: gradient checkpointing keeps the input of each block and the
    activations of one.
    """
    kept = {"bf16": 2, "fp64": 8}.get(precision, 4)
    wide = max(kept, 4)
    width, backbone = model.config.hidden_size, model.backbone
    patches = prod(to_2tuple(model.config.sample_size)) // model.config.patch_size**2
    tokens = patches + getattr(backbone, "num_registers", 0)
    flops = entrance = inside = outside = 0
    for name, module in model.named_modules():
        in_backbone = name.startswith("backbone.")
        rows = tokens if in_backbone else patches
        activations = 0
        if isinstance(module, nn.Linear | nn.Conv2d):
            if name.endswith("modulation") or name.startswith("time_embed"):
                rows = 1
            flops += 2 * rows * module.weight.numel()
            entrance += 2 * rows * module.weight.numel() * (name in ("patch_embed", "time_embed.fc1"))
            activations = rows * sum(_features(module)) * kept
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            channels = width if name.endswith(("q_norm", "k_norm")) else prod(module.normalized_shape)
            activations = rows * 2 * channels * wide
        elif isinstance(module, Attention):
            flops += 4 * tokens**2 * width
            activations = rows * 2 * width * kept * (getattr(backbone, "rope_theta", None) is not None)
        inside, outside = inside + activations * in_backbone, outside + activations * (not in_backbone)
    blocks = model.config.num_layers
    if recomputes:
        inside = inside // blocks + blocks * tokens * width * wide
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, blocks, tokens, flops, inside + outside, recomputes, entrance)


def _features(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _weight_bytes(cost: Cost, config: Config) -> int:
    return cost.parameters * (8 if config.training.precision == "fp64" else 4)


def memory_bytes(cost: Cost, config: Config, micro_batch_size: int, num_processes: int, sharded: bool = False) -> int:
    """Return the peak on each GPU; sharded: FSDP instead of DDP.

    Weights, gradient and two moments of Adam, the averages, DDP's buckets, the cast weights of autocast, activations.
    Not in it: the autoencoder (0.3 GB), CUDA's context, fragmentation, what compiling saves.
    """
    weights = _weight_bytes(cost, config)
    states = (4 + len(config.training.ema_decays)) * weights
    if sharded:
        states = states // num_processes + 2 * weights // cost.num_blocks  # two blocks are whole
    elif num_processes > 1:
        states += weights
    cast = 2 * cost.parameters if config.training.precision == "bf16" else 0
    return states + cast + micro_batch_size * cost.activation_bytes


def largest_micro_batch(cost: Cost, config: Config, num_processes: int, memory: float, sharded: bool = False) -> int:
    """Return how many images of one forward pass fit in ``memory`` GB of each GPU; 0 when none does."""
    room = memory * 1e9 - memory_bytes(cost, config, 0, num_processes, sharded)
    return max(0, int(room // cost.activation_bytes))


def communication_bytes(
    cost: Cost, config: Config, accumulation: int, num_processes: int, sharded: bool = False
) -> int:
    """Return what each process sends in one step by ring collectives.

    DDP reduces the gradient once. FSDP gathers the weights for the forward and the backward pass of each micro-batch
    and scatters the gradient once. Nothing travels in bf16: only products are rounded.
    """
    passes = 2 * accumulation + 1 if sharded else 2
    return passes * _weight_bytes(cost, config) * (num_processes - 1) // num_processes


def gpu_hours(cost: Cost, num_images: int, gpu: str, precision: str) -> float:
    """Return the hours of one GPU to train on so many images at `ASSUMED_UTILISATION`, recomputation included.

    gpu, precision: as in `GPUS`; others are a `KeyError`.
    """
    return num_images * cost.executed_flops / (GPUS[gpu].peak[precision] * 1e12 * ASSUMED_UTILISATION) / 3600


def mfu(cost: Cost, images_per_second: float, gpu: str, precision: str) -> float:
    """Return the fraction of one GPU's peak that a measured speed stands for; recomputation does not count as work.

    gpu, precision: as in `GPUS`; others are a `KeyError`.
    """
    return images_per_second * cost.training_flops / (GPUS[gpu].peak[precision] * 1e12)


def checkpoint_bytes(cost: Cost, config: Config) -> int:
    """Return the size of one checkpoint: weights, averages and two moments."""
    return (3 + len(config.training.ema_decays)) * _weight_bytes(cost, config)


def run_bytes(cost: Cost, config: Config) -> int:
    """Return what a run needs on disk: the checkpoints it keeps and one more while it saves, and its pipeline twice."""
    settings = config.training
    milestones = settings.num_steps // settings.keep_every if settings.keep_every else 0
    return (settings.keep_last + milestones + 1) * checkpoint_bytes(cost, config) + 2 * 4 * cost.parameters
