"""Labelled images, their autoencoder, and latents on disk."""

from vit5gen.data import sources  # registers the kinds of data sets
from vit5gen.data.images import BrokenImage, ImageSet, Source, read_image, register_source
from vit5gen.data.sources.emoji import load_emoji
