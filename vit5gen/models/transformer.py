"""The generator: patch, time and label embedding, a backbone from the registry, and the adaLN head."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from timm.layers import to_2tuple
from torch import Tensor, nn

from vit5gen.config import ASSUMED_CHANNELS, ASSUMED_CLASSES, ModelConfig
from vit5gen.models.backbone import BACKBONES, Backbone
from vit5gen.models.layers import Float32Linear, check_positive, check_sizes, init_linears, make_norm, modulate
from vit5gen.models.positions import patch_grid
from vit5gen.models.weights import align, check_fit
from vit5gen.system.cpu import fast_inference
from vit5gen.system.errors import UserError, choose
from vit5gen.system.files import MODEL_STUB, clear_weights, find_variants, write_text

# When any model is cast, diffusers warns of its modules that should be kept in float32, also where there are none.
logging.getLogger("diffusers.models.modeling_utils").addFilter(lambda record: "float32: []" not in record.getMessage())

_DEFAULTS = ModelConfig(preset="XL/2")

# name: hidden_size, num_layers, num_attention_heads
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PRESETS = {
    f"{size}/{patch}": {"hidden_size": d, "num_layers": n, "num_attention_heads": h, "patch_size": patch}
    for size, (d, n, h) in SIZES.items()
    for patch in (1, 2, 4, 8, 16)
}


class TimeEmbedding(nn.Module):
    """Sinusoid of 256 features, then an MLP, all in fp32 whatever the weights' dtype: t (B,) in [0, 1] -> (B, D).

    The time enters unscaled, with frequencies ``10000 ** (-i / 128)`` (SiT; diffusers divides by 127 instead).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = Float32Linear(256, hidden_size)
        self.fc2 = Float32Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000) / 128 * steps)
        return self.fc2(F.silu(self.fc1(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class Head(nn.Module):
    """adaLN, then a linear map to pixels of a patch; starts at zero, and so does the model's output."""

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.norm = make_norm("layer", hidden_size, affine=False)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, out_features)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(conditioning))[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


@dataclass
class SiTTransformer2DModelOutput(Transformer2DModelOutput):
    """diffusers' output class: ``sample`` (B, C, H, W), and with taps ``hidden_states``, {k: (B, N + M, D)}."""

    hidden_states: dict[int, Tensor] | None = None


class SiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Class-conditional velocity network of SiT (arXiv 2401.08740) with a backbone by name.

    ``model(latents (B, C, H, W), timestep (B,) in [0, 1], class_labels (B,))`` returns the prediction (B, C, H, W).
    H and W may differ and may differ from `sample_size` (int or (H, W)); absolute positions are then resampled and
    rotary ones rescaled. `null_label` is the label of "no class"; see `has_null_label`.

    The forward pass never drops labels: the training loop draws the mask with `class_dropout_prob`, reproducibly, and
    hands in `null_label`. With `learn_sigma` the head has 2C channels, of which the second half is discarded (the
    published checkpoints). `backbone_kwargs` go to the backbone; see docs/extending.md.
    Raises `UserError` for values that do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTBlock", "ViT5Block"]  # noqa: RUF012 (diffusers' convention; FSDP wraps these)
    _repeated_blocks = _no_split_modules
    _group_offload_block_modules = ["backbone"]  # noqa: RUF012 (diffusers looks for blocks there too, not only on top)
    _skip_layerwise_casting_patterns = ["patch_embed", "pos_embed", "time_embed", "norm"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        backbone: str = _DEFAULTS.backbone,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = ASSUMED_CHANNELS,
        *,
        num_classes: int = ASSUMED_CLASSES,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        mlp_ratio: float = _DEFAULTS.mlp_ratio,
        class_dropout_prob: float = _DEFAULTS.class_dropout_prob,
        learn_sigma: bool = _DEFAULTS.learn_sigma,
        backbone_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # Refuse sizes that no layer can have.
        check_sizes(patch_size=patch_size, in_channels=in_channels, num_classes=num_classes)
        check_sizes(hidden_size=hidden_size, num_layers=num_layers, sample_size=max(to_2tuple(sample_size)))
        check_positive(mlp_ratio=mlp_ratio)
        if int(mlp_ratio * hidden_size) == 0:
            raise UserError(f"mlp_ratio: {mlp_ratio} of hidden_size {hidden_size} gives MLP width 0; choose e.g. 4.")
        if not 0 <= class_dropout_prob <= 1:
            raise UserError(f"class_dropout_prob: {class_dropout_prob} is not a probability; expected 0 to 1.")

        # Embeddings and head, as SiT initialises them; the backbone initialises itself.
        self._patch, self._channels, self._discard = patch_size, in_channels, learn_sigma
        self.null_label = num_classes
        self.patch_embed = nn.Linear(in_channels * patch_size**2, hidden_size)
        self.time_embed = TimeEmbedding(hidden_size)
        self.label_embed = nn.Embedding(num_classes + self.has_null_label, hidden_size)
        self.head = Head(hidden_size, patch_size**2 * in_channels * (2 if learn_sigma else 1))
        init_linears(self, "xavier")
        for layer in (self.time_embed.fc1, self.time_embed.fc2, self.label_embed):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.linear.weight)
        grid = patch_grid("latent size", to_2tuple(sample_size), patch_size)
        sizes = (hidden_size, num_layers, num_attention_heads, mlp_ratio, grid)
        self.backbone = plug = BACKBONES.build(backbone, backbone_kwargs or {}, "backbone_kwargs", *sizes)
        if isinstance(plug, Backbone):
            self._no_split_modules = self._repeated_blocks = sorted({type(block).__name__ for block in plug.blocks})

    @property
    def has_null_label(self) -> bool:
        """Whether `null_label` has a row of its own: the model was trained with label dropout."""
        return self.config.class_dropout_prob > 0

    @classmethod
    def from_preset(cls, name: str, backbone: str = _DEFAULTS.backbone, **overrides: Any) -> "SiTTransformer2DModel":
        """Build ``S/2`` ... ``XL/8`` (size / patch); `overrides` are further arguments of the constructor."""
        return cls(**{"backbone": backbone, **PRESETS[choose("preset", name, PRESETS)], **overrides})

    @property
    def _auto_class(self) -> str | None:  # diffusers then writes `auto_map`, which leads AutoModel to the stub
        return "AutoModel" if type(self) is SiTTransformer2DModel else None

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a configuration as diffusers does, without `auto_map`, which is no option of the model."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a folder as diffusers does, except that weights which do not fit are a `UserError`, not a warning."""
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except OSError as error:
            folder = Path(args[0] if args else kwargs["pretrained_model_name_or_path"], kwargs.get("subfolder") or "")
            if not (found := find_variants(folder)) or kwargs.get("variant") in found:
                raise
            reason = " ".join(str(error).split()).removesuffix(".")
            raise OSError(f"{reason}, only the variant {found[0]!r}; pass variant={found[0]!r}") from error
        except ValueError as error:
            if "expected shape" not in str(error):
                raise
            reason = str(error).split(" because ")[-1].split(". ")[0]
            raise UserError(f"checkpoint: {reason}; its config.json belongs to other weights.") from error
        # keys of another shape get here only by ignore_mismatched_sizes=True, that is, on purpose
        check_fit(cls.__name__, info["missing_keys"], info["unexpected_keys"], [], len(model.state_dict()))
        align(model)
        return (model, info) if output_loading_info else model

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines hand in only what stands in the signature
    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with the stub for AutoModel, and delete what it would leave of an earlier save."""
        if (args or (kwargs.get("is_main_process", True),))[0]:
            clear_weights(save_directory, kwargs.get("variant"))
            if self._auto_class:
                stub = "from vit5gen import SiTTransformer2DModel  # noqa: F401\n"
                write_text(Path(save_directory) / MODEL_STUB, stub)
        super().save_pretrained(save_directory, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # in diffusers' the option of the same name would hide the module
        return nn.Module.__getattr__(self, name) if name == "backbone" else super().__getattr__(name)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must spare: those that the backbone names (positions, registers)."""
        return {f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}

    @fast_inference()
    def forward(
        self,
        latents: Tensor,
        timestep: float | Tensor,
        class_labels: int | Tensor,
        taps: tuple[int, ...] = (),
        extra_tokens: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | tuple[Tensor] | tuple[Tensor, dict[int, Tensor]] | SiTTransformer2DModelOutput:
        """Return the prediction in the latents' dtype; with taps (k, ...) also ``{k: hidden state after k blocks}``.

        latents (B, C, H, W), timestep (B,) and class_labels (B,) int64, or one for all. Labels may also be rows of
        weights over the classes, floats (B, num_classes), or (B, num_classes + 1) with the null label.
        extra_tokens (B, M, D) take part in attention behind the N patches; hidden states (B, N + M, D) include them,
        the prediction does not.
        return_dict: None is this; False wraps what is no tuple in one; True returns diffusers' output class.
        Raises `UserError` for latents of another number of channels or of a size that `patch_size` does not divide,
        and for times or labels of another batch.
        """
        batch, channels, *size = latents.shape
        if channels != self._channels:
            raise UserError(f"latents: {channels} channels; this model takes in_channels={self._channels}.")
        p, grid = self._patch, patch_grid("latent size", size, self._patch)
        patches = rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        dtype = self.patch_embed.weight.dtype
        tokens = self.patch_embed(patches.to(dtype)).to(dtype)  # under autocast too
        # One time for the whole batch is embedded once.
        times, labels = _one_or_one_a_sample(latents, timestep=timestep, class_labels=class_labels)
        conditioning = (self.time_embed(times) + self._embed_labels(labels, batch)).to(dtype)
        hook: dict[str, Any] = {"taps": taps} if taps else {}
        hook |= {} if extra_tokens is None else {"extra_tokens": extra_tokens}
        out = self.backbone(tokens, conditioning, grid, **hook)
        x, hidden = out if taps else (out, {})
        x = rearrange(self.head(x, conditioning), "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=p, q=p)
        x = x[:, :channels].to(latents.dtype) if self._discard else x.to(latents.dtype)
        if return_dict:
            return SiTTransformer2DModelOutput(x, hidden or None)
        return (x, hidden) if taps else x if return_dict is None else (x,)

    def _embed_labels(self, labels: Tensor, batch: int) -> Tensor:
        """Return the embeddings (B, D) of ids (1,) or (B,), or mixed by rows of weights: exact where one weight is 1.

        A product of matrices would be less than exact under autocast and TF32.
        """
        if labels.dim() == 1:
            return self.label_embed(labels.expand(batch))
        if (width := labels.shape[1]) not in (self.null_label, self.null_label + 1):
            raise UserError(f"class_labels: {width} weights; expected one for each of the {self.null_label} classes")
        ids = torch.arange(self.null_label + self.has_null_label, device=labels.device)
        weights = F.pad(labels.float(), (0, len(ids) - width)).expand(batch, -1)
        return F.embedding_bag(
            ids.repeat(batch, 1), self.label_embed(ids).float(), per_sample_weights=weights.contiguous(), mode="sum"
        )


def _one_or_one_a_sample(latents: Tensor, **values: float | Tensor) -> Iterator[Tensor]:
    """Yield every value as a tensor (1,) or (B,) on the latents' device."""
    for name, value in values.items():
        tensor = torch.as_tensor(value, device=latents.device)
        mixed = name == "class_labels" and tensor.dim() == 2 and tensor.is_floating_point()  # rows of weights
        shape = tuple(tensor.shape)
        if shape[: 1 if mixed else None] not in ((), (1,), latents.shape[:1]):
            raise UserError(f"{name}: shape {shape}; expected a number or shape ({len(latents)},), one per sample.")
        yield tensor if mixed else tensor.reshape(-1)
