"""`vit5gen convert`."""

from typing import ClassVar

from vit5gen.commands.options import Options, Utf8Path, argument
from vit5gen.section import Width


class ConvertOptions(Options):
    """Turn a published SiT file, or a run's checkpoint, into a pipeline; VA-VAE's or ViT-5's into a folder."""

    excludes: ClassVar = {"num_attention_heads": ("weights",)}

    checkpoint: str = argument(..., "CHECKPOINT", "e.g. SiT-XL-2-256x256.pt, RUN or a checkpoint in it", option="")
    output: Utf8Path = argument(..., "FOLDER", "new folder")
    vae: str | None = argument(None, "VAE", "name or folder of the autoencoder, or none; default: SiT's, or the run's")
    weights: str | None = argument(None, "NAME", "weights of a run: ema_<decay> or model; default: its first average")
    num_attention_heads: Width | None = argument(None, "N", "heads of a SiT file whose width matches no preset")


def run(options: ConvertOptions) -> None:
    """Write the pipeline folder."""
    from vit5gen.training.export import export_pipeline

    export_pipeline(options.checkpoint, options.output, options.vae, options.weights, options.num_attention_heads)
