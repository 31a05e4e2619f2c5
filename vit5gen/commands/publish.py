"""`vit5gen publish`."""

from typing import Annotated

from pydantic import Field

from vit5gen.commands.options import Options, Utf8Path, argument
from vit5gen.section import UserPath

_LICENCE = r"^[a-z0-9][a-z0-9.-]*$"  # how the hub spells all of them


class PublishOptions(Options):
    """Upload a run's pipeline with a complete model card to the Hugging Face hub, or write the very same folder."""

    run: UserPath = argument(..., "RUN", "run, pipeline folder or shipped name", option="")
    repo: str = argument(..., "NAME", "repository on the hub, e.g. ada/flowers-64")
    license: Annotated[str, Field(pattern=_LICENCE)] | None = argument(
        None, "ID", "licence of the weights as the hub spells it, e.g. apache-2.0; default: other, to be chosen"
    )
    card: list[UserPath] | None = argument(None, "CARD.json", "cards of `vit5gen evaluate RUN`, for the metrics")
    private: bool = argument(False, "", "show a new repository to nobody else")
    dry_run: Utf8Path | None = argument(None, "FOLDER", "write the files into this new folder; upload nothing")


def run(options: PublishOptions) -> None:
    """Upload the folder, or write it."""
    from vit5gen.training.publication import publish

    cards = options.card or []
    print(publish(options.run, options.repo, options.dry_run, options.license, cards, options.private))
