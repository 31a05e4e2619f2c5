"""What the fast modes change: the losses of 200 steps against those of fp32."""

import pytest
import torch

from vit5gen.config import Config
from vit5gen.section import validate
from vit5gen.training.batches import micro_batches
from vit5gen.training.loop import build_trainer, train_step
from vit5gen.training.process import make_accelerator

NUM_STEPS = 200


class Waves:
    """Latents (4, 16, 16) that a model can learn: a wave of each class, and a little noise."""

    def __len__(self):
        return 1000

    def get(self, index, flip):
        angles = torch.arange(4 * 16 * 16).reshape(4, 16, 16) / (3 + index % 10)
        return angles.sin(), torch.full((4, 16, 16), 0.1), index % 10


def losses(folder, backbone, **training):
    sections = {
        "model": {"backbone": backbone, "hidden_size": 96, "num_layers": 4, "num_attention_heads": 3, "patch_size": 2},
        "data": {"resolution": 128, "num_classes": 10},
        "training": {"global_batch_size": 16, "learning_rate": 1e-3, "trackers": [], "precision": "fp32", **training},
    }
    if backbone == "vit5":
        sections["model"]["backbone_kwargs"] = {"gamma_init": 1}
    config = validate(Config, sections, "test")
    accelerator = make_accelerator(config.training, folder)
    trainer = build_trainer(config, accelerator)
    batches = micro_batches(config, Waves(), None, accelerator)
    losses = [train_step(trainer, config, batches).loss for _ in range(NUM_STEPS)]
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["sit", "vit5"])
def test_fast_modes_learn_as_fp32_does(backbone, tmp_path):
    exact = losses(tmp_path, backbone)
    assert exact[-50:].mean() < 0.7 * exact[:10].mean()
    for mode, most in (
        ({"compile": True}, 1e-4),
        ({"precision": "bf16"}, 0.01),
        ({"precision": "bf16", "compile": True}, 0.01),
    ):
        fast = losses(tmp_path, backbone, **mode)
        apart, last = (fast / exact - 1).abs().max().item(), (fast[-50:].mean() / exact[-50:].mean() - 1).item()
        print(f"\n{backbone} {mode}: a step's loss at most {apart:.1e} apart, the mean of the last 50 {last:+.1e}")
        assert abs(last) < most
