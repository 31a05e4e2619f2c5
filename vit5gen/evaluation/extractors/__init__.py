"""The feature networks that come with the package, one file each; importing them registers them."""

from vit5gen.evaluation.extractors import effnet_lite0, inception
