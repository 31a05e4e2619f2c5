"""Scores of generated images: ADM's numbers in PyTorch, streaming, distributed, each with its error."""

from vit5gen.evaluation.features import Extractor, Features, frechet_of, load_extractor, register_extractor
from vit5gen.evaluation.metrics import FrechetReference, frechet_distance
from vit5gen.evaluation.statistics import FeatureStatistics

__all__ = [
    "Extractor",
    "FeatureStatistics",
    "Features",
    "FrechetReference",
    "frechet_distance",
    "frechet_of",
    "load_extractor",
    "register_extractor",
]
