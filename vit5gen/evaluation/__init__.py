"""Scores of generated images: ADM's numbers in PyTorch, streaming, distributed, each with its error.

The metrics are here; whole evaluations, which need the pipeline, are in `vit5gen.evaluation.evaluation_card`.
"""

from vit5gen.evaluation import extractors, metrics  # registers them
from vit5gen.evaluation.distances import (
    FrechetReference,
    density_coverage,
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
