"""Semantic segmentation with UperNet on the features of a ViT-5 classifier. Read it from top to bottom.

    python examples/segment.py --data scenes --sizes 96 4 3 8 --crop 64 --channels 32 --batch-size 8 --num-steps 400 \
        --warmup 50 --every 100 --rate 1e-3 --output runs/scenes           # offline, minutes on one core
    accelerate launch --num_processes 8 examples/segment.py --data ADEChallengeData2016 \
        --classifier vit5_base_patch16_224.pth --output runs/ade20k
    python examples/segment.py --weights runs/ade20k/segmenter.safetensors --data ADEChallengeData2016 \
        --stride 341 --flip --output runs/ade20k-sliding                   # measure again, with a sliding window
    python examples/segment.py --weights runs/scenes/segmenter.safetensors --predict IMAGES --output masks

pairs.py says what a folder of --data holds, scenes.py what the scenes are. The same command resumes an interrupted run.

Published: mIoU 52.0 on ADE20K for ViT-5-L (arXiv 2602.08071), without code, schedule or cost. The defaults here are
XCiT's recipe (arXiv 2106.09681), on which DeiT-III's segmentation is based: crop 512, batch 16, 160,000 steps, AdamW
6e-5, weight decay 0.01, warm-up 1,500 steps, then linearly to zero, drop path 0.05 (0.15 for L), UperNet (arXiv
1807.10221) of 512 channels, whole images. Cost for S | B | L, counted, not timed: 54 | 128 | 353 M parameters, 0.50 |
0.68 | 1.22 TFLOPs to segment 512 x 512 pixels, 3.8 | 5.2 | 9.4 EFLOPs for the training.
"""

import argparse
import itertools
import json
import math
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast
from checks import check_ranges, dashed, plain
from matrix import class_iou, confusion, mean_iou
from overlays import write_masks
from pairs import GREY, IGNORED, Augmented, mixed, open_data, scaled
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.ops import Conv2dNormActivation as Block
from torchvision.transforms import v2

from vit5gen.cli import Parser, exit_on_bad_input
from vit5gen.generation.card import commit, versions
from vit5gen.models import ViT5, load_vit5
from vit5gen.models.weights import load_exactly, read_checkpoint
from vit5gen.system.distributed import is_main, on_main, rank_and_world, start_processes, sum_over_processes
from vit5gen.system.errors import UserError, check_whole, listed
from vit5gen.system.files import atomic, sha256, write_json, write_text
from vit5gen.system.precision import PRECISIONS, resolve
from vit5gen.training.checkpoint import newest_valid, read_config
from vit5gen.training.trainer import Trainer

# --- The network: features of four blocks, rescaled to four levels, joined from coarse to fine. ----------------------


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def classify(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, classes, 1))


