"""What a visitor of `vit5gen demo` asks for: images that form while one watches, and the code that draws the same."""

import shlex
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Event
from typing import Any

from torch import Tensor

from vit5gen.data.autoencoders.codec import decode, to_uint8
from vit5gen.generation.many import draw_labels, image_generator
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.system.errors import UserError, check_whole

_MOST = 64  # images of a call
_PAUSE = 0.25  # seconds between two previews, at least
_SHARE = 0.2  # of the time, at most, goes into decoding them


@dataclass(frozen=True)
class Drawing:
    """Images to draw: the label of each, the number of its noise and its title; the seed; the pipeline's options.

    python: the labels as Python code.  words: the images as options of `vit5gen sample`.
    """

    labels: Any
    noise: Sequence[int]
    titles: Sequence[str]
    python: str
    words: Sequence[Any]
    seed: int
    options: dict[str, Any]

    def as_python(self, checkpoint: str, device: str) -> str:
        """Return the Python code that draws these images on a device of that type."""
        given = {"class_labels": self.python, "generator": f"[image_generator({self.seed}, i) for i in {self.noise!r}]"}
        given |= {name: repr(value) for name, value in self.options.items()}
        call = "".join(f"    {name}={value},\n" for name, value in given.items())
        imports = "from vit5gen import SiTPipeline\nfrom vit5gen.generation.many import image_generator\n"
        pipe = f"SiTPipeline.from_pretrained({checkpoint!r}){'' if device == 'cpu' else f'.to({device!r})'}"
        return f"{imports}\npipe = {pipe}\nimages = pipe(\n{call}).images"

    def as_command(self, checkpoint: str) -> str:
        """Return the command that draws these images."""
        words = ["vit5gen", "sample", "--checkpoint", checkpoint, *self.words, "--seed", self.seed]
        for name, value in self.options.items():
            words += [] if value is None else [f"--{name.replace('_', '-')}", value]
        return shlex.join(map(str, [*words, "--output", "samples.png"]))

    def form(self, pipe: SiTPipeline, stop: Event) -> Iterator[tuple[Tensor, str]]:
        """Yield images (B, 3, H, W) uint8 on their way from noise and at its end, with the progress in words.

        ``stop`` ends the call after the step that runs. Raises what the pipeline raises.
        """
        found, step, begin, due = SimpleQueue[Any](), "", time.perf_counter(), 0.0

        def show(pipe: SiTPipeline, i: int, t: float, state: dict[str, Any]) -> dict[str, Any]:
            nonlocal step, due
            pipe._interrupt, step = stop.is_set(), f"step {i + 1} of {pipe.num_timesteps}"
            if (now := time.perf_counter()) > due:
                found.put((to_uint8(decode(pipe.vae, state["latents"])).cpu(), step))
                due = now + max(_PAUSE, (time.perf_counter() - now) / _SHARE)
            return {}

        # The pipeline has a thread of its own, so that this one can give what it has so far.
        generators = [image_generator(self.seed, i) for i in self.noise]
        call = partial(pipe, self.labels, generator=generators, callback_on_step_end=show, **self.options)
        with ThreadPoolExecutor(1) as thread:
            images = thread.submit(call, output_type="uint8", return_dict=False)
            images.add_done_callback(lambda _: found.put(None))
            try:
                yield from iter(found.get, None)
            except GeneratorExit:  # the visitor has left
                stop.set()
                raise
        ended = f"stopped after {step}" if stop.is_set() else f"took {time.perf_counter() - begin:.1f} s"
        yield images.result()[0].cpu(), ended


def draw(pipe: SiTPipeline, seed: int, options: dict[str, Any], classes: list[int], count: int) -> Drawing:
    """Return the images of classes, given by id (none: of all), that `vit5gen sample` draws."""
    check_whole("seed =", seed, 0)
    ids = classes or list(range(pipe.transformer.config.num_classes))
    labels = draw_labels(check_whole("count =", count, 1, _MOST), ids, seed, "balanced")
    words = ["--num-images", count, *(["--class", *(_spell(pipe, i) for i in classes)] if classes else [])]
    titles, python = [pipe.class_name(i) for i in labels], repr([_spell(pipe, i) for i in labels])
    return Drawing(labels, range(count), titles, python, words, seed, options)


def morph(pipe: SiTPipeline, seed: int, options: dict[str, Any], first: int, last: int, frames: int) -> Drawing:
    """Return images of one noise whose label goes from one class to another, both given by id."""
    check_whole("seed =", seed, 0)
    last_frame = check_whole("frames =", frames, 2, _MOST) - 1
    if first == last:
        raise UserError("morph: both are the same class; choose two")
    shares, classes = [k / last_frame for k in range(frames)], range(pipe.transformer.config.num_classes)
    labels = [[(1 - share) * (i == first) + share * (i == last) for i in classes] for share in shares]
    row = f"[(1 - k / {last_frame}) * (i == {first}) + k / {last_frame} * (i == {last}) for i in {classes!r}]"
    words = ["--num-images", 1, "--morph", _spell(pipe, first), _spell(pipe, last), "--frames", frames]
    titles, python = [f"{share:.0%}" for share in shares], f"[{row} for k in range({frames})]"
    return Drawing(labels, [0] * frames, titles, python, words, seed, options)


def _spell(pipe: SiTPipeline, class_id: int) -> int | str:
    """Return the name of a class, or its id where the name does not lead to it."""
    name = pipe.class_name(class_id)
    with suppress(UserError):
        if class_id in pipe.config.id2label and not name.startswith("-") and pipe.class_ids(name) == [class_id]:
            return name
    return class_id
