"""`vit5gen convert`."""

from typing import ClassVar

from vit5gen.commands.options import Lengths, Options, Utf8Path, argument
from vit5gen.section import Classes, UserPath, Width


class ConvertOptions(Options):
    """Turn a published SiT file, or a run's checkpoint, into a pipeline; VA-VAE's or ViT-5's into a folder."""

    excludes: ClassVar = dict.fromkeys(
        ("num_attention_heads", "num_classes", "drop_prefix", "reversed_time"), ("weights", "ema_length")
    ) | {"ema_length": ("weights",)}

    checkpoint: UserPath = argument(..., "CHECKPOINT", "e.g. SiT-XL-2-256x256.pt, RUN or a checkpoint in it", option="")
    output: Utf8Path = argument(..., "FOLDER", "new folder")
    vae: UserPath | None = argument(
        None, "VAE", "name or folder of the autoencoder, or none; default: SiT's or the run's"
    )
    weights: str | None = argument(None, "NAME", "weights of a run: ema_<decay> or model; default: its first average")
    ema_length: Lengths | None = argument(
        None, "L", "lengths of averages to rebuild from a run's snapshots, e.g. 0.05,0.1; several: folders in FOLDER"
    )
    num_attention_heads: Width | None = argument(None, "N", "heads of a SiT file whose width matches no preset")
    num_classes: Classes | None = argument(None, "N", "classes of a SiT file; tells whether it has a null row")
    drop_prefix: list[str] = argument([], "PREFIX", "leave out weights of a SiT file that begin so, e.g. projectors.")
    reversed_time: bool = argument(False, "", "time of a SiT file runs from data (0) to noise (1), as in REPA's files")


def run(options: ConvertOptions) -> None:
    """Write the pipeline folder."""
    from vit5gen.training.export import export_pipeline

    export_pipeline(**options.model_dump())
