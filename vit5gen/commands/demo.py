"""`vit5gen demo`."""

import os
from typing import Annotated

from pydantic import Field

from vit5gen.commands.options import Options, argument
from vit5gen.registry import missing_packages
from vit5gen.section import UserPath
from vit5gen.system.errors import UserError


class DemoOptions(Options):
    """Open a page on this machine to play with a generator; needs the extra `demo`."""

    checkpoint: UserPath = argument(..., "RUN", "run, pipeline folder, or a generator that ships: emoji-64", option="")
    port: Annotated[int, Field(ge=1, le=65535)] | None = argument(
        None, "P", "port of the page on 127.0.0.1; default: the first free one from 7860"
    )


def run(options: DemoOptions) -> None:
    """Serve the page until Ctrl-C; raise `UserError` without gradio, or where the port cannot be used."""
    if missing_packages(["gradio"]):
        raise UserError('vit5gen demo needs gradio, which is not installed; run `pip install "vit5gen[demo]"`')
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}  # read on import

    from vit5gen.config import DrawConfig
    from vit5gen.generation.demo_page import serve
    from vit5gen.generation.many import open_pipeline
    from vit5gen.system.distributed import start_processes

    pipe = open_pipeline(options.checkpoint, DrawConfig(), start_processes().device)
    serve(pipe, options.checkpoint, options.port)
