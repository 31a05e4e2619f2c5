"""The command line: ``vit5gen train | encode | sample | evaluate | convert | classify | ...``.

Parsing only: a command imports its module when it runs, so that ``--help`` answers at once.
Bad input ends as one line on standard error and exit code 2.
"""

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from pydantic import BaseModel

from vit5gen.config import Config, EvaluationConfig, SamplingConfig, load_config, parse_yaml, validate
from vit5gen.lab.benchmark import NAMES as BENCHMARKS
from vit5gen.system.errors import UserError, nearest, short

_CLASSIFY_HELP = """\
Top-1 and top-5 accuracy of ViT-5 over FOLDER, which has one folder of images a class, in the order of the classes.
Published preprocessing: shorter side to the model's size (bicubic), centre crop (crop ratio 1.0), ImageNet mean and
std; bf16 on a GPU. Expected top-1 on the ImageNet-1k validation set, with the files of
huggingface.co/FengWang3211/ViT-5: S (vit5_small) 82.2, B (vit5_base) 84.2, B-384 85.4, L (vit5_large) 84.9, L-384 86.0.
"""


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises `UserError` where that one prints its usage and exits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` lists the options")


def utf8_path(text: str) -> str:
    """Return the path of an output; safetensors can write one that is no UTF-8, but cannot read it again."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8, which weights need; choose another path") from None
    return text


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Print a `UserError` as one line on standard error and exit with code 2; likewise what the machine refuses.

    Names that the terminal cannot show are printed as escapes: they must not end a command that has done its work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except OSError as error:
        _exit(f"{error.filename or 'this machine'}: {error.strerror or error}; check the path, its rights and the disk")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        _exit("out of memory; choose smaller sizes or batches, see `vit5gen train CONFIG --dry-run`")


def _exit(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _sections() -> dict[str, type[BaseModel]]:
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def _add_key(group: Any, option: str, section: type[BaseModel], key: str) -> None:
    field = section.model_fields[key]
    default = "" if field.default is None else f" [{field.default}]"
    kinds = [field.annotation, *get_args(field.annotation)]
    choices = [" | ".join(map(str, get_args(kind))) for kind in kinds if get_origin(kind) is Literal]
    text = f"{': '.join([str(field.description), *choices])}{default}".replace("%", "%%")
    group.add_argument(option, dest=option, metavar="VALUE", default=argparse.SUPPRESS, help=text)


def _value(section: type[BaseModel], key: str, option: str, text: str) -> Any:
    """Read an option's text as YAML, unless its key takes a string."""
    kind = section.model_fields[key].annotation
    if kind is str or (kind == str | None and text != "null"):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"{option} = {short(text)} is not valid YAML; expected e.g. 3, '[a, b]' or '{{key: 1}}'"
        ) from error


def add_config(parser: argparse.ArgumentParser) -> None:
    """Take CONFIG, and make every key of it an option ``--section.key VALUE``."""
    parser.usage = "%(prog)s CONFIG --output PATH [--section.key VALUE ...] [other options]"
    parser.add_argument("config", metavar="CONFIG", help="YAML file, e.g. configs/quickstart.yaml")
    for name, section in _sections().items():
        group = parser.add_argument_group(name, section.__doc__)
        for key in section.model_fields:
            _add_key(group, f"--{name}.{key}", section, key)


def read_config(args: argparse.Namespace) -> Config:
    """Load CONFIG with the keys that were given as options."""
    sections = _sections()
    overrides = {}
    for option, text in vars(args).items():
        if option.startswith("--") and "." in option:
            name, key = option[2:].split(".")
            overrides[option[2:]] = _value(sections[name], key, option, text)
    return load_config(args.config, overrides)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Make every key of the section ``sampling`` an option ``--key-with-dashes VALUE``."""
    group = parser.add_argument_group("sampling", SamplingConfig.__doc__)
    for key in SamplingConfig.model_fields:
        _add_key(group, f"--{key.replace('_', '-')}", SamplingConfig, key)


def read_sampling(args: argparse.Namespace) -> SamplingConfig:
    """Collect the options of `add_sampling`."""
    given = {}
    for key in SamplingConfig.model_fields:
        option = f"--{key.replace('_', '-')}"
        if option in args:
            given[key] = _value(SamplingConfig, key, option, getattr(args, option))
    return validate(SamplingConfig, given, "sampling")


def train(args: argparse.Namespace) -> int:
    if args.dry_run:
        from vit5gen.training.dry_run import plan

        return plan(read_config(args))
    if args.output is None:
        args.parser.error("the following arguments are required: --output")
    from vit5gen.training.loop import train

    return train(read_config(args), args.output, args.resume, args.accept_changes)


def encode(args: argparse.Namespace) -> None:
    from vit5gen.data.latents import encode_command

    encode_command(read_config(args), args.output)


def sample(args: argparse.Namespace) -> None:
    from vit5gen.generation.many import sample_command

    sample_command(
        args.checkpoint,
        args.num_images,
        args.seed,
        args.output,
        args.classes,
        args.batch_size,
        read_sampling(args),
        args.labels,
        args.precision,
        args.compile,
        args.guide,
        args.autoguidance_scale,
    )


def evaluate(args: argparse.Namespace) -> int:
    from vit5gen.evaluation.evaluate import evaluate_command

    return evaluate_command(
        args.samples,
        args.reference,
        args.output,
        args.save_statistics,
        args.extractor,
        args.weights,
        args.weights_sha256,
        args.metrics,
        args.protocol,
        args.batch_size,
        args.num_images,
        args.seed,
        args.labels,
        read_sampling(args),
    )


def convert(args: argparse.Namespace) -> None:
    from vit5gen.commands.convert import convert_command

    convert_command(args.checkpoint, args.output, args.vae, args.weights, args.num_attention_heads)


def classify(args: argparse.Namespace) -> None:
    from vit5gen.commands.classify import classify

    result = classify(args.folder, args.model, args.checkpoint, args.batch_size, args.num_workers)
    print(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, {result['num_images']:.0f} images")


def study(args: argparse.Namespace) -> int:
    from vit5gen.commands.study import run_until_stopped

    return run_until_stopped(args.config, args.output)


def autoencoder(args: argparse.Namespace) -> None:
    from vit5gen.commands.autoencoder import train_from_file

    train_from_file(args.config, args.output)


def benchmark(args: argparse.Namespace) -> None:
    from vit5gen.lab.benchmark.command import benchmark_command

    benchmark_command(args.output, args.sit, args.vit5, args.trained, args.only, args.quick)


def build_parser() -> Parser:
    """Build the parser of all commands."""
    about = "Train, sample and evaluate class-conditional image generators. Exit code 2: bad input, told in one line."
    parser = Parser(prog="vit5gen", description=about)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(function: Any, text: str, description: str | None = None) -> Parser:
        sub: Parser = commands.add_parser(function.__name__, help=text, description=description or text)
        sub.set_defaults(run=function, parser=sub)
        return sub

    evaluation = EvaluationConfig()

    sub = command(train, "train a model; run again, it goes on from its newest checkpoint")
    add_config(sub)
    sub.add_argument("--output", type=utf8_path, metavar="RUN", help="folder of the run; only --dry-run goes without")
    sub.add_argument("--resume", metavar="WHERE", default="auto", help="auto | never | a checkpoint folder [auto]")
    sub.add_argument("--accept-changes", action="store_true", help="resume although the configuration differs")
    sub.add_argument("--dry-run", action="store_true", help="write nothing: check, estimate, list what is missing")

    sub = command(encode, "encode images once to latent shards")
    add_config(sub)
    sub.add_argument(
        "--output", type=utf8_path, metavar="FOLDER", required=True, help="folder of the shards and their manifest"
    )

    sub = command(sample, "draw images from a run or a pipeline folder; run again, it goes on where it stopped")
    sub.add_argument("--checkpoint", metavar="RUN", required=True, help="folder of a run, or a pipeline folder")
    sub.add_argument("--num-images", type=int, metavar="N", required=True, help="number of images")
    sub.add_argument("--seed", type=int, default=evaluation.seed, help=f"[{evaluation.seed}]")
    sub.add_argument("--output", metavar="FILE|FOLDER", required=True, help="FILE.png (grid), FILE.npz, or a folder")
    sub.add_argument(
        "--class",
        dest="classes",
        nargs="+",
        action="extend",
        metavar="CLASS",
        help="names or ids of classes; default: all",
    )
    sub.add_argument("--labels", default="balanced", help="balanced | random, both fixed by the seed [balanced]")
    sub.add_argument("--batch-size", type=int, default=evaluation.batch_size, help=f"[{evaluation.batch_size}]")
    sub.add_argument("--precision", default="fp32", help="fp32 | tf32 | bf16, of the network alone [fp32]")
    sub.add_argument("--compile", action="store_true", help="compile the network")
    sub.add_argument("--guide", metavar="RUN", help="run or pipeline folder of autoguidance's weaker model")
    sub.add_argument("--autoguidance-scale", type=float, default=1.0, metavar="VALUE", help="1 = off [1]")
    add_sampling(sub)

    sub = command(evaluate, "score images against a reference, or build a reference")
    sub.add_argument(
        "samples", nargs="+", help="ADM npz, folder of images, run or pipeline folder; several: mean and std"
    )
    sub.add_argument("--reference", metavar="REF", help="ADM npz, statistics file, folder of images, or configuration")
    sub.add_argument("--output", metavar="CARD.json", help="card with every setting and number")
    sub.add_argument("--save-statistics", metavar="FILE", help="build a reference from SAMPLES instead")
    sub.add_argument("--extractor", default="inception", help="inception | effnet-lite0 [inception]")
    sub.add_argument("--weights", metavar="FILE", help="weights of the extractor; default: its cache, or a download")
    sub.add_argument("--weights-sha256", metavar="HASH", help="expected hash of --weights, if not the published file")
    sub.add_argument("--metrics", nargs="+", metavar="NAME", help="default: all that the inputs allow")
    sub.add_argument(
        "--protocol", metavar="adm", help="adm: ADM's metrics and settings; printed as FID-50K only if all is met"
    )
    sub.add_argument("--batch-size", type=int, default=50, help="[50]")
    sub.add_argument("--num-images", type=int, default=50_000, help="of a run or pipeline folder [50000]")
    sub.add_argument("--seed", type=int, nargs="+", default=[0], help="of a run; several give mean and deviation [0]")
    sub.add_argument("--labels", default="balanced", help="of a run or pipeline folder: balanced | random [balanced]")
    add_sampling(sub)

    sub = command(convert, "turn a published SiT file, or a run's checkpoint, into a pipeline folder")
    sub.add_argument("checkpoint", help="e.g. SiT-XL-2-256x256.pt, RUN, or RUN/checkpoints/step_00000010")
    sub.add_argument("--output", type=utf8_path, metavar="FOLDER", required=True, help="new pipeline folder")
    sub.add_argument("--vae", help="name or folder of the autoencoder, or none; default: SiT's, or the run's")
    sub.add_argument("--weights", help="of a run: ema_<decay> or model; default: its first average")
    sub.add_argument("--num-attention-heads", type=int, help="of a SiT file whose width is no preset's")

    sub = command(classify, "top-1 and top-5 of a published ViT-5 classifier", _CLASSIFY_HELP)
    sub.add_argument("folder", help="folder of class folders, e.g. ImageNet's val")
    sub.add_argument("--model", required=True, help="vit5_small | vit5_base | vit5_large | vit5_xlarge")
    sub.add_argument("--checkpoint", metavar="FILE", required=True, help="published .pth file")
    sub.add_argument("--batch-size", type=int, default=64, help="[64]")
    sub.add_argument("--num-workers", type=int, default=0, help="[0]")

    sub = command(study, "train and score every run of a study, one at a time; run again, it resumes where it stopped")
    sub.add_argument("config", metavar="CONFIG", help="YAML file, e.g. configs/studies/backbones.yaml")
    sub.add_argument("--output", metavar="FOLDER", required=True, help="folder of rows.jsonl, table, plot and runs")

    sub = command(autoencoder, "train a small autoencoder of images")
    sub.add_argument("config", metavar="CONFIG", help="YAML of AutoencoderTraining, e.g. configs/vae/emoji.yaml")
    sub.add_argument("--output", type=Path, metavar="FOLDER", required=True, help="folder of the trained AutoencoderKL")

    sub = command(benchmark, "measure against published code, side by side, and write ratios")
    sub.add_argument("--sit", metavar="PATH", help="checkout of willisma/SiT, whose code is then run")
    sub.add_argument("--vit5", metavar="PATH", help="checkout of wangf3014/ViT-5, whose code is then run")
    sub.add_argument("--run", dest="trained", metavar="RUN", help="folder of a run, for the benchmark sampling")
    sub.add_argument("--only", metavar="NAME", help=f"{' | '.join(BENCHMARKS)}; default: all")
    sub.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its figures mean nothing")
    sub.add_argument("--output", metavar="FILE.json", required=True, help="result; a table FILE.md is put beside it")
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 2 bad input (one line on standard error), 130 Ctrl-C, or a code of its own."""
    try:
        with exit_on_bad_input():
            args, unknown = build_parser().parse_known_args(argv)
            if unknown:
                prog, known = args.parser.prog, args.parser._option_string_actions
                hint = nearest(unknown[0].split("=")[0], known)
                raise UserError(
                    f"{prog}: unknown argument {short(unknown[0])}.{hint} `{prog} --help` lists the options"
                )
            sys.exit(args.run(args) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
