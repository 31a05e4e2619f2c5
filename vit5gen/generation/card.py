"""What a reader needs to trust a file: the versions, hashes and settings behind it; a model's README."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import vit5gen
from vit5gen.system.files import sha256

# The parts of a pipeline folder that decide its images.
_COMPONENTS = ("transformer", "guide", "scheduler", "vae")


@dataclass(frozen=True)
class TrainingFacts:
    """What a model card contains beyond the configuration.

    picture: path of a PNG to copy next to it.  origin: what the weights began with, and its hash.  licence: as the hub
    names it.  remark: what a reader must know to compare the metrics.
    """

    command: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    picture: Path | None = None
    origin: str | None = None
    licence: str | None = None
    remark: str | None = None


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
    for file in sorted(path for name in _COMPONENTS for path in (folder / name).rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


def model_card(
    transformer: dict[str, Any], scheduler: dict[str, Any], vae: str, facts: TrainingFacts, attribution: str | None
) -> str:
    """Return the README of a pipeline folder: front matter for the hub, use, metrics, training, attribution, sizes."""
    licence = f"license: {facts.licence}\n" if facts.licence else ""
    parts = [
        f"---\n{licence}library_name: diffusers\npipeline_tag: unconditional-image-generation\n"
        "tags:\n- vit5gen\n- flow-matching\n- class-conditional\n---",
        f"# SiT with a {transformer['backbone']} backbone\n\n"
        f"{transformer['num_classes']} classes, latents of {transformer['in_channels']} channels and side "
        f"{transformer['sample_size']}, autoencoder: {vae}.",
    ]
    # What is known only of some models stands between what every card has: how to use it, and its sizes.
    if facts.picture is not None:
        parts.append(f"![samples]({facts.picture.name})")
    parts.append(
        "## Use\n\n```python\nfrom vit5gen import SiTPipeline\n\n"
        'pipe = SiTPipeline.from_pretrained("path/of/this/folder")\n'
        'pipe(class_labels=0).images[0].save("image.png")\n```'
    )
    if facts.metrics:
        rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.metrics.items())
        parts.append(f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}")
        parts += [facts.remark] if facts.remark else []
    if facts.command:
        began = f"\n\nIt began with the weights of {facts.origin}." if facts.origin else ""
        parts.append(f"## Training\n\n```\n{facts.command}\n```{began}")
    if attribution:
        parts.append(f"## Attribution\n\n{attribution}\n\nThis line goes with the weights and with all that they draw.")
    shown = {"transformer": _plain(transformer), "scheduler": _plain(scheduler), "versions": versions()}
    parts.append(f"## Configuration\n\n```json\n{json.dumps(shown, indent=2, default=str)}\n```")
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}
