"""Class-conditional image generation by flow matching, with ViT-5, SiT or your own transformer backbone."""

import importlib

__version__ = "0.1.0"

# Public names and the modules that hold them: resolved on first use, so that `import vit5gen` stays fast.
_EXPORTS = {
    "PixelAutoencoder": "vit5gen.data.autoencoders.pixels",
    "SiTTransformer2DModel": "vit5gen.models",
    "ViT5": "vit5gen.models",
    "SiTPipeline": "vit5gen.generation.pipeline",
    "SiTScheduler": "vit5gen.generation.scheduler",
    "shipped": "vit5gen.system.shipped",
}
_SUBMODULES = ("config", "data", "evaluation", "flow", "generation", "models", "training")
__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"vit5gen.{name}")
    if name in ("ModelMixin", "SchedulerMixin"):  # diffusers looks here for the bases of the classes it loads
        return getattr(importlib.import_module("diffusers"), name)
    raise AttributeError(f"module 'vit5gen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
