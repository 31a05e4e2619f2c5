"""What a reader needs to trust a file: the versions, hashes and settings behind it; a model's README."""

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from pydantic import Field

import vit5gen
from vit5gen.config import SamplingConfig
from vit5gen.generation.find_pipeline import PIPELINE, find_pipeline
from vit5gen.section import Section, validate
from vit5gen.system.errors import UserError
from vit5gen.system.files import read_json, sha256, write_json, write_text

# The parts of a pipeline folder that decide its images.
COMPONENTS = ("transformer", "guide", "scheduler", "vae")
README, FACTS, REPORT = "README.md", "card.json", "report.html"
IN_TRAINING = "evaluation in training"  # beside scores of evaluation cards
_HERE = "path/of/this/folder"  # where a pipeline is that has no name on the hub
_TASK = "unconditional-image-generation"  # the nearest of those that the hub knows
_DETAILS = ("n", "floor", "standard_error")
_MARKDOWN = re.compile(r"([|<>`*_\[\]\\])")
_FOLDERS = re.compile(r"""(^|file://|[\s=\[{(,;>|`'"](?<!base64,))~?/(?:[^\s,\]})'"]*/)?(?=[^\s,\]})'"/])""", re.M)
_SHOWN = re.compile(r'<(script|style)\b(?! type="application/json").*?</\1>|>[^<]+', re.DOTALL)  # of a page, or code
_MADE = re.compile(r"autoencoder: [^\n]*|^## Training\n\n```\n.*?\n```(?:\n\nIt began [^\n]*)?", re.M | re.S)
_URL = re.compile(r"""(\w+://)(?:[^/@\s]*@)?([^\s?'"]*)(?:\?[^\s'"]*)?""")


class TrainingFacts(Section):
    """What a model card contains beyond the configuration; `FACTS` keeps it beside the card.

    figures: an evaluation of training, or scores by name.  picture, report: files to copy next to the card, the report
    where it is published.  origin: what the weights began with, and its hash.  licence: as the hub names it.
    remark: what a reader must know to compare the figures.  sampling: settings that suit the model.  text: a card that
    an earlier version or a person wrote, to be kept.
    """

    command: str | None = None
    figures: dict[str, Any] = Field({})
    picture: Path | None = None
    report: Path | None = None
    origin: str | None = None
    licence: str | None = None
    remark: str | None = None
    dataset: str | None = None
    on_hub: bool = False
    num_images: int | None = None
    autoencoder: str | None = None
    sampling: SamplingConfig = SamplingConfig()
    versions: dict[str, str] | None = None
    text: str | None = None


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
    return _FOLDERS.sub(r"\1", _URL.sub(r"\1\2", text))


def read_facts(folder: Path) -> TrainingFacts:
    """Return what is known of a pipeline folder; raise `UserError` for a damaged `FACTS`."""
    told = read_json(folder / FACTS, "card") if (folder / FACTS).is_file() else {}
    known = {name: told[name] for name in TrainingFacts.model_fields if name in told}
    places = (folder, folder.parent) if folder.name == PIPELINE else (folder,)
    known["report"] = next((place / REPORT for place in places if (place / REPORT).is_file()), None)
    known["picture"] = next((one for one in folder.glob("*.png") if one.name == told.get("picture")), None)
    if (card := folder / README).is_file() and told.get("readme_sha256") != sha256(card):
        known["text"] = card.read_text(encoding="utf-8", errors="replace")
    return validate(TrainingFacts, known, f"card {folder / FACTS}")


def write_card(pipe: Any, folder: Path, facts: TrainingFacts | None = None, repo: str | None = None) -> None:
    """Write into the folder of a `SiTPipeline` its card, the facts behind it, and the pictures.

    facts: by default those that came with the weights.  repo: its name on the hub, which also gets the report.
    """
    name = pipe.config.get("_name_or_path")
    home = find_pipeline(name) if name else None
    facts = facts or (read_facts(home) if home else TrainingFacts())
    folder.mkdir(parents=True, exist_ok=True)
    named = (file for file in (home.glob("*.png") if home else ()) if file.name in (facts.text or ""))
    for file in [facts.picture, *named]:
        if file is not None and file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)

    # No path of this machine: what is written may be uploaded as it stands.
    if repo and facts.report:
        page = facts.report.read_text(encoding="utf-8")
        write_text(folder / REPORT, _SHOWN.sub(lambda part: part[0] if part[1] else names_only(part[0]), page))
    vae = "none" if pipe.vae is None else pipe.vae.config.get("_name_or_path") or type(pipe.vae).__name__
    given = {"command": facts.command, "origin": facts.origin, "autoencoder": facts.autoencoder or vae}
    clean = {key: names_only(value) for key, value in given.items() if value}
    facts = facts.model_copy(update={**clean, "versions": facts.versions or versions()})
    write_text(folder / README, model_card(pipe, facts, repo))
    told = facts.model_dump(mode="json", exclude_none=True, exclude={"picture", "report", "text"})
    told |= {"picture": facts.picture.name} if facts.picture else {}
    write_json(folder / FACTS, told | ({} if facts.text else {"readme_sha256": sha256(folder / README)}))


