"""`vit5gen classify`."""

from typing import Literal

from vit5gen.commands.options import Options, argument
from vit5gen.config import DataConfig
from vit5gen.section import BatchSize, Small, UserPath


class ClassifyOptions(Options):
    """Top-1 and top-5 of a published ViT-5 classifier.

    Top-1 and top-5 accuracy over FOLDER, which has one folder of images per class, in the order of the classes.
    Published preprocessing: shorter side to the model's size (bicubic), centre crop (crop ratio 1.0), ImageNet mean and
    std; bf16 on a GPU. Expected top-1 on the ImageNet-1k validation set, with the files of
    huggingface.co/FengWang3211/ViT-5: S (vit5_small) 82.2, B (vit5_base) 84.2, B-384 85.4, L (vit5_large) 84.9,
    L-384 86.0.
    """

    folder: UserPath = argument(..., "FOLDER", "folder of class folders, e.g. ImageNet's val", option="")
    model: Literal["vit5_small", "vit5_base", "vit5_large", "vit5_xlarge"] = argument(..., "NAME", "model of the file")
    checkpoint: UserPath = argument(..., "FILE", "published .pth file")
    batch_size: BatchSize = argument(64, "N", "images per batch")
    num_workers: Small = argument(DataConfig().num_workers, "N", "processes that read images; 0 = this process reads")


def run(options: ClassifyOptions) -> None:
    """Classify the images and print how many are right."""
    from vit5gen.evaluation.accuracy import classify

    result = classify(**options.model_dump())
    print(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, {result['num_images']:.0f} images")
