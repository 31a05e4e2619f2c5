"""What is behind ``vit5gen classify``: top-1 and top-5 of a published ViT-5 on a folder of images."""

from pathlib import Path

import timm
import torch
import torchvision
from torchvision.transforms import v2

from .errors import UserError, choose
from .models import load_vit5
from .models.classifier import default_cfgs

HELP = """\
Top-1 and top-5 accuracy of ViT-5 over FOLDER, which has one folder of images a class, in the order of the classes.
Published preprocessing: shorter side to the model's size (bicubic), centre crop (crop ratio 1.0), ImageNet mean and std;
bf16 on a GPU. Expected top-1 on the ImageNet-1k validation set, for the files of huggingface.co/FengWang3211/ViT-5:
vit5_small 82.2, vit5_base 84.2, vit5_base at 384 pixels 85.4, vit5_large 84.9, vit5_large at 384 pixels 86.0."""


@torch.inference_mode()
def classify(
    folder: str | Path,
    model: str,
    checkpoint: str | Path,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | None = None,
) -> dict[str, float]:
    """Return ``{"top1": percent, "top5": percent, "num_images": n}``.

    The size of the images is the one the checkpoint was built for. Raises `UserError` when the model is not known, the
    checkpoint is of another model, or the folder's classes are not as many as the checkpoint's.
    """
    names = sorted({name.split(".")[0] for name in default_cfgs})
    choose("--model", model, names)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net = load_vit5(checkpoint).eval().to(where)
    with torch.device("meta"):
        named = timm.create_model(model)
    if (net.embed_dim, len(net.blocks)) != (named.embed_dim, len(named.blocks)):
        raise UserError(
            f"--checkpoint: {len(net.blocks)} blocks of width {net.embed_dim}; {model} has {len(named.blocks)} of "
            f"{named.embed_dim}: give the --model that the file belongs to."
        )
    config = named.pretrained_cfg
    size = net.patch_embed.img_size[0]
    transform = v2.Compose(
        [
            v2.Resize(int(size / config["crop_pct"]), v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )
    try:
        images = torchvision.datasets.ImageFolder(str(folder), transform)
    except FileNotFoundError as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"FOLDER: {str(folder)!r} holds no folders of images ({reason}).") from error
    if len(images.classes) != net.num_classes:
        raise UserError(
            f"FOLDER: {str(folder)!r} holds {len(images.classes)} classes, the checkpoint {net.num_classes}; "
            "a folder's place in the order is its label, so all must be there."
        )
    loader = torch.utils.data.DataLoader(images, batch_size, num_workers=num_workers)
    ranks = []
    for pixels, labels in loader:
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            logits = net(pixels.to(where)).float()
        own = logits.gather(1, labels.to(where)[:, None])
        ranks.append((logits > own).sum(dim=1).cpu())
    rank = torch.cat(ranks)
    hits = {f"top{k}": 100 * (rank < k).double().mean().item() for k in (1, 5)}
    return {**hits, "num_images": len(rank)}
