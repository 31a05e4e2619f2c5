"""Train an image classifier, a ViT-5 or any model of timm, on one process or many. Read it from top to bottom.

Offline, minutes of one core (`--data emoji`, or fashion-mnist with the folder of its idx files as --data-path):

    python examples/train_classifier.py --data emoji --output runs/emoji-tiny --img-size 32 --epochs 4 --loss ce \\
        --warmup-epochs 1 --batch-size 64 --model-kwargs patch_size=8 embed_dim=96 depth=4 num_heads=3

ImageNet-1k, as ViT-5's code trains it (arXiv 2602.08071), in folders DATA/train/CLASS and DATA/val/CLASS. The defaults
are those of S, but for the average, which must not warm up: timm's warm-up is at .99984 after 500,000 steps. A later
stage starts from an earlier one's average, `--initial OUTPUT/weights.safetensors`:

    accelerate launch --num_processes 8 --mixed_precision bf16 examples/train_classifier.py --average-warmup 0 \\
        --data DATA --output OUTPUT

    stage        options, all with --average-warmup 0                                        published  H100 hours
    S  224                                                                                        82.2          96
    B  192       --model vit5_base --img-size 192 --lr 3e-3 --drop-path .2                                     270
    B  224, 384  --model vit5_base --img-size 224 (384) --drop-path .25 FINETUNE            84.2, 85.4       9, 29
    L  192       --model vit5_large --img-size 192 --lr 3e-3 --drop-path .35 --epochs 400                      480
    L  224, 384  --model vit5_large --img-size 224 (384) --drop-path .5 FINETUNE            84.9, 86.0     32, 100
    FINETUNE     --epochs 20 --batch-size 512 --optimizer adamw --lr 1e-5 --weight-decay .1 --repeats 1 --loss ce
                 --smoothing .1 --augment rand-m9-mstd0.5-inc1

Hours of S: measured by others (82.07 %; NVIDIA-BioNeMo/nvSubquadratic); the others follow from the FLOPs. What 384
starts from is not published: take 224's average. The only published command of FINETUNE is that of S (drop path .05),
for which no figure at 384 is published. The rate follows every step here, every epoch there. Also useful:
`--num-workers 10`, and on fewer GPUs `--accumulate N`.

OUTPUT gets weights.safetensors (the average, for `vit5gen classify` and `timm.create_model(checkpoint_path=...)`),
card.json and last.pt. The same command resumes after the last whole epoch: bit for bit on one CPU process with the same
--num-workers and --accumulate, because the random numbers of an epoch depend on (seed, epoch, rank) alone.
"""

import argparse
import shlex
import sys
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from checks import reading
from classifier_options import parse, same_settings, settings_of
from labelled import Pictures, open_data, selected
from safetensors.torch import save_file
from scipy.stats import binomtest
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.data.distributed_sampler import RepeatAugSampler
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import vit5gen.models  # noqa: F401  # registers vit5_* with timm
from vit5gen.cli import exit_on_bad_input
from vit5gen.generation.card import commit, versions
from vit5gen.models.weights import read_checkpoint, read_tensors
from vit5gen.system.errors import UserError, choose
from vit5gen.system.files import atomic, read_json, write_json


