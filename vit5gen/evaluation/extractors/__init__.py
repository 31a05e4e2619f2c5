"""The feature networks that come with the package: each module of this folder registers one."""

from vit5gen.registry import import_modules

import_modules(__name__)
