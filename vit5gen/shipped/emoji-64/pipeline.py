from vit5gen import SiTPipeline  # noqa: F401
