"""Stand-ins for checkouts of published code: the names that a benchmark uses, and what it must get along with."""

from pathlib import Path

SIT = {
    "models.py": """
import torch
from vit5gen.models import SiTTransformer2DModel

NAMES = {
    "patch_embed.": "x_embedder.proj.",
    "time_embed.fc1.": "t_embedder.mlp.0.",
    "time_embed.fc2.": "t_embedder.mlp.2.",
    "label_embed.": "y_embedder.embedding_table.",
    "head.": "final_layer.",
    "modulation.": "adaLN_modulation.1.",
    "backbone.": "",
}

class Published(SiTTransformer2DModel):
    def __init__(self, input_size, num_classes):
        sizes = {"hidden_size": 24, "num_layers": 1, "num_attention_heads": 6, "patch_size": 2}
        super().__init__(backbone="sit", sample_size=input_size, num_classes=num_classes, learn_sigma=True, **sizes)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.1)

    def state_dict(self):
        state = {}
        for name, value in super().state_dict().items():
            for ours, published in NAMES.items():
                name = name.replace(ours, published)
            state[name] = value
        state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].unflatten(1, (4, 2, 2))
        return state

    def forward(self, x, t, y):
        return super().forward(x, t, y) * FACTOR

SiT_models = {"SiT-S/2": Published}
""",
    "transport/__init__.py": "from .transport import create_transport\n",
    "transport/transport.py": """
import torch
from torchdiffeq import odeint

class Transport:
    def training_losses(self, model, x1, model_kwargs):
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        return {"loss": (model(x0, t, **model_kwargs) - x1 + x0).square().mean(dim=(1, 2, 3))}

def create_transport():
    return Transport()
""",
    "wandb_utils.py": "import importlib.util\n\nimport wandb\n\nimportlib.util.find_spec('wandb')\n",
    "train.py": """
import torch

torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
import wandb_utils
from models import SiT_models

def update_ema(ema_model, model, decay=0.9999):
    for average, weight in zip(ema_model.parameters(), model.parameters()):
        average.mul_(decay).add_(weight.data, alpha=1 - decay)
""",
}
VIT5 = {
    "rope.py": "class VisionRotaryEmbedding: pass\n",
    "utils.py": "raise AssertionError('of no use here')\n",
    "models_vit5.py": """
from timm.models.registry import register_model

from rope import VisionRotaryEmbedding
from vit5gen.models import ViT5

class OnCuda(ViT5):
    def forward(self, images):
        return super().forward(images.cuda()) + OFFSET

@register_model
def vit5_small(img_size=224, **options):
    return OnCuda(img_size, embed_dim=384, depth=12, num_heads=6)
""",
}


def write_sit(folder: Path, factor: float = 1) -> Path:
    """factor: of the output, wrong unless one."""
    return _write(folder, SIT | {"models.py": f"FACTOR = {factor}\n{SIT['models.py']}"})


def write_vit5(folder: Path, offset: float = 0) -> Path:
    """offset: of the logits, wrong unless zero."""
    return _write(folder, VIT5 | {"models_vit5.py": f"OFFSET = {offset}\n{VIT5['models_vit5.py']}"})


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
