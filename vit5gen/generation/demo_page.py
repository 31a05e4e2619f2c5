"""The page of `vit5gen demo`: images that form while one watches, a morph, and the code that draws the same."""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from queue import SimpleQueue
from threading import Event
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from vit5gen.data.autoencoders.codec import decode, to_uint8
from vit5gen.generation.many import draw_labels, image_generator
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.generation.scheduler import SAMPLERS, SiTScheduler
from vit5gen.system.errors import UserError, check_whole

MOST_IMAGES = 64  # at once
_PREVIEWS = 10  # of a call, about
_STEPS, _SAMPLER, _GUIDANCE = 20, "ode-ab2", 2.5  # at first: quick on a CPU
_STYLE = ".pictures img {image-rendering: pixelated}"  # of images that the page enlarges


@dataclass(frozen=True)
class Drawing:
    """What a visitor asks for: the label of each image, the number of its noise, its title, and the pipeline's options.

    python, words: the labels in Python, and all but the options and the seed as words for `vit5gen sample`.
    """

    labels: Any
    noise: Sequence[int]
    titles: Sequence[str]
    python: str
    words: Sequence[Any]
    seed: int
    options: dict[str, Any]

    def as_python(self, checkpoint: str) -> str:
        """Return the code that draws these images."""
        noise = f"[image_generator({self.seed}, i) for i in {self.noise!r}]"
        given = {"class_labels": self.python, "generator": noise} | {
            key: repr(one) for key, one in self.options.items()
        }
        imports = "from vit5gen import SiTPipeline\nfrom vit5gen.generation.many import image_generator\n"
        call = "".join(f"    {key}={one},\n" for key, one in given.items())
        return f"{imports}\npipe = SiTPipeline.from_pretrained({checkpoint!r})\nimages = pipe(\n{call}).images"

    def as_command(self, checkpoint: str) -> str:
        """Return the command that draws these images."""
        words = ["vit5gen", "sample", "--checkpoint", checkpoint, *self.words, "--seed", self.seed]
        words += [word for key, one in self.options.items() for word in (f"--{key.replace('_', '-')}", one)]
        return shlex.join(map(str, [*words, "--output", "samples.png"]))

    def form(self, pipe: SiTPipeline, stop: Event) -> Iterator[tuple[Tensor, str]]:
        """Yield images (B, 3, H, W) uint8 on their way from noise and at its end, with the progress in words.

        ``stop`` ends the call after its step. Raises what the pipeline raises.
        """
        found, done, begin = SimpleQueue[Any](), "", time.perf_counter()

        def show(pipe: SiTPipeline, i: int, t: float, state: dict[str, Any]) -> dict[str, Any]:
            nonlocal done
            pipe._interrupt, done = stop.is_set(), f"step {i + 1} of {pipe.num_timesteps}"
            if i % max(1, pipe.num_timesteps // _PREVIEWS) == 0:
                found.put((to_uint8(decode(pipe.vae, state["latents"])).cpu(), done))
            return {}

        # The pipeline has a thread of its own, so that this one can give what it shows.
        call = {"generator": [image_generator(self.seed, i) for i in self.noise], "callback_on_step_end": show}
        with ThreadPoolExecutor(1) as pool:
            images = pool.submit(pipe, self.labels, **call, **self.options, output_type="uint8", return_dict=False)
            images.add_done_callback(lambda _: found.put(None))
            try:
                yield from iter(found.get, None)
            except GeneratorExit:  # the visitor has left
                stop.set()
                raise
        seconds = f"{time.perf_counter() - begin:.1f} s"
        yield (
            images.result()[0].cpu(),
            f"stopped at {done}" if stop.is_set() else f"{len(self.titles)} images in {seconds}",
        )


def draw(pipe: SiTPipeline, seed: int, options: dict[str, Any], classes: list[int], count: int) -> Drawing:
    """Return the images of classes given by id (none: of all) that `vit5gen sample` draws."""
    ids = classes or list(range(pipe.transformer.config.num_classes))
    labels = draw_labels(check_whole("count =", count, 1, MOST_IMAGES), ids, seed, "balanced")
    words = ["--num-images", count, *(["--class", *(_spell(pipe, i) for i in classes)] if classes else [])]
    titles, python = [pipe.class_name(i) for i in labels], repr([_spell(pipe, i) for i in labels])
    return Drawing(labels, range(count), titles, python, words, seed, options)


def morph(pipe: SiTPipeline, seed: int, options: dict[str, Any], first: int, last: int, frames: int) -> Drawing:
    """Return images of one noise, the label of which goes from one class to another; both are given by id."""
    parts = [i / (frames - 1) for i in range(check_whole("frames =", frames, 2, MOST_IMAGES))]
    classes = range(pipe.transformer.config.num_classes)
    labels = [[(1 - part) * (i == first) + part * (i == last) for i in classes] for part in parts]
    words = ["--morph", _spell(pipe, first), _spell(pipe, last), "--frames", frames]
    return Drawing(labels, [0] * frames, [f"{part:.0%}" for part in parts], repr(labels), words, seed, options)


def _spell(pipe: SiTPipeline, class_id: int) -> int | str:
    """Return the name of a class, or its id where the name does not lead to it."""
    name = pipe.class_name(class_id)
    with suppress(UserError):
        if class_id in pipe.config.id2label and not name.startswith("-") and pipe.class_ids(name) == [class_id]:
            return name
    return class_id


def serve(pipe: SiTPipeline, checkpoint: str, port: int | None) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C; raise `UserError` for a port that cannot be used."""
    running: dict[str | None, Event] = {}  # of each visitor who draws
    page = build_page(pipe, checkpoint, running)
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = page.queue(api_open=False).launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            theme=theme,
            css=_STYLE,
            footer_links=[],
        )
    except OSError as error:
        where = "no port from 7860 on" if port is None else f"port {port}"
        raise UserError(
            f"{where} cannot be used: another program has it, or it is not allowed; set another --port"
        ) from error
    print(f"{url} (Ctrl-C ends)", flush=True)
    try:
        Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        for stop in list(running.values()):
            stop.set()
        page.close(verbose=False)


def build_page(pipe: SiTPipeline, checkpoint: str, running: dict[str | None, Event]) -> gr.Blocks:
    """Return the page; ``running`` gets what stops the drawing of a visitor."""
    pipe.set_progress_bar_config(disable=True)
    names = [(pipe.class_name(i), i) for i in range(pipe.transformer.config.num_classes)]
    samplers = list(SAMPLERS.names()) if isinstance(pipe.scheduler, SiTScheduler) else []

    def respond(ask: Callable[..., Drawing]) -> Callable[..., Iterator[list]]:
        def answer(request: gr.Request, seed: Any, scale: Any, steps: Any, sampler: Any, *what: Any) -> Iterator[list]:
            stop = running[request.session_hash] = Event()
            options = {"guidance_scale": scale, "num_inference_steps": steps} | (
                {"sampler": sampler} if sampler else {}
            )
            try:
                drawing = ask(pipe, check_whole("seed =", seed, 0), options, *what)
                codes = [drawing.as_python(checkpoint), drawing.as_command(checkpoint)]
                for images, progress in drawing.form(pipe, stop):
                    pictures = map(Image.fromarray, images.permute(0, 2, 3, 1).numpy())
                    yield [list(zip(pictures, drawing.titles, strict=True)), progress, *codes]
            except UserError as error:
                raise gr.Error(escape(str(error), quote=False), print_exception=False) from error
            finally:
                running.pop(request.session_hash, None)

        return answer

    def stop(request: gr.Request) -> None:
        running.get(request.session_hash, Event()).set()

    with gr.Blocks(title=f"vit5gen {checkpoint}", analytics_enabled=False) as page:
        gr.HTML(f"<h1>{escape(checkpoint)}</h1>")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                with gr.Tab("Draw"):
                    classes = gr.Dropdown(names, multiselect=True, label="Classes", info="none chosen: all of them")
                    count = gr.Number(8, label="Images")
                    draw_button = gr.Button("Draw", variant="primary")
                with gr.Tab("Morph"):
                    ends = [
                        gr.Dropdown(names, value=names[end][1], label=label) for label, end in (("From", 0), ("To", -1))
                    ]
                    frames = gr.Number(8, label="Frames")
                    morph_button = gr.Button("Morph", variant="primary")
                with gr.Row():
                    scale = gr.Number(
                        _GUIDANCE if pipe.transformer.has_null_label else 1,
                        minimum=0,
                        step=0.5,
                        label="Guidance scale",
                        min_width=120,
                    )
                    steps = gr.Number(_STEPS, label="Steps", min_width=120)
                with gr.Row():
                    sampler = gr.Dropdown(
                        samplers, value=_SAMPLER if samplers else None, label="Sampler", min_width=120
                    )
                    seed = gr.Number(0, label="Seed", min_width=120)
                stop_button = gr.Button("Stop", variant="stop")
            with gr.Column(scale=2, min_width=320):
                gallery = gr.Gallery(
                    label="Images",
                    columns=4,
                    format="png",
                    object_fit="contain",
                    elem_classes="pictures",
                    height="auto",
                )
                progress = gr.Textbox(label="Progress", interactive=False)
                python = gr.Code(language="python", label="Copy as Python", interactive=False)
                command = gr.Code(language="shell", label="Copy as command", interactive=False)
        gr.HTML(escape(pipe.config.get("attribution") or ""))

        settings = [seed, scale, steps, sampler]
        shown = [gallery, progress, python, command]
        for button, ask, what in ((draw_button, draw, [classes, count]), (morph_button, morph, [*ends, frames])):
            button.click(respond(ask), [*settings, *what], shown, concurrency_limit=1, concurrency_id="pipeline")
        stop_button.click(stop, queue=False)
        page.unload(stop)
    return page
