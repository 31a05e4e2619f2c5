"""Which folder holds the pipeline that a path, or the name of a generator that ships, stands for."""

from pathlib import Path

from vit5gen.system.errors import UserError, nearest
from vit5gen.system.shipped import shipped, shipped_names

PIPELINE = "pipeline"  # its folder in that of a run


def pipeline_folder(checkpoint: str | Path) -> Path:
    """Return what `find_pipeline` does; raise `UserError` where it finds none."""
    if (folder := find_pipeline(checkpoint)) is None:
        if has_begun(checkpoint):
            found = f"checkpoint {checkpoint}: this run has no {PIPELINE}/ yet"
            raise UserError(f"{found}; it is written when the first step has been evaluated: wait, or resume the run")
        found = f"checkpoint {checkpoint} is neither a run nor a pipeline folder (no model_index.json)"
        names = shipped_names()
        expected = f"the --output of `vit5gen train` or `vit5gen convert`, or one that ships: {', '.join(names)}"
        raise UserError(f"{found}; expected {expected}.{nearest(str(checkpoint), names)}")
    return folder


def has_begun(path: str | Path) -> bool:
    """Whether a path is the folder of a run that trains a generator, be it evaluated yet or not."""
    return (Path(path) / "config.yaml").is_file() and (Path(path) / "data.json").is_file()


def find_pipeline(path: str | Path) -> Path | None:
    """Return the folder that holds ``model_index.json``: the ``pipeline`` in a path, the path itself, or None.

    The name of a generator that ships stands for its folder where there is no such path.
    """
    if not Path(path).exists() and str(path) in shipped_names():
        return Path(shipped(str(path)))
    folders = (Path(path) / PIPELINE, Path(path))
    return next((folder for folder in folders if (folder / "model_index.json").is_file()), None)
