"""Scores of generated images: ADM's numbers in PyTorch, streaming, distributed, each with its error.

The metrics are here; whole evaluations, which need the pipeline, are in `vit5gen.evaluation.evaluate`.
"""

from vit5gen.evaluation import extractors, metrics  # noqa: F401 (registers them)
from vit5gen.evaluation.distances import (
    FrechetReference,
    frechet_distance,
    frechet_report,
    inception_score,
    kernel_distance,
    precision_recall,
    spatial_features,
)
from vit5gen.evaluation.features import Extractor, Features, frechet_of, load_extractor, register_extractor
from vit5gen.evaluation.metric import Metric, register_metric
from vit5gen.evaluation.statistics import FeatureStatistics

__all__ = ["Extractor", "FeatureStatistics", "Features", "FrechetReference", "Metric", "frechet_distance", "frechet_of"]
__all__ += ["frechet_report", "inception_score", "kernel_distance", "load_extractor", "precision_recall"]
__all__ += ["register_extractor", "register_metric", "spatial_features"]
