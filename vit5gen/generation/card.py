"""What a reader needs to trust a file: the versions, hashes and settings behind it; a model's README."""

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from pydantic import TypeAdapter, ValidationError

import vit5gen
from vit5gen.config import SamplingConfig
from vit5gen.generation.find_pipeline import PIPELINE, find_pipeline
from vit5gen.system.errors import UserError
from vit5gen.system.files import read_json, sha256, write_json, write_text

# The parts of a pipeline folder that decide its images.
COMPONENTS = ("transformer", "guide", "scheduler", "vae")
README, FACTS, REPORT = "README.md", "card.json", "report.html"
IN_TRAINING = "evaluation in training"  # a name in the figures that have scores of evaluation cards besides
CITATION = """@software{vit5gen,
  title   = {vit5gen: class-conditional image generation by flow matching with pluggable transformer backbones},
  author  = {{The vit5gen authors}},
  year    = {2026},
  url     = {https://github.com/vit5gen/vit5gen}
}"""
_INSTALL = 'pip install "git+https://github.com/vit5gen/vit5gen"'
_HERE = "path/of/this/folder"  # where a card that is not on the hub says that the pipeline is
_TASK = "unconditional-image-generation"  # of those that the hub knows, the nearest
_FEW, _FOLDED = 100_000, 20  # training images by which a model may be repeated; class names that are shown at once
_PLACE = re.compile(r"""(^|[\s=\[{(,'"])~?/(?:[^\s,\]})'"]*/)?(?=[^\s,\]})'"/])""", re.MULTILINE)
_URL = re.compile(r"""(\w+://)(?:[^/@\s]*@)?([^\s?'"]*)(?:\?[^\s'"]*)?""")


@dataclass(frozen=True)
class TrainingFacts:
    """What a model card contains beyond the configuration; `FACTS` keeps it beside the card.

    figures: an evaluation of training, or scores by name.  picture: path of a PNG to copy next to the card, as is the
    report where it is published.  origin: what the weights began with, and its hash.  licence: as the hub names it.
    remark: what a reader must know to compare the figures.  dataset: a name, on the hub or not.  sampling: settings
    that suit the model.  text: of a card that somebody has written, to be kept.
    """

    command: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    picture: Path | None = None
    origin: str | None = None
    licence: str | None = None
    remark: str | None = None
    dataset: str | None = None
    on_hub: bool = False
    num_images: int | None = None
    autoencoder: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    report: Path | None = None
    text: str | None = None


_FACTS = TypeAdapter(TrainingFacts)
_OF_A_FOLDER = {"report", "text"}  # found there


