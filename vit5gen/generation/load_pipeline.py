"""Pipelines from folders whose files anyone may have changed: what they must hold."""

from pathlib import Path

from diffusers import ModelMixin
from diffusers.utils import logging
from torch import nn

from vit5gen.data.autoencoders.codec import find_codec
from vit5gen.generation.find_pipeline import pipeline_folder
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.models import SiTTransformer2DModel
from vit5gen.models.weights import check_finite
from vit5gen.system.errors import UserError, short
from vit5gen.system.files import read_json

_REMEDY = "create it again with `vit5gen train` or `vit5gen convert`"


def load_pipeline(checkpoint: str | Path) -> SiTPipeline:
    """Load the pipeline of a run (RUN or RUN/pipeline), a pipeline folder, or the name of one that ships.

    Raises `UserError` if it is none of them, does not load, or has weights that are not finite.
    """
    folder = pipeline_folder(checkpoint)
    index = read_json(folder / "model_index.json", "pipeline")
    for name, entry in index.items():
        # diffusers would import any module that stands there
        if isinstance(entry, list) and entry[:1] not in ([None], ["vit5gen"], ["diffusers"]):
            found = f"checkpoint {folder}: {name} = {short(entry)}"
            raise UserError(f"{found} is not a part of vit5gen or diffusers; {_REMEDY}")

    # diffusers loads the parts; each must be of the kind that the pipeline calls.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of three files read
    try:
        if (entry := index.get("vae")) and entry[1]:
            find_codec(entry[1])  # raises where there is none, or a package is absent
        pipe = SiTPipeline.from_pretrained(folder)
        kinds = {"transformer": SiTTransformer2DModel, "guide": SiTTransformer2DModel, "vae": ModelMixin}
        for name, kind in kinds.items():
            if not isinstance(part := getattr(pipe, name), kind | None):
                raise UserError(f"{name} is a {type(part).__name__}, expected a {kind.__name__}")
    except Exception as error:  # what diffusers makes of files with values of other types has no end
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(f"checkpoint {folder} does not load: {reason}; {_REMEDY}") from error
    finally:
        if shown:
            logging.enable_progress_bar()

    # Weights that diverged would draw the same nothing for every class.
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            check_finite(f"checkpoint {folder}: {name}", component.state_dict())
    return pipe
