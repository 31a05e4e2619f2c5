"""The page of `vit5gen demo`."""

from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from html import escape
from io import BytesIO
from threading import Event
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from vit5gen.generation.drawing import Drawing, draw, morph
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.generation.scheduler import SAMPLERS, SiTScheduler
from vit5gen.system.errors import UserError

_STEPS, _SAMPLER, _GUIDANCE = 20, "ode-ab2", 2.5  # at first: quick on a CPU
_STYLE = """
.pictures {display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(min(150px, 22vw), 1fr))}
.pictures figure {margin: 0; text-align: center; overflow-wrap: anywhere}
.pictures img {width: 100%; margin: 0; border-radius: 6px; image-rendering: pixelated}
.cm-editor, .cm-scroller {height: auto !important; min-height: 0 !important}
"""


def serve(pipe: SiTPipeline, checkpoint: str, port: int | None) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C; raise `UserError` for a port that cannot be used."""
    pipe.set_progress_bar_config(disable=True)
    running: dict[str | None, Event] = {}
    page = build_page(pipe, checkpoint, running)
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    look: dict[str, Any] = {"theme": theme, "css": _STYLE, "footer_links": [], "quiet": True, "ssr_mode": False}
    try:
        _, url, _ = page.queue(api_open=False).launch(
            server_name="127.0.0.1", server_port=port, share=False, prevent_thread_lock=True, **look
        )
    except OSError as error:
        found = "no port from 7860 to 7959 is free" if port is None else f"port {port} is in use, or not allowed"
        raise UserError(f"{found}; choose another one with --port") from error
    print(f"{url} (Ctrl-C ends)", flush=True)
    with suppress(KeyboardInterrupt):
        Event().wait()
    for stop in [*running.values()]:
        stop.set()
    page.close(verbose=False)


def build_page(pipe: SiTPipeline, checkpoint: str, running: dict[str | None, Event]) -> gr.Blocks:
    """Return the page; ``running`` gets, by visitor, what stops the drawing that runs."""
    config, (height, width) = pipe.transformer.config, pipe.image_size
    names = [(pipe.class_name(i), i) for i in range(config.num_classes)]
    samplers = SAMPLERS.names() if isinstance(pipe.scheduler, SiTScheduler) else []  # a foreign one steps by itself
    about = f"{height} x {width} pixels, {len(names)} classes, on {pipe.device.type}"

    def answer(ask: Callable[..., Drawing]) -> Callable[..., Iterator[list[str]]]:
        def respond(request: gr.Request, seed: Any, scale: Any, steps: Any, sampler: Any, *what: Any) -> Iterator[list]:
            stop = running[request.session_hash] = Event()
            options = {"guidance_scale": scale, "num_inference_steps": steps}
            options |= {"sampler": sampler} if sampler else {}
            try:
                drawing = ask(pipe, seed, options, *what)
                codes = [drawing.as_python(checkpoint, pipe.device.type), drawing.as_command(checkpoint)]
                for images, progress in drawing.form(pipe, stop):
                    yield [_figures(images, drawing.titles), progress, *codes]
            except UserError as error:
                raise gr.Error(escape(str(error), quote=False), print_exception=False) from None
            finally:
                running.pop(request.session_hash, None)

        return respond

    def end(request: gr.Request) -> None:
        if stop := running.get(request.session_hash):
            stop.set()

    with gr.Blocks(title=f"vit5gen: {checkpoint}", analytics_enabled=False) as page:
        gr.HTML(f"<h1>{escape(checkpoint)}</h1>{about}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                with gr.Tab("Draw"):
                    classes = gr.Dropdown(names, multiselect=True, label="Classes", info="none chosen: all of them")
                    count = gr.Number(8, label="Images")
                    draws = gr.Button("Draw", variant="primary")
                with gr.Tab("Morph"):
                    first = gr.Dropdown(names, value=0, label="From")
                    last = gr.Dropdown(names, value=len(names) - 1, label="To")
                    frames = gr.Number(8, label="Frames")
                    morphs = gr.Button("Morph", variant="primary")
                with gr.Row():
                    start = _GUIDANCE if pipe.transformer.has_null_label else 1
                    scale = gr.Number(start, minimum=0, step=0.5, label="Guidance scale", min_width=120)
                    steps = gr.Number(_STEPS, label="Steps", min_width=120)
                with gr.Row():
                    chosen = _SAMPLER if samplers else None
                    sampler = gr.Dropdown(samplers, value=chosen, label="Sampler", min_width=120)
                    seed = gr.Number(0, label="Seed", min_width=120)
                stops = gr.Button("Stop", variant="stop")
            with gr.Column(scale=2, min_width=300):
                progress = gr.Textbox(label="Progress", interactive=False, elem_id="progress")
                pictures = gr.HTML()
                box: dict[str, Any] = {"interactive": False, "wrap_lines": True}
                python = gr.Code(language="python", label="Copy as Python", elem_id="python", **box)
                command = gr.Code(language="shell", label="Copy as command", elem_id="command", **box)
        gr.HTML(escape(pipe.config.get("attribution") or ""))

        # One pipeline, one call at a time: others wait. Stop does not.
        settings, shown = [seed, scale, steps, sampler], [pictures, progress, python, command]
        alone: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1, "show_progress_on": progress}
        draws.click(answer(draw), [*settings, classes, count], shown, **alone)
        morphs.click(answer(morph), [*settings, first, last, frames], shown, **alone)
        stops.click(end, queue=False)
        page.unload(end)
    return page


def _figures(images: Tensor, titles: Sequence[str]) -> str:
    """Return images (B, 3, H, W) uint8 as HTML that holds them."""
    figures = ""
    for pixels, title in zip(images.permute(0, 2, 3, 1).contiguous().numpy(), titles, strict=True):
        Image.fromarray(pixels).save(file := BytesIO(), "PNG")
        source, name = b64encode(file.getvalue()).decode(), escape(title)
        figures += (
            f'<figure><img alt="{name}" src="data:image/png;base64,{source}"><figcaption>{name}</figcaption></figure>'
        )
    return f'<div class="pictures">{figures}</div>'
