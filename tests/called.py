"""Commands called from Python: values become the options that the command line would give."""

from pathlib import Path
from typing import Any

from vit5gen.commands import convert, evaluate, sample
from vit5gen.config import SamplingConfig
from vit5gen.section import validate


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    settings = options.pop("settings", None)
    if isinstance(settings, SamplingConfig):
        options |= settings.model_dump(exclude_unset=True)
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


def call_sample(checkpoint: Path, output: Path, **options: Any) -> None:
    classes = options.pop("classes", None)
    options |= {} if classes is None else {"classes": [str(one) for one in classes]}
    options = _plain({"checkpoint": checkpoint, "output": output, **options})
    sample.run(validate(sample.SampleOptions, options, "sample"))


def call_evaluate(*samples: Path | str, **options: Any) -> int:
    options = _plain({"samples": [str(one) for one in samples], **options})
    return evaluate.run(validate(evaluate.EvaluateOptions, options, "evaluate"))


def call_convert(checkpoint: Path, output: Path, **options: Any) -> None:
    given = _plain({"checkpoint": checkpoint, "output": output, **options})
    convert.run(validate(convert.ConvertOptions, given, "convert"))
