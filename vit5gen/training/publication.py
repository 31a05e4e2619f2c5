"""What is published of a run: one folder with its pipeline, its card, the report and a picture."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import create_repo, get_token, upload_folder
from huggingface_hub.utils import HFValidationError, validate_repo_id

from vit5gen.config import load_recorded
from vit5gen.generation.card import (
    COMPONENTS,
    FACTS,
    TrainingFacts,
    check_weights,
    forget_folders,
    pipeline_hash,
    read_facts,
    with_scores,
    write_card,
)
from vit5gen.generation.find_pipeline import pipeline_folder
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.lora import ADAPTER, FULL
from vit5gen.system.errors import UserError
from vit5gen.system.files import read_json
from vit5gen.training.export import check_new, write_whole
from vit5gen.training.run_folder import RunFolder, run_facts

_SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")  # a token of the hub
_COMMAND = re.compile(r"^## Training\n\n```\n(.*?)\n```", re.MULTILINE | re.DOTALL)


class Publication:
    """A run, pipeline folder or shipped generator on its way to the hub.

    licence: as the hub spells it.  cards: of `vit5gen evaluate`, of these weights.
    Raises `UserError` for a name that the hub does not take, and for what does not load or belong together.
    """

    def __init__(self, source: str | Path, repo: str, licence: str | None = None, cards: Sequence[str] = ()) -> None:
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise UserError(f"--repo {repo}: {error}") from None
        self.repo, self.pipe, self.folder = repo, load_pipeline(source), pipeline_folder(source)
        scored = [read_json(card, "evaluation card") for card in cards]
        facts = with_scores(_facts(self.folder), scored)
        check_weights(scored, {pipeline_hash(self.folder)})
        self.facts = replace(facts, licence=licence or facts.licence)

    def write(self, output: str | Path) -> str:
        """Write the folder, whole or not at all; return what to say of it. Raises `UserError` for one that exists."""
        check_new(target := Path(output).resolve(), "--dry-run")
        write_whole(self._build, target)
        sizes = [file.stat().st_size for file in target.rglob("*") if file.is_file()]
        done = f"{output}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB; nothing was uploaded"
        return f"{done}. Read README.md, then run the command without --dry-run"

    def upload(self, private: bool) -> str:
        """Upload the folder in one commit; return what to say of it. Raises `UserError` where the hub refuses."""
        if get_token() is None:
            raise UserError("no token of the hub; run `hf auth login`, or set HF_TOKEN, or look at --dry-run FOLDER")
        with tempfile.TemporaryDirectory() as temporary:
            self._build(folder := Path(temporary) / "pipeline")
            try:
                self.repo = create_repo(self.repo, private=private or None, exist_ok=True).repo_id
                self._write_card(folder)  # now with the user's name before that of the repository
                upload_folder(repo_id=self.repo, folder_path=folder, commit_message="Publish with vit5gen")
            except Exception as error:  # of the network, of the hub, of two libraries for it: they have no end
                reason = " ".join(str(error).split()) or repr(error)
                advice = "check the network, and `hf auth whoami`: its token must be allowed to write there"
                raise UserError(f"--repo {self.repo}: {reason}; {advice}") from error
        return f"https://huggingface.co/{self.repo}"

    def _build(self, folder: Path) -> None:
        """Copy what makes the pipeline, and nothing else that may lie beside it; then write the card."""
        files = [self.folder / name for name in ("model_index.json", "pipeline.py", ADAPTER, FULL)]
        for name in COMPONENTS:
            inside = [*(self.folder / name).glob("*.json"), *(self.folder / name).glob("*.safetensors")]
            if inside and name != "scheduler" and not any(file.suffix == ".safetensors" for file in inside):
                raise UserError(f"{self.folder / name}: no safetensors; save the pipeline anew with save_pretrained")
            files += inside
        for file in files:
            if file.is_file():
                target = folder / file.relative_to(self.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        self._write_card(folder)
        forget_folders(folder)
        for file in (file for file in folder.rglob("*") if file.suffix in (".json", ".html", ".md")):
            if _SECRET.search(file.read_bytes()):
                raise UserError(f"{file.name} contains what looks like a token of the hub (hf_...); remove it there")

    def _write_card(self, folder: Path) -> None:
        write_card(self.pipe, folder, self.facts, self.repo)


def _facts(folder: Path) -> TrainingFacts:
    """Return what is known of a pipeline folder; of one that a run of an earlier version wrote, what the run knows."""
    facts, run = read_facts(folder), RunFolder(folder.parent)
    if (folder / FACTS).is_file() or folder != run.pipeline or not (run.config.is_file() and run.evaluations()):
        return facts
    command = _COMMAND.search(facts.text or "")
    known = run_facts(run, load_recorded(run.config), run.evaluations()[-1], command and command[1])
    return replace(known, report=facts.report)
