"""What training costs, without data or weights: parameters, FLOPs, memory, communication, time, disk.

A multiply-add counts as two FLOPs, as torch's `FlopCounterMode` and GPU makers count; the GFLOPs of the DiT and SiT
papers (119 for XL/2) count it as one. Elementwise operations are left out.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit5gen.config import Config
from vit5gen.models import SiTTransformer2DModel
from vit5gen.models.layers import Attention
from vit5gen.system.errors import UserError
from vit5gen.system.precision import PRECISIONS
from vit5gen.training.objectives import Batch

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

    parameters: int  # of the pipeline: adapters are folded in
    num_blocks: int
    tokens: int
    forward_flops: int
    backward_flops: int
    activation_bytes: int
    recomputes: bool
    of_objectives: int = 0  # parameters that are trained but are not part of the pipeline
    objective_flops: int = 0  # of their forward and backward passes while they are active
    idle_flops: int = 0  # of these, what steps in which they are not save on average
    uncounted: tuple[str, ...] = ()  # objectives whose FLOPs are not known
    frozen: int = 0  # parameters of the model that are not trained
    of_adapters: int = 0  # parameters that are folded into others in the pipeline
    one_moment: int = 0  # parameters of which the optimizer keeps one moment instead of two

    @property
    def trained(self) -> int:
        """Parameters that have a gradient and a state of the optimizer."""
        return self.parameters - self.frozen + self.of_adapters + self.of_objectives

    @property
    def training_flops(self) -> int:
        return self.forward_flops + self.backward_flops + self.objective_flops - self.idle_flops

    @property
    def executed_flops(self) -> int:
        """`training_flops`, and a second forward pass under gradient checkpointing."""
        return self.training_flops + self.forward_flops * self.recomputes


def model_cost(model: SiTTransformer2DModel, precision: str, recomputes: bool) -> Cost:
    """Cost of a model at the latent size it was built for, from one forward and backward pass of an image.

    The model may be on the meta device, where the passes run. Memory, in eager mode: a layer with weights keeps input
    and output in the precision of products, a norm both in fp32, a rotation its output. recomputes: gradient
    checkpointing keeps the input of each block and the activations of one. Raises `UserError` for a backbone that
    cannot run on the meta device.
    """
    # A copy without weights, in which hooks count what each layer keeps for the backward pass.
    kept = PRECISIONS[precision].activation_bytes
    wide = max(kept, 4)
    model = nn.Module.to(copy.deepcopy(model), "meta")
    if model.is_gradient_checkpointing:
        model.disable_gradient_checkpointing()  # or the second forward pass would be counted
    height, width = to_2tuple(model.config.sample_size)
    tokens = height * width // model.config.patch_size**2
    inside = outside = 0

    def note(in_backbone: bool, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal tokens, inside, outside
        numbers = sum(tensor.numel() for tensor in (*inputs[:1], output))
        if isinstance(module, Attention):  # queries and keys, where they are rotated
            activations = 2 * output.numel() * kept * any(rope is not None for rope in inputs[1:])
        else:
            activations = numbers * (wide if isinstance(module, nn.LayerNorm | nn.RMSNorm) else kept)
        if isinstance(module, nn.Linear):
            tokens = max(tokens, output.numel() // module.out_features)
        inside, outside = inside + activations * in_backbone, outside + activations * (not in_backbone)

    for name, module in model.named_modules():
        if name.endswith(".base_layer"):  # its adapter's two layers have the same input and output
            continue
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.RMSNorm | Attention):
            module.register_forward_hook(partial(note, name.startswith("backbone.")))

    # Attention is counted as the two products that it is, whatever kernel computes them.
    latents = torch.zeros(1, model.config.in_channels, height, width, device="meta")
    time, label = torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = model(latents, time, label)
            forward_flops = counter.get_total_flops()
            output.sum().backward()
    except (RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0][:200]
        fault = f"cannot run on torch's meta device, which the cost estimate needs ({reason})"
        advice = "do not read tensor values in `forward`"
        raise UserError(f"backbone {model.config.backbone!r} {fault}; {advice}") from error

    blocks = model.config.num_layers
    if recomputes:
        inside = inside // blocks + blocks * tokens * model.config.hidden_size * wide
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)
    parameters = sum(parameter.numel() for parameter in model.parameters()) - adapters
    flops = forward_flops, counter.get_total_flops() - forward_flops
    return Cost(parameters, blocks, tokens, *flops, inside + outside, recomputes, frozen=frozen, of_adapters=adapters)


def objective_flops(objectives: nn.ModuleDict, model: SiTTransformer2DModel, config: Config) -> dict[str, int | None]:
    """Return the FLOPs of each objective's passes over an image, None where they are not known; all on meta device."""
    tokens = math.prod(config.latent_shape[1:]) // model.config.patch_size**2
    found: dict[str, int | None] = {}
    objective: Any
    with torch.device("meta"):
        latents, t, label = torch.zeros(1, *config.latent_shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        image = torch.zeros(1, 3, config.data.resolution, config.data.resolution, dtype=torch.uint8)
        batch = Batch(latents, latents, label, t, label, 0, image, t, latents, latents)
        for name, objective in objectives.items():
            hidden = {k: torch.zeros(1, tokens, model.config.hidden_size, requires_grad=True) for k in objective.taps}
            found[name] = objective.flops(torch.zeros_like(latents, requires_grad=True), hidden, batch)
    return found


def _weight_bytes(cost: Cost, config: Config) -> int:
    everything = cost.parameters + cost.of_adapters + cost.of_objectives
    return everything * PRECISIONS[config.training.precision].weights.itemsize


def _trained_bytes(cost: Cost, config: Config) -> int:
    return cost.trained * PRECISIONS[config.training.precision].weights.itemsize


def optimizer_bytes(cost: Cost, config: Config) -> int:
    """Return the size of the moments: two of Adam, one of the matrices of Muon."""
    return (2 * cost.trained - cost.one_moment) * PRECISIONS[config.training.precision].weights.itemsize


def _averages_bytes(cost: Cost, config: Config) -> int:
    return sum(map(len, config.training.averages)) * _trained_bytes(cost, config)


def memory_bytes(cost: Cost, config: Config, micro_batch_size: int, num_processes: int, sharded: bool = False) -> int:
    """Return the peak on each GPU; sharded: FSDP instead of DDP.

    Weights, gradient and moments, the averages, DDP's buckets, the cast weights of autocast, activations.
    Not in it: the autoencoder (0.3 GB), what objectives keep for the backward pass and their encoders, CUDA's context,
    fragmentation, what compiling saves.
    """
    weights, trained = _weight_bytes(cost, config), _trained_bytes(cost, config)
    states = weights + trained + _averages_bytes(cost, config) + optimizer_bytes(cost, config)
    if sharded:
        states = states // num_processes + 2 * weights // cost.num_blocks  # two blocks are whole
    elif num_processes > 1:
        states += trained
    cast = PRECISIONS[config.training.precision].cast_bytes * cost.parameters
    return states + cast + micro_batch_size * cost.activation_bytes


def largest_micro_batch(cost: Cost, config: Config, num_processes: int, memory: float) -> int:
    """Return how many images of one forward pass fit in ``memory`` GB of each GPU; 0 when none does."""
    room = memory * 1e9 - memory_bytes(cost, config, 0, num_processes)
    return max(0, int(room // cost.activation_bytes))


def communication_bytes(cost: Cost, config: Config, num_processes: int) -> int:
    """Return what each process sends in one step by ring collectives: DDP reduces the gradient once.

    It does not travel in bf16: only products are rounded.
    """
    return 2 * _trained_bytes(cost, config) * (num_processes - 1) // num_processes


def gpu_hours(cost: Cost, num_images: int, gpu: str, precision: str) -> float:
    """Return the hours of one GPU to train on so many images at `ASSUMED_UTILISATION`, recomputation included.

    gpu, precision: as in `GPUS`; others are a `KeyError`.
    """
    return num_images * cost.executed_flops / (GPUS[gpu].peak[precision] * 1e12 * ASSUMED_UTILISATION) / 3600


def find_gpu(device_name: str) -> str | None:
    """Return the name in `GPUS` of a GPU as torch calls it; None for others, slower modules and parts of one."""
    other = any(word in device_name for word in ("H100 PCIe", "NVL", "MIG"))
    return None if other else next((gpu for gpu in GPUS if gpu in device_name), None)


def mfu(flops_per_second: float, gpu: str, precision: str) -> float:
    """Return the fraction of one GPU's peak that a model's FLOPs are, of which recomputation is no part.

    gpu, precision: as in `GPUS`; others are a `KeyError`.
    """
    return flops_per_second / (GPUS[gpu].peak[precision] * 1e12)


def checkpoint_bytes(cost: Cost, config: Config) -> int:
    """Return the size of one checkpoint: weights, averages and moments."""
    return _weight_bytes(cost, config) + _averages_bytes(cost, config) + optimizer_bytes(cost, config)


def run_bytes(cost: Cost, config: Config) -> int:
    """Return what a run needs on disk: checkpoints and one more while it saves, its pipeline twice, and snapshots."""
    settings = config.training
    milestones = settings.num_steps // settings.keep_every if settings.keep_every else 0
    snapshots = len(settings.ema_lengths) * (settings.num_steps // (settings.ema_snapshot_every or 1))
    files = 2 * 4 * cost.parameters + 2 * snapshots * cost.trained
    return (settings.keep_last + milestones + 1) * checkpoint_bytes(cost, config) + files