def create_model(options: argparse.Namespace, num_classes: int) -> nn.Module:
    """Build the model and load `--initial`: positions are resampled, a head of other classes is left out.

    Raises `UserError` for sizes that no such model has, and a file of which any other part does not fit.
    """
    if not timm.is_model(options.model):
        raise UserError(f"--model {options.model}: not known to timm; see timm.list_models()")
    config = timm.get_pretrained_cfg(options.model)
    kwargs = {"img_size": options.img_size} if config.fixed_input_size else {}
    kwargs |= ({"drop_path_rate": options.drop_path} if options.drop_path else {}) | options.model_kwargs
    with reading("--model, --model-kwargs, --img-size, --drop-path"):
        model = timm.create_model(options.model, **kwargs, num_classes=num_classes)
    if options.initial:
        state, heads = read_checkpoint(options.initial), np.atleast_1d(config.classifier)
        classes = len(state.get(f"{heads[0]}.weight", ()))
        overlay = {"state_dict": state, "num_classes": classes}
        # With the file's own number of classes timm wants every key to fit.
        with reading(f"--initial {options.initial}, --model, --model-kwargs"):
            found = timm.create_model(
                options.model, **kwargs, num_classes=classes, pretrained=True, pretrained_cfg_overlay=overlay
            ).state_dict()
        own = {key: value for key, value in model.state_dict().items() if key.split(".")[0] in heads}
        model.load_state_dict(found if classes == num_classes else found | own)
    return model


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, num_classes: int, accelerator: Accelerator) -> Tensor:
    """Return (3, K): of every class the number of held-out images, and how many of them are in top-1 and top-5."""
    counts = torch.zeros(3, num_classes, dtype=torch.int64)
    for images, labels in loader:
        with accelerator.autocast():
            best = model(images.to(accelerator.device)).topk(min(5, num_classes)).indices.cpu() == labels[:, None]
        counts.index_add_(1, labels, torch.stack([torch.ones_like(labels), best[:, 0].long(), best.any(1).long()]))
    return accelerator.reduce(counts.to(accelerator.device), "sum").cpu()


def share(hits: Tensor, total: Tensor) -> dict[str, float]:
    """Return a share with Wilson's 95 % interval."""
    test = binomtest(int(hits.sum()), int(total.sum()))
    low, high = test.proportion_ci(method="wilson")
    return {"value": test.statistic, "low": low, "high": high}


