"""The autoencoders between images and latents: each module of this folder registers the calls of one class."""

from vit5gen.registry import import_modules

import_modules(__name__)