def versions() -> dict[str, str]:
    """Return the versions of everything that can change an image."""
    own = {"vit5gen": vit5gen.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    return own | {name: importlib.metadata.version(name) for name in ("diffusers", "timm", "numpy")}


def commit() -> str:
    """Return the commit of the source tree, with ``-dirty`` if that was changed; without one the package's version."""
    folder = Path(vit5gen.__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed package may lie in another repository
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return str(vit5gen.__version__)


def pipeline_hash(folder: Path) -> str:
    """Return one SHA-256 over the weights and configurations of a pipeline folder; its README does not count."""
    digest = hashlib.sha256()
    for file in sorted(path for name in COMPONENTS for path in (folder / name).rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


def names_only(text: str) -> str:
    """Return the text in which absolute paths have lost their folders, and URLs what may be secret."""
    return _PLACE.sub(r"\1", _URL.sub(r"\1\2", text))


def read_facts(folder: Path | None) -> TrainingFacts:
    """Return what is known of a pipeline folder; None is known of nothing.

    Raises `UserError` for a `FACTS` that is damaged.
    """
    if folder is None:
        return TrainingFacts()
    told: dict[str, Any] = read_json(folder / FACTS, "card") if (folder / FACTS).is_file() else {}
    known = {one.name: told[one.name] for one in fields(TrainingFacts) if one.name in told}
    picture = folder / Path(str(known.get("picture"))).name
    known["picture"] = picture if picture.is_file() else None
    reports = (folder / REPORT, folder.parent / REPORT) if folder.name == PIPELINE else (folder / REPORT,)
    known["report"] = next((file for file in reports if file.is_file()), None)
    # A card of an earlier version, or one that somebody has edited, keeps its text.
    card = folder / README
    if card.is_file() and told.get("readme_sha256") != sha256(card):
        known["text"] = card.read_text(encoding="utf-8", errors="replace")
    try:
        return _FACTS.validate_python(known)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"card {folder / FACTS}: {where}: {problem['msg']}; delete the file, or restore it") from None


def write_card(pipe: Any, folder: Path, facts: TrainingFacts | None = None, repo: str | None = None) -> None:
    """Write into the folder of a `SiTPipeline` its card, the facts behind it and the picture.

    facts: by default those that came with the weights.  repo: its name on the hub, which gets the report, too.
    """
    name = pipe.config.get("_name_or_path")
    home = find_pipeline(name) if name else None
    facts = facts or read_facts(home)
    folder.mkdir(parents=True, exist_ok=True)
    for file in [facts.picture, facts.report if repo else None, *(home.glob("*.png") if home else ())]:
        if file is not None and file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)

    # No path of this machine: what is written may be uploaded as it stands.
    vae = "none" if pipe.vae is None else pipe.vae.config.get("_name_or_path") or type(pipe.vae).__name__
    facts = replace(
        facts,
        command=facts.command and names_only(facts.command),
        origin=facts.origin and names_only(facts.origin),
        autoencoder=facts.autoencoder or names_only(vae),
        versions=facts.versions or versions(),
    )
    write_text(folder / README, model_card(pipe, facts, repo) if facts.text is None else _completed(facts, repo))
    told = _FACTS.dump_python(facts, mode="json", exclude=_OF_A_FOLDER) | {
        "picture": facts.picture and facts.picture.name
    }
    own = {"readme_sha256": sha256(folder / README)} if facts.text is None else {}
    write_json(folder / FACTS, {key: value for key, value in told.items() if value not in (None, {})} | own)


def forget_folders(folder: Path) -> None:
    """Take the folders of this machine out of the configurations in a pipeline folder; names stay."""
    for file in folder.glob("*/config.json"):
        before = read_json(file, "configuration")
        after = {key: names_only(value) if isinstance(value, str) else value for key, value in before.items()}
        if after != before:
            write_json(file, after)


def with_scores(facts: TrainingFacts, cards: Sequence[Mapping[str, Any]]) -> TrainingFacts:
    """Return the facts with the scores of evaluation cards, and as "drawn" how their first set of samples was drawn.

    Raises `UserError` for a card that is none, or of other samples than the first.
    """
    found: dict[str, Any] = {}
    for card in cards:
        try:
            one = card["samples"][0]
            drawn = (one["sampling"] or {}).get("settings", one["sampling"] or {})
            settings = {key: value for key, value in drawn.items() if key in SamplingConfig.model_fields}
            further = {key: drawn[key] for key in ("precision", "seed") if key in drawn}
            told, scores = {"images": one["count"], **settings, **further}, dict(card["metrics"])
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise UserError(
                "an evaluation card has no samples or metrics; expected one of `vit5gen evaluate`"
            ) from error
        if found.setdefault("drawn", told) != told:
            raise UserError(f"evaluation of {one['path']}: other samples than those of the first card; draw them alike")
        found |= scores
        facts = replace(facts, sampling=facts.sampling | settings)
    trained = {IN_TRAINING: facts.figures} if "step" in facts.figures and found else facts.figures
    return replace(facts, figures=trained | found)


def check_weights(cards: Sequence[Mapping[str, Any]], expected: set[str]) -> None:
    """Raise `UserError` for an evaluation card of weights with another `pipeline_hash` than those expected."""
    for one in (one for card in cards for one in card["samples"]):
        if (one.get("sha256") or (one["sampling"] or {}).get("checkpoint_sha256")) not in expected:
            raise UserError(f"evaluation of {one['path']}: of other weights; score RUN, or what is published")


def model_card(pipe: Any, facts: TrainingFacts, repo: str | None = None) -> str:
    """Return the README of a `SiTPipeline`: front matter for the hub, then what the headings below say."""
    config, (height, width) = pipe.transformer.config, pipe.image_size
    size = sum(parameter.numel() for parameter in pipe.transformer.parameters()) / 1e6
    drawn = f"images of {height} x {width} pixels" if pipe.vae is not None else "latents (it has no autoencoder)"
    parts = [
        f"---\n{_front_matter(facts, repo or config.backbone).to_yaml()}\n---",
        f"# SiT with a {config.backbone} backbone\n\n"
        f"Draws {drawn} in {config.num_classes} classes by flow matching, with {size:.3g} million parameters. "
        f"Latents of {config.in_channels} channels and side {config.sample_size}; autoencoder: {facts.autoencoder}.",
    ]
    # What is known only of some models stands between what every card has.
    parts += [f"![samples]({facts.picture.name})"] if facts.picture else []
    parts += [f"[{REPORT}]({REPORT}) shows the training; download it and open it."] if repo and facts.report else []
    parts.append(_use(pipe, facts, repo or _HERE))
    parts.append(_classes(pipe.config.id2label, config.num_classes))
    if facts.figures:
        rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.figures.items())
        parts.append(f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}")
        parts += [facts.remark] if facts.remark else []
    parts += _training(facts)
    parts.append(_limitations(facts))
    parts.append("## Licence\n\n" + (f"`{facts.licence}`" if facts.licence else _UNLICENSED))
    if line := pipe.config.get("attribution"):
        parts.append(f"## Attribution\n\n{line}\n\nThis line goes with the weights and with all that they draw.")
    parts.append(f"## Citation\n\n```bibtex\n{CITATION}\n```")
    shown = {"transformer": _plain(config), "scheduler": _plain(pipe.scheduler.config), "versions": facts.versions}
    parts.append(f"## Configuration\n\n```json\n{json.dumps(shown, indent=2, default=str)}\n```")
    return "\n\n".join(parts) + "\n"


