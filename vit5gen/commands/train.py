"""`vit5gen train`."""

from pydantic import model_validator

from vit5gen.commands.options import ConfigOptions, Utf8Path, argument
from vit5gen.section import UserPath
from vit5gen.system.errors import UserError


class TrainOptions(ConfigOptions):
    """Train a model; running the command again resumes from its newest checkpoint."""

    output: Utf8Path | None = argument(None, "RUN", "folder of the run; optional with --dry-run")
    resume: UserPath = argument("auto", "WHERE", "auto = latest (newest checkpoint) | never | RUN | checkpoint")
    accept_changes: bool = argument(False, "", "resume even if configuration or data differ")
    dry_run: bool = argument(False, "", "write nothing; check values, estimate costs, list what is missing")

    @model_validator(mode="after")
    def _nothing_to_accept(self) -> "TrainOptions":
        if self.accept_changes and self.resume == "never":
            raise ValueError("--accept-changes has no effect with --resume never; omit it")
        return self


def run(options: TrainOptions) -> int:
    """Train, or print what training would cost; return the exit code."""
    if options.dry_run and (options.output or not {"resume", "accept_changes"} & options.model_fields_set):
        from vit5gen.training.dry_run import plan

        return plan(options.load(), options.output, options.resume, options.accept_changes)
    if options.output is None:
        raise UserError("vit5gen train: the following arguments are required: --output")
    from vit5gen.training.loop import train

    return train(options.load(), options.output, options.resume, options.accept_changes)
