"""Generator, classifier, backbones (each module may register one) and the loaders of published checkpoints."""

from vit5gen.models.backbone import Backbone, backbone_names, register_backbone
from vit5gen.models.classifier import ViT5
from vit5gen.models.published import load_sit, load_vit5
from vit5gen.models.transformer import PRESETS, SiTTransformer2DModel
from vit5gen.models.vit5 import VARIANTS, ViT5Block
from vit5gen.registry import import_modules

import_modules(__name__)