_UNLICENSED = (
    "The author has not chosen a licence yet, so nobody else may pass these weights on. Author: choose one with "
    "`vit5gen publish --license ID`."
)


def _front_matter(facts: TrainingFacts, name: str) -> ModelCardData:
    results = _results(facts)
    return ModelCardData(
        license=facts.licence or "other",
        license_name=None if facts.licence else "not-chosen",
        library_name="diffusers",
        pipeline_tag=_TASK,
        tags=["vit5gen", "flow-matching", "class-conditional"],
        datasets=[facts.dataset] if facts.dataset and facts.on_hub else None,
        model_name=name.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _results(facts: TrainingFacts) -> list[EvalResult]:
    """Return the figures that the hub can show: scores, each with its number of images and floor, and the loss."""
    inner = facts.figures.get(IN_TRAINING, {})
    found = []
    for told, name, one in [
        *((inner, *item) for item in inner.items()),
        *((facts.figures, *i) for i in facts.figures.items()),
    ]:
        score = one if isinstance(one, dict) else {"value": one} if name == "held_out_loss" else {}
        if isinstance(score.get("value"), int | float):
            details = {"step": told.get("step")} | {key: score.get(key) for key in ("n", "floor", "standard_error")}
            details = {key: value for key, value in details.items() if value is not None}
            data = facts.dataset or "unknown"
            result = EvalResult(
                task_type=_TASK,
                dataset_type=data if facts.on_hub else re.sub(r"\W+", "-", data),
                dataset_name=data,
                metric_type="loss" if name == "held_out_loss" else name.lower(),
                metric_value=score["value"],
                metric_name=f"{name} ({_cell(details)})" if details else name,
                metric_args=details or None,
            )
            found.append(result)
    return found


def _use(pipe: Any, facts: TrainingFacts, where: str) -> str:
    defaults = SamplingConfig.model_fields
    chosen = {key: value for key, value in facts.sampling.items() if value != defaults[key].default}
    options = {"class_labels": pipe.class_name(0)} | chosen | ({"output_type": "latent"} if pipe.vae is None else {})
    given = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items())
    draw = f"pipe({given}).images[0]"
    draw += "" if pipe.vae is None else '.save("image.png")'
    return (
        f"## Use\n\n```sh\n{_INSTALL}\n```\n\n```python\nfrom vit5gen import SiTPipeline\n\n"
        f'pipe = SiTPipeline.from_pretrained("{where}")\n{draw}\n```\n\n'
        "With vit5gen installed, code that knows only diffusers loads it too; `trust_remote_code` runs the one line of "
        f'`pipeline.py`:\n\n```python\nfrom diffusers import DiffusionPipeline\n\nplace = "{where}"\n'
        "pipe = DiffusionPipeline.from_pretrained(place, custom_pipeline=place, trust_remote_code=True)\n```"
    )