def train(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Train from the last whole epoch in OUTPUT to the end; return the card."""
    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
    rank, world, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    data, held_out, names, attribution = open_data(options)
    torch.manual_seed(options.seed)
    model = create_model(options, len(names)).to(accelerator.device)
    size, rest = divmod(options.batch_size, world * options.accumulate)
    mixes = max(options.mixup, options.cutmix) > 0
    if rest or (mixes and size % 2):
        raise UserError(
            f"--batch-size {options.batch_size}: {world * options.accumulate} parts of it must be whole, even"
        )
    if choose("--loss", options.loss, ("bce", "ce")) == "bce" and options.smoothing:
        raise UserError(f"--smoothing {options.smoothing}: is for --loss ce; omit it")

    # Images as timm prepares them, to train on and to test on; pictures of the package have their size already.
    use = resolve_model_data_config(model)
    common = {"input_size": options.img_size} | {key: use[key] for key in ("interpolation", "mean", "std")}
    augment = {"auto_augment": options.augment or None, "color_jitter": options.color_jitter, "hflip": options.hflip}
    with reading("--augment, --color-jitter, --hflip, --least-crop"):
        data.transform = create_transform(**common, **augment, is_training=True, scale=(options.least_crop, 1.0))
    common["crop_pct"] = 1.0 if isinstance(held_out, Pictures) else use["crop_pct"]
    held_out.transform = create_transform(**common)
    data = selected(data, options.train_images, options.balanced)
    sampler = RepeatAugSampler(data, world, rank, num_repeats=options.repeats, selected_round=0)
    loader = DataLoader(data, size, sampler=sampler, num_workers=options.num_workers, drop_last=True)
    tested = DataLoader(Subset(held_out, range(rank, len(held_out), world)), size, num_workers=options.num_workers)
    # BCE asks of a mixture whether a class is in it at all, CE for its share.
    ce = nn.CrossEntropyLoss(label_smoothing=options.smoothing)
    criterion = ce if options.loss == "ce" else BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    mix = Mixup(options.mixup, options.cutmix, label_smoothing=0.0, num_classes=len(names)) if mixes else None
    if not (steps := len(loader) // options.accumulate):
        raise UserError(f"--batch-size {options.batch_size}: more than the {len(data)} training images; lower it")

    # The average, which is what is tested and kept, and the optimizer, whose rate is set before each step.
    average = ModelEmaV3(model, options.average, use_warmup=bool(options.average_warmup))
    decays = {"weight_decay": options.weight_decay, "layer_decay": options.layer_decay}
    with reading("--optimizer, --weight-decay, --layer-decay"):
        raw = create_optimizer_v2(model, options.optimizer, options.lr, eps=1e-8, **decays)
    rates = {"warmup_epochs": options.warmup_epochs, "warmup_lr": 1e-6, "min_lr": min(1e-5, options.lr)}
    rates |= {"step_on_epochs": False, "updates_per_epoch": steps}
    with reading("--epochs, --warmup-epochs, --lr"):
        schedule, _ = create_scheduler_v2(raw, "cosine", options.epochs, **rates)
    parallel, optimizer = accelerator.prepare(model, raw)

    # What a kill left: last.pt is of the end of an epoch, whole or not there.
    settings, log, last = settings_of(options), [], options.output / "last.pt"
    if last.is_file():
        try:
            state = read_tensors(last, "--output")
            same, log = same_settings(state["settings"], settings), state["log"]
            for part, saved in ((model, "model"), (average.module, "average"), (optimizer, "optimizer")):
                part.load_state_dict(state[saved]) if same else None
        except (UserError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{last}: is damaged; delete it to begin again") from error
        if not same:
            raise UserError(f"--output {options.output}: holds a run with other settings; choose another folder")

    for epoch in range(len(log), options.epochs):
        set_seed(int(np.random.SeedSequence([options.seed, epoch, rank]).generate_state(1)[0]))
        sampler.set_epoch(1_000_003 * options.seed + epoch)
        parallel.train()
        batches, total = iter(loader), torch.zeros((), device=accelerator.device)
        for step in tqdm(range(steps), f"epoch {epoch + 1}", leave=False, disable=not is_main or None):
            schedule.step_update(epoch * steps + step)
            for _ in range(options.accumulate):
                images, labels = (part.to(accelerator.device) for part in next(batches))
                images, targets = mix(images, labels) if mix else (images, labels)
                with accelerator.accumulate(parallel):
                    loss = criterion(parallel(images), targets)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                total += loss.detach() / (steps * options.accumulate)
            average.update(model, epoch * steps + step + 1 if options.average_warmup else None)
        if not np.isfinite(mean := accelerator.reduce(total, "mean").item()):
            raise UserError(f"epoch {epoch + 1}: the loss is {mean}; lower --lr and choose another --output")
        counts = evaluate(average.module, tested, len(names), accelerator)
        top1, top5 = (share(hits, counts[0]) for hits in counts[1:])
        log = [*log, {"epoch": epoch + 1, "loss": mean, "top1": top1["value"]}]

        # After every epoch there are weights and a card; what a run resumes from comes last.
        if is_main:
            per_class = dict(zip(names, (counts[1] / counts[0].clamp(min=1)).tolist(), strict=True))
            card = {"command": command, "commit": commit(), "seed": options.seed, "top1": top1, "top5": top5}
            parameters = sum(weight.numel() for weight in model.parameters())
            sizes = {"train": len(data), "held_out": int(counts[0].sum()), "parameters": parameters}
            card |= {"counts": sizes, "classes": per_class, "settings": settings, "input": common, "log": log}
            weights = average.module.state_dict()
            with atomic(options.output / "weights.safetensors") as file:
                save_file({key: value.contiguous() for key, value in weights.items()}, file)
            write_json(options.output / "card.json", card | {"attribution": attribution, "versions": versions()})
            state = {"model": model.state_dict(), "average": weights, "optimizer": raw.state_dict()}
            with atomic(last) as file:
                torch.save(state | {"settings": settings, "log": log}, file)
            shown = f"top-1 {top1['value']:.2%} [{top1['low']:.2%}, {top1['high']:.2%}], top-5 {top5['value']:.2%}"
            print(f"epoch {epoch + 1} of {options.epochs}: loss {mean:.4f}, {shown}", flush=True)
        accelerator.wait_for_everyone()
    if not (file := options.output / "card.json").is_file():
        raise UserError(f"{file}: is missing beside a finished run; delete {last.name} to train again")
    return read_json(file, "card")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    words = sys.argv[1:] if arguments is None else arguments
    with exit_on_bad_input():
        return train(parse(words, __doc__), shlex.join(["python", "examples/train_classifier.py", *words]))


if __name__ == "__main__":
    main()
