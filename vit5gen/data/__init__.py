"""Labelled images, their autoencoder, and latents on disk."""

from vit5gen.data.emoji import load_emoji

__all__ = ["load_emoji"]