def forget_folders(folder: Path) -> None:
    """Take the folders of this machine out of the configurations in a pipeline folder; names stay."""
    for file in [folder / "model_index.json", *folder.glob("*/config.json")]:
        config = read_json(file, "configuration")
        if (name := names_only(before := str(config.get("_name_or_path", "")))) != before:
            write_json(file, config | {"_name_or_path": name})


def with_scores(
    facts: TrainingFacts, cards: Sequence[Mapping[str, Any]], weights: Sequence[str] | None = None
) -> TrainingFacts:
    """Return the facts with the scores of evaluation cards, and as "drawn" how their samples were drawn.

    weights: by `pipeline_hash`, those that may be scored.  Raises `UserError` for cards of others, or of other samples
    than the first card.
    """
    figures, sampling = dict(facts.figures), facts.sampling
    if cards and "step" in figures:
        figures = {IN_TRAINING: figures}
    for card in cards:
        one = card["samples"][0]
        drawn = one.get("sampling") or {}
        if weights is not None and (one.get("sha256") or drawn.get("checkpoint_sha256")) not in weights:
            raise UserError(f"evaluation of {one['path']}: of other weights; score RUN, or what is published")
        drawn = drawn.get("settings", drawn)
        settings = {key: drawn[key] for key in SamplingConfig.model_fields if key in drawn}
        told = {"images": one["count"], **settings} | {key: drawn[key] for key in ("precision", "seed") if key in drawn}
        if figures.setdefault("drawn", told) != told:
            raise UserError(f"evaluation of {one['path']}: other samples than those of the first card; draw them alike")
        figures |= card["metrics"]
        sampling = validate(SamplingConfig, settings, f"evaluation of {one['path']}")
    return facts.model_copy(update={"figures": figures, "sampling": sampling})


def model_card(pipe: Any, facts: TrainingFacts, repo: str | None = None) -> str:
    """Return the README of a `SiTPipeline`, card.jinja filled in; or the text that is kept, completed for the hub.

    Raises `UserError` for a kept text whose front matter is no YAML.
    """
    config, names = pipe.transformer.config, pipe.config.id2label
    results = list(_results(facts))
    data = ModelCardData(
        license=facts.licence or "other",
        license_name=None if facts.licence else "not-chosen",
        library_name="diffusers",
        pipeline_tag=_TASK,
        tags=["vit5gen", "flow-matching", "class-conditional"],
        datasets=[facts.dataset] if facts.dataset and facts.on_hub else None,
        model_name=(repo or config.backbone).split("/")[-1] if results else None,
        eval_results=results or None,
    )
    if facts.text is not None:
        return facts.text if repo is None else _completed(facts.text, data, repo)
    chosen = {"class_labels": names.get(0, 0), **facts.sampling.model_dump(exclude_defaults=True)}
    chosen |= {} if pipe.vae else {"output_type": "latent"}
    shown = {"transformer": _plain(config), "scheduler": _plain(pipe.scheduler.config), "versions": facts.versions}
    card = ModelCard.from_template(
        data,
        str(Path(__file__).with_name("card.jinja")),
        pipe=pipe,
        config=config,
        facts=facts,
        where=repo or _HERE,
        report=REPORT if repo and facts.report else None,
        millions=f"{sum(parameter.numel() for parameter in pipe.transformer.parameters()) / 1e6:.3g}",
        arguments=", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items()),
        classes={i: _MARKDOWN.sub(r"\\\1", " ".join(name.split())) for i, name in names.items()},
        figures={name: _cell(value) for name, value in facts.figures.items()},
        attribution=pipe.config.get("attribution"),
        configuration=json.dumps(shown, indent=2, default=str),
    )
    return f"{card}\n"


def _completed(text: str, data: ModelCardData, repo: str) -> str:
    """Return a card whose front matter has what it lacks of ``data``, and the licence if one was chosen."""
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{README}: its front matter is not valid ({error}); correct it, or delete the file") from error
    chosen = data["license"] != "other" or not card.data.get("license")
    for key, value in vars(data).items():
        if chosen if key.startswith("license") else not card.data.get(key):
            card.data[key] = value
    card.text = _MADE.sub(lambda part: names_only(part[0]), card.text).replace(_HERE, repo)
    return str(card)


def _results(facts: TrainingFacts) -> Iterator[EvalResult]:
    """Yield the figures that the hub shows: scores, each with number of images and floor, and the held-out loss."""
    for told in (facts.figures.get(IN_TRAINING, {}), facts.figures):
        for name, one in told.items():
            score = one if isinstance(one, dict) else {"value": one} if name == "held_out_loss" else {}
            if isinstance(value := score.get("value"), int | float):
                details = {"step": told.get("step")} | {key: score.get(key) for key in _DETAILS}
                details = {key: detail for key, detail in details.items() if detail is not None}
                data = facts.dataset or "unknown"
                shown = f"{name} ({_cell(details)})" if details else name
                kind = "loss" if name == "held_out_loss" else name.lower()
                yield EvalResult(_TASK, data, data, kind, value, metric_name=shown, metric_args=details or None)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}