class UperHead(nn.Module):
    """UperNet's decoder: four levels (B, D, h, w), (B, D, h/2, w/2), ... -> logits (B, K, h, w)."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        pool = nn.AdaptiveAvgPool2d
        self.pools = nn.ModuleList(nn.Sequential(pool(n), Block(width, channels, 1)) for n in (1, 2, 3, 6))
        self.bottleneck = Block(width + 4 * channels, channels, 3)
        self.laterals = nn.ModuleList(Block(width, channels, 1) for _ in range(3))
        self.outputs = nn.ModuleList(Block(channels, channels, 3) for _ in range(3))
        self.join = Block(4 * channels, channels, 3)
        self.classify = classify(channels, classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        # Beside the coarsest level stand its averages over 1, 4, 9 and 36 parts: what the whole image is about.
        top = levels[-1]
        pooled = [resize(pool(top), top.shape[-2:]) for pool in self.pools]
        path = [self.bottleneck(torch.cat([top, *pooled], 1))]
        # Each finer level adds to its own features what the coarser one knows.
        for i in (2, 1, 0):
            path.insert(0, self.laterals[i](levels[i]) + resize(path[0], levels[i].shape[-2:]))
        maps = [*(output(level) for output, level in zip(self.outputs, path, strict=False)), path[-1]]
        return self.classify(self.join(torch.cat([resize(one, maps[0].shape[-2:]) for one in maps], 1)))


class Segmenter(nn.Module):
    """Images (B, 3, H, W) uint8 -> logits (B, K, 4H/P, 4W/P) for patches P; in training also the auxiliary head's."""

    def __init__(self, backbone: ViT5, channels: int, classes: int) -> None:
        super().__init__()
        # Of 12 blocks those after 4, 6, 8 and 12, of 24 twice these; what comes after the last is not needed.
        depth, width = len(backbone.blocks), backbone.embed_dim
        self.blocks = [max(1, depth * part // 12) - 1 for part in (4, 6, 8, 12)]
        backbone.prune_intermediate_layers(sorted(set(self.blocks)), prune_norm=True)
        self.backbone, self.patch_size = backbone, backbone.patch_size
        # A plain transformer has one scale: two levels are made finer, and one coarser.
        twice, again, once = (nn.ConvTranspose2d(width, width, 2, 2) for _ in range(3))
        finest = nn.Sequential(twice, nn.BatchNorm2d(width), nn.GELU(), again)
        self.neck = nn.ModuleList([finest, once, nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])
        self.head = UperHead(width, channels, classes)
        self.auxiliary = nn.Sequential(Block(width, channels // 2, 3), classify(channels // 2, classes))
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Any:
        x, wanted = (images - self.mean) / self.std, sorted(set(self.blocks))
        found = self.backbone.forward_intermediates(x, wanted, intermediates_only=True)
        levels = [scale(found[wanted.index(i)]) for scale, i in zip(self.neck, self.blocks, strict=True)]
        logits = self.head(levels)
        return (logits, self.auxiliary(levels[2])) if self.training else logits


def start(options: argparse.Namespace, names: list[str]) -> tuple[Segmenter, dict[str, Any]]:
    """Return a segmenter to train, on a classifier or from scratch, and the facts from which `load` makes its like.

    A classifier's positions are resampled to the crop's grid, and its rotations run over that grid.
    Raises `UserError` for a classifier of other sizes than --sizes, where both are given.
    """
    keys = ("embed_dim", "depth", "num_heads", "patch_size", "in_chans")
    given = dict(zip(keys, [*options.sizes, 3], strict=True)) if options.sizes else {}
    built = {"img_size": options.crop, "drop_path_rate": options.drop_path}
    backbone = load_vit5(options.classifier, **built) if options.classifier else ViT5(**built, **given)
    width, channels = backbone.embed_dim, backbone.patch_embed.proj.in_channels
    found = (width, len(backbone.blocks), width // backbone.head_dim, backbone.patch_size, channels)
    sizes = dict(zip(keys, found, strict=True))
    if sizes != (wanted := given or sizes | {"in_chans": 3}):
        raise UserError(f"--classifier {options.classifier}: has {sizes}; expected {wanted}, see --sizes")
    ratio = backbone.blocks[0].mlp.fc1.out_features / width
    sizes |= {"img_size": options.crop, "num_registers": backbone.num_reg_tokens, "mlp_ratio": ratio}
    facts = {"backbone": sizes, "channels": options.channels, "names": names}
    return Segmenter(backbone, options.channels, len(names)), facts


def load(path: Path) -> tuple[Segmenter, dict[str, Any]]:
    """Return a segmenter that `train` wrote, and its facts; raise `UserError` for any other file."""
    state = read_checkpoint(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["segmenter"])
    except (TypeError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"--weights {path}: is no segmenter of this script; give RUN/segmenter.safetensors") from error
    model = Segmenter(ViT5(**facts["backbone"]), facts["channels"], len(facts["names"]))
    load_exactly(model, state)
    return model.eval(), facts


# --- Measuring: one matrix of integers says everything, however many processes fill it. ------------------------------


def starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin that cover `length`; the last one ends at its end."""
    return sorted({min(i, length - window) for i in range(0, length - window + stride, stride)})


def logits_of(model: Any, image: Tensor, crop: int, stride: int) -> Tensor:
    """Return logits (K, H, W) of an image (3, H, W): whole for stride 0, else the mean over windows of side `crop`."""
    height, width = image.shape[1:]
    sides = [max(crop, n) if stride else -(-n // model.patch_size) * model.patch_size for n in (height, width)]
    image = v2.functional.pad(image, [0, 0, sides[1] - width, sides[0] - height], GREY)
    window = [crop, crop] if stride else sides
    total, count = (torch.zeros((), dtype=torch.float64, device=image.device) for _ in range(2))
    for top, left in itertools.product(*(starts(a, b, stride or 1) for a, b in zip(sides, window, strict=True))):
        part = image[None, :, top : top + window[0], left : left + window[1]]
        logits = resize(model(part).float(), window)[0]
        around = (left, sides[1] - window[1] - left, top, sides[0] - window[0] - top)
        # In float64 the mean of equal numbers is that number.
        total, count = total + F.pad(logits.double(), around), count + F.pad(torch.ones_like(logits[:1]), around)
    return (total / count).float()[:, :height, :width]


@torch.inference_mode()
def predict(model: Any, options: argparse.Namespace, image: Tensor) -> Tensor:
    """Return the class of every pixel (H, W) of an image (3, H, W) uint8 of any size."""
    shown = v2.functional.resize(image.to(options.device), scaled(image.shape[1:], options.crop), antialias=True)
    with PRECISIONS[options.precision].autocast(options.device):
        views = [logits_of(model, shown, options.crop, options.stride)]
        if options.flip:
            views.append(logits_of(model, shown.flip(-1), options.crop, options.stride).flip(-1))
    return sum(resize(one[None], image.shape[1:])[0].softmax(0) for one in views).argmax(0)


def evaluate(model: Segmenter, pairs: Any, options: argparse.Namespace) -> Tensor:
    """Return the confusion matrix of all pairs, which the processes share among them."""
    rank, world = rank_and_world()
    matrix = torch.zeros(len(pairs.names), len(pairs.names), dtype=torch.int64)
    own = DataLoader(Subset(pairs, range(rank, len(pairs), world)), batch_size=None, num_workers=options.workers)
    model.eval()
    for image, mask in own:
        matrix += confusion(predict(model, options, image).cpu(), mask, len(pairs.names))
    model.train()
    if not (matrix := sum_over_processes(matrix)).any():
        raise UserError("--data: every pixel of the validation masks is ignored, so that nothing can be measured")
    return matrix


# --- Learning: cross-entropy of every pixel, AdamW, and a state to resume from: on one CPU process bit for bit. ------


def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the pixels that are not ignored; 0 where all are."""
    total = F.cross_entropy(resize(logits.float(), mask.shape[1:]), mask, ignore_index=IGNORED, reduction="sum")
    return total / (mask != IGNORED).sum().clamp(min=1)


def train(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Train from the newest checkpoint in `options.output` to the end; measure and save every `options.every` steps."""
    (rank, world), device, output = rank_and_world(), options.device, options.output
    batch, left = divmod(options.batch_size, world)
    if left or batch < 2:
        raise UserError(f"--batch-size {options.batch_size}: expected a multiple of {world}, 2 or more a process")
    pairs, held_out = (open_data(options.data, split, options.crop) for split in ("training", "validation"))

    # The network; as in XCiT's recipe positions and norms do not decay, nor do biases here.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model, facts = start(options, pairs.names)
    kept = [f"backbone.{name}" for name in model.backbone.no_weight_decay()]
    groups = param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=kept)
    optimizer = torch.optim.AdamW(groups, lr=options.rate)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model
    trainer = Trainer(accelerator := Accelerator(mixed_precision="no"), model, optimizer, {"model": model})
    if found := on_main(lambda: newest_valid(output / "checkpoints")):
        if changed := [key for key, value in read_config(found).items() if settings.get(key) != value]:
            raise UserError(f"--output {output}: began with other {listed(changed)}; give the same, or a new folder")
        trainer.restore(found)

    # Samples are numbered through the whole training, and every process reads its part of each batch.
    total, samples = options.batch_size, Augmented(pairs, options.seed, options.crop)
    parts = [range(n, n + batch) for n in range(trainer.step * total + rank * batch, options.num_steps * total, total)]
    for images, masks in DataLoader(samples, batch_sampler=parts, num_workers=options.workers):
        trainer.step = step = trainer.step + 1
        torch.manual_seed(mixed(options.seed, step, rank))  # what is dropped
        rate = options.rate * min(1.0, step / max(1, options.warmup)) * (1 - (step - 1) / options.num_steps)
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        masks = masks.to(device)
        with PRECISIONS[options.precision].autocast(device):
            logits, auxiliary = trainer.network(images.to(device))
        loss = cross_entropy(logits, masks) + 0.4 * cross_entropy(auxiliary, masks)
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

        measured = step % options.every == 0 or step == options.num_steps
        if measured or step % 50 == 0:
            if not math.isfinite(mean := accelerator.reduce(loss.detach(), "mean").item()):
                raise UserError(f"step {step}: the loss is {mean}; lower --rate and choose another --output")
            accelerator.print(f"step {step} of {options.num_steps}: loss {mean:.4f}, rate {rate:.2e}", flush=True)
        if not measured:
            continue
        # On CPUs each process has normed its own images: the main one's statistics count.
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer))
        matrix = evaluate(model, held_out, options)
        record = {"step": step, "loss": mean, "miou": mean_iou(matrix)}
        trainer.data = {"evaluations": [*trainer.data.get("evaluations", []), record]}
        accelerator.print(f"step {step}: mIoU {record['miou']:.2%}", flush=True)
        # There are weights and a card at any time; what a run resumes from comes last.
        if is_main():
            with atomic(output / "segmenter.safetensors") as file:
                safetensors.torch.save_file(model.state_dict(), file, {"segmenter": json.dumps(facts)})
            write_card(matrix, held_out, output, {"settings": settings, **trainer.data, "trained_on": len(pairs)})
        trainer.save(output / "checkpoints", yaml.safe_dump(settings))


def write_card(matrix: Tensor, pairs: Any, output: Path, more: dict[str, Any]) -> None:
    """Write what was measured, and from what: card.json, and the matrix in confusion.csv."""
    found = {"miou": mean_iou(matrix), "iou": dict(zip(pairs.names, class_iou(matrix), strict=True))}
    found |= {"pixel_accuracy": int(matrix.diag().sum()) / int(matrix.sum()), "pixels": int(matrix.sum())}
    found |= {"images": len(pairs), "attribution": pairs.attribution, "command": shlex.join(["python", *sys.argv])}
    write_text(output / "confusion.csv", "".join(",".join(map(str, row)) + "\n" for row in matrix.tolist()))
    write_json(output / "card.json", found | more | {"commit": commit(), "versions": versions()})


def run(options: argparse.Namespace, given: set[str]) -> None:
    """Train, measure the segmenter of --weights or predict with it; `UserError` if the options `given` do not fit."""
    if options.weights and (without := sorted(given & ({*TRAINING, "classifier", "sizes"}))):
        raise UserError(f"--weights is there to measure or to --predict: omit {listed(map(dashed, without))}")
    if options.predict and options.data:
        raise UserError("--predict and --data: predicting needs no data; omit one")
    least = {"crop": 1, "channels": 2, "num_steps": 1, "every": 1, "warmup": 0, "seed": 0, "workers": 0}
    for name, value in least.items():
        check_whole(f"{dashed(name)} =", getattr(options, name), value)
    check_ranges(options, {"rate": (1e-12, 1e9), "weight_decay": (0, 1e9), "drop_path": (0, 1)})
    options.device = start_processes().device
    options.precision = resolve(options.precision, options.device)
    PRECISIONS[options.precision].set_products()
    if options.weights:
        model, facts = load(options.weights)
        model, options.crop = model.to(options.device), facts["backbone"]["img_size"]
    check_whole("--stride =", options.stride, 0, options.crop)
    if options.weights is None:
        if options.predict or not options.data or not (options.classifier or options.sizes):
            raise UserError("training needs --data and --classifier or --sizes, --predict and measuring need --weights")
        # What may not change when a training is resumed.
        others = ("output", "workers", "predict", "device")
        settings = {name: value for name, value in vars(options).items() if name not in others}
        settings["classifier_sha256"] = options.classifier and sha256(options.classifier)
        return train(options, plain(settings))
    if options.predict:
        segment = partial(predict, model, options)
        return on_main(lambda: write_masks(options.predict, segment, facts["names"], options.output))
    if (pairs := open_data(options.data or "scenes", "validation", options.crop)).names != facts["names"]:
        asked = f"--data {options.data}" if options.data else "--data is not given, so that scenes are taken"
        raise UserError(f"{asked}: its classes are not those of {options.weights}; give its own data")
    matrix = evaluate(model, pairs, options)
    if is_main():
        used = {name: getattr(options, name) for name in ("weights", "stride", "flip", "precision", "crop")}
        used |= {"data": options.data or "scenes", "weights_sha256": sha256(options.weights)}
        write_card(matrix, pairs, options.output, {"settings": plain(used)})
        print(f"mIoU {mean_iou(matrix):.2%} of {len(pairs)} images")


# The numbers of a training, and those of measuring as well.
TRAINING = {"crop": 512, "channels": 512, "batch_size": 16, "num_steps": 160000, "every": 16000, "warmup": 1500}
TRAINING |= {"rate": 6e-5, "weight_decay": 0.01, "drop_path": 0.05, "seed": 0}
NUMBERS = {**TRAINING, "stride": 0, "workers": 0}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", metavar="scenes|FOLDER")
    parser.add_argument("--classifier", type=Path, metavar="FILE", help="ViT-5's weights to begin with")
    sizes = ("WIDTH", "DEPTH", "HEADS", "PATCH")
    parser.add_argument("--sizes", type=int, nargs=4, metavar=sizes, help="of a ViT-5 without --classifier")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a segmenter to measure, or to --predict with")
    parser.add_argument("--predict", type=Path, nargs="+", metavar="IMAGES", help="images, or folders of them")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    for name, value in NUMBERS.items():
        parser.add_argument(dashed(name), type=type(value), default=argparse.SUPPRESS, help=f"[{value}]")
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image when measuring")
    parser.add_argument("--precision", choices=["auto", "fp32", "tf32", "bf16"], default="auto")
    with exit_on_bad_input():
        given = vars(parser.parse_args(arguments))
        names = {name for name, value in given.items() if value is not None}
        run(argparse.Namespace(**NUMBERS | given), names)


if __name__ == "__main__":
    main()
