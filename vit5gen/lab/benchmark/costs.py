"""What XL/2 costs on GPUs: computed by `vit5gen.training.cost` at an assumed utilisation, not measured."""

from typing import Any

from vit5gen.config import Config, validate
from vit5gen.training import cost
from vit5gen.training.dry_run import run_cost

NUM_GPUS = 8


def costs() -> list[dict[str, Any]]:
    """Return FLOPs, memory, traffic and GPU-hours of the published number of steps, for each backbone."""
    return [_cost(backbone, steps) for backbone in ("sit", "vit5") for steps in (400_000, 7_000_000)]


def _cost(backbone: str, steps: int) -> dict[str, Any]:
    sections = {
        "model": {"backbone": backbone, "preset": "XL/2"},
        "training": {"precision": "bf16", "num_steps": steps},
    }
    config = validate(Config, sections, "costs")
    one, batch = run_cost(config), config.training.global_batch_size
    return {
        "model": f"{backbone} XL/2",
        "steps": steps,
        "batch": batch,
        "forward GFLOPs an image": round(one.forward_flops / 1e9, 1),
        f"GB on each of {NUM_GPUS} GPUs": round(cost.memory_bytes(one, config, batch // NUM_GPUS, NUM_GPUS) / 1e9, 1),
        "GB sent a step": round(cost.communication_bytes(one, config, 1, NUM_GPUS) / 1e9, 2),
        "assumed utilisation": cost.ASSUMED_UTILISATION,
        **{f"computed {gpu}-hours": round(cost.gpu_hours(one, steps * batch, gpu, "bf16")) for gpu in cost.GPUS},
    }