def _classes(names: Mapping[int, str], count: int) -> str:
    if not names:
        return f"## Classes\n\nThe ids 0 to {count - 1}, without names."
    shown = {i: re.sub(r"([|<>`*_\[\]\\])", r"\\\1", " ".join(str(name).split())) for i, name in names.items()}
    table = "\n".join(["| id | name |", "|---|---|", *(f"| {i} | {name} |" for i, name in shown.items())])
    if len(names) > _FOLDED:
        table = f"<details><summary>{len(names)} names</summary>\n\n{table}\n\n</details>"
    return f"## Classes\n\n{table}"


def _training(facts: TrainingFacts) -> list[str]:
    lines = [f"```\n{facts.command}\n```"] if facts.command else []
    if facts.dataset:
        count = "" if facts.num_images is None else f", {facts.num_images} images"
        link = f"[{facts.dataset}](https://huggingface.co/datasets/{facts.dataset})" if facts.on_hub else facts.dataset
        lines.append(f"Data set: {link}{count}.")
    lines += [f"It began with the weights of {facts.origin}."] if facts.origin else []
    return ["## Training\n\n" + "\n\n".join(lines)] if lines else []


def _limitations(facts: TrainingFacts) -> str:
    lines = ["It draws the classes above and nothing else, at the size above; it takes no text."]
    if facts.num_images is not None:
        lines.append(f"It was trained on {facts.num_images} images and shares their gaps and biases.")
    if facts.num_images is None or facts.num_images < _FEW:
        lines.append("A model of few images can repeat them: `vit5gen copies` compares samples with training images.")
    if facts.figures:
        lines.append("The metrics are the author's own; nobody else has verified them.")
    if any(name.startswith("FD-") for name in [*facts.figures, *facts.figures.get(IN_TRAINING, {})]):
        told = "is a Frechet distance, lower is better, but of another network than that of FID"
        floor = "The floor is the distance of as many real images that training has not seen"
        lines.append(f"FD {told}: the two are not comparable, nor are two of different numbers of images. {floor}.")
    lines.append("Nothing filters what it draws.")
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)


def _completed(facts: TrainingFacts, repo: str | None) -> str:
    """Return the text of a card that somebody has written, with the front matter that the hub wants."""
    text = str(facts.text)
    if repo is None:
        return text
    try:
        card = ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{README}: its front matter is not valid ({error}); correct it, or delete the file") from error
    made = _front_matter(replace(facts, licence=facts.licence or card.data.get("license")), repo)
    if facts.licence:
        card.data.pop("license_name")
    for key, value in vars(made).items():
        if value and (key in ("license", "eval_results", "model_name") or not card.data.get(key)):
            card.data[key] = value
    card.text = card.text.replace(_HERE, repo).replace(
        _UNLICENSED, f"`{facts.licence}`" if facts.licence else _UNLICENSED
    )
    return str(card)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}
