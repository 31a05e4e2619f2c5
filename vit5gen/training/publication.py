"""What is published of a run: a folder of its pipeline, its card, its report and a picture."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import create_repo, get_token, upload_folder
from huggingface_hub.utils import HFValidationError, validate_repo_id

from vit5gen.config import load_recorded
from vit5gen.generation import card
from vit5gen.generation.find_pipeline import pipeline_folder
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.lora import ADAPTER, FULL
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.system.errors import UserError
from vit5gen.system.files import MODEL_STUB, read_json
from vit5gen.training.export import check_new, write_whole
from vit5gen.training.run_folder import RunFolder, run_facts

_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")  # of the hub
_COMMAND = re.compile(r"^## Training\n\n```\n(.*?)\n```", re.MULTILINE | re.DOTALL)  # in cards of all versions


def publish(
    source: str, repo: str, output: str | None, licence: str | None, cards: Sequence[str], private: bool
) -> str:
    """Upload a run, pipeline folder or shipped generator in one commit; return what to say of it.

    repo: its name on the hub.  output: write the folder there, whole or not at all, and upload nothing.
    licence: as the hub spells it.  cards: of `vit5gen evaluate`, of these weights.
    Raises `UserError` for what does not load or belong together, and where the hub refuses.
    """
    # What is wrong with the input shows before anything is written.
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: {error}") from None
    if output is not None:
        check_new(target := Path(output).resolve(), "--dry-run")
    elif get_token() is None:
        raise UserError("no token of the hub; run `hf auth login`, or set HF_TOKEN, or try --dry-run FOLDER")
    pipe, folder = load_pipeline(source), pipeline_folder(source)
    scored = [read_json(file, "evaluation card") for file in cards]
    try:
        facts = card.with_scores(facts_of(folder), scored, [card.pipeline_hash(folder)])
    except (AttributeError, LookupError, TypeError) as error:
        expected = "expected the --output of `vit5gen evaluate RUN`"
        raise UserError(f"--card {' '.join(cards)}: no evaluation card ({error!r}); {expected}") from error
    facts = facts.model_copy(update={"licence": licence or facts.licence})
    build = partial(_build, pipe, folder, facts)

    # Written, or uploaded from a folder that is gone afterwards.
    if output is not None:
        write_whole(partial(build, repo), target)
        sizes = [file.stat().st_size for file in target.rglob("*") if file.is_file()]
        return f"{output}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB; read README.md, then omit --dry-run to upload"
    with tempfile.TemporaryDirectory() as temporary:
        write_whole(partial(build, repo), whole := Path(temporary, "whole"))
        try:
            repo = create_repo(repo, private=private or None, exist_ok=True).repo_id
            card.write_card(pipe, whole, facts, repo)  # now with the owner's name, too
            upload_folder(repo_id=repo, folder_path=whole, commit_message="Publish with vit5gen")
        except Exception as error:  # what the network, the hub and the libraries for them raise has no end
            advice = "check the network, and with `hf auth whoami` whether your token may write there"
            raise UserError(f"--repo {repo}: {' '.join(str(error).split()) or repr(error)}; {advice}") from error
    return f"https://huggingface.co/{repo}"


def facts_of(folder: Path) -> card.TrainingFacts:
    """Return what is known of a pipeline folder, and what its run knows if that is one of an earlier version."""
    facts, run = card.read_facts(folder), RunFolder(folder.parent)
    old = run.pipeline == folder and not (folder / card.FACTS).is_file() and run.config.is_file()
    if not old or not (evaluations := run.evaluations()):
        return facts
    command = _COMMAND.search(facts.text or "")
    known = run_facts(run, load_recorded(run.config), evaluations[-1], command and command[1])
    return known.model_copy(update={"report": facts.report})


def _build(pipe: SiTPipeline, source: Path, facts: card.TrainingFacts, repo: str, folder: Path) -> None:
    """Copy what makes the pipeline and nothing that may lie beside it; then the card, without paths or secrets."""
    files = [source / name for name in ("model_index.json", "pipeline.py", ADAPTER, FULL)]
    for name in card.COMPONENTS:
        weights = list((source / name).glob("*.safetensors"))
        if getattr(pipe, name) is not None and not weights and name != "scheduler":
            raise UserError(f"{source / name}: no safetensors; save the pipeline again with save_pretrained")
        files += [*weights, *(source / name).glob("*.json"), source / name / MODEL_STUB]
    for file in (file for file in files if file.is_file()):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    card.write_card(pipe, folder, facts, repo)
    card.forget_folders(folder)
    for file in (file for file in folder.rglob("*") if file.suffix in (".json", ".html", ".md")):
        if _TOKEN.search(file.read_bytes()):
            raise UserError(f"{file.name} contains what looks like a token of the hub (hf_...); remove it there")
