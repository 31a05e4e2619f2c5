"""`vit5gen init`."""

from vit5gen.commands.options import Options, Utf8Path, argument
from vit5gen.section import UserPath, Width


class InitOptions(Options):
    """Look at a folder of pictures and write a configuration for it."""

    folder: Utf8Path = argument(
        ..., "FOLDER", "folder with one subfolder per class (optionally inside train/ and test/)", option=""
    )
    output: Utf8Path = argument(..., "NAME.yaml", "configuration that is written")
    init_from: UserPath | None = argument(None, "WEIGHTS", "weights to begin with: training.init_from", option="--from")
    num_attention_heads: Width | None = argument(None, "N", "heads of a SiT file whose width matches no preset")


def run(options: InitOptions) -> None:
    """Write a configuration for a folder, print what was seen and the next command."""
    from vit5gen.training.propose import propose

    propose(options.folder, options.output, options.init_from, options.num_attention_heads)
