"""`vit5gen compare`."""

import sys
from pathlib import Path
from typing import Any

from vit5gen.commands.evaluate import ScoreOptions
from vit5gen.commands.options import argument, with_picture
from vit5gen.config import DrawConfig, EvaluationConfig, ReadConfig
from vit5gen.section import Natural, UserPath
from vit5gen.system.errors import UserError
from vit5gen.system.files import write_json


class CompareOptions(ScoreOptions):
    """Tell whether B is better than A: differences, their intervals, and a verdict.

    A and B are each an npz, a folder of images, an evaluation card with groups, a run or pipeline folder, of which both
    are drawn from the same noise and labels, or a folder (or quoted pattern) of several runs, paired by training seed.
    """

    a: UserPath = argument(..., "A", "images, card of `evaluate --keep-groups`, run, or folder of runs", option="")
    b: UserPath = argument(..., "B", "what is compared with A", option="")
    reference: UserPath = argument(..., "REF", "real images, as for `evaluate`")
    output: UserPath = argument(..., "CARD.json", "write all numbers to this card; a picture of pairs lies beside it")
    seed: Natural = argument(
        EvaluationConfig().seed, "N", "seed of labels and noise, the same for both, for drawing from runs"
    )


def run(options: CompareOptions) -> None:
    """Compare two sets of images, or several runs each; print a table and a verdict, write card and picture."""
    from vit5gen.evaluation import comparison, load_extractor
    from vit5gen.evaluation.evaluation_card import doubts, open_samples
    from vit5gen.evaluation.groups import read_groups
    from vit5gen.evaluation.metrics.frechet_ratio import with_denominators
    from vit5gen.evaluation.reference import open_reference
    from vit5gen.evaluation.samples import Samples, check_used
    from vit5gen.generation.card import commit, versions
    from vit5gen.system.distributed import start_processes

    # What can be told to be wrong before anything is loaded.
    given = options.a, options.b
    if len({Path(path).resolve() for path in given}) == 1:
        raise UserError(f"{options.a} is given twice: there is nothing to compare; give two sets")
    if Path(options.output).resolve() in (Path(path).resolve() for path in given):
        raise UserError(f"--output {options.output}: is one of the two that are compared; choose another path")
    runs = comparison.pairs_of_runs(*given)
    options.check([path for pair in runs.values() or [given] for path in pair])
    picture = with_picture(options.output)

    # The sets, pair by pair, scored against the reference.
    state, draw, batch_size = start_processes(), options.part(DrawConfig), options.batch_size
    read = options.part(ReadConfig)
    network = load_extractor(options.extractor, state.device, options.weights, options.weights_sha256)
    real = open_reference(options.reference, network, batch_size, read=read)
    if options.denominators is not None:
        real = with_denominators(real, open_reference(options.denominators, network, batch_size, read=read), network)
    is_card = {path: Path(path).suffix == ".json" for path in given}
    metrics, skipped = comparison.metrics_to_compare(options.metrics, real, network, any(is_card.values()))
    sides: list[list[comparison.Side]] = [[], []]
    for pair in runs.values() or [given]:
        sets: list[Any] = []
        for path in pair:
            kept = is_card.get(path) and read_groups(path, real, network)
            sets += [kept or open_samples(path, draw, options.num_images, [options.seed], batch_size, read=read)[0]]
        references = real.identity, real.identity.get("denominators", {})
        check_used(read, [*references, *(one.identity for one in sets if isinstance(one, Samples))])
        comparison.check_alike(pair, sets)
        for side, images in zip(sides, sets, strict=True):
            scored = comparison.score_side(images, real, network, metrics, groups=not runs)
            side += [scored] if scored else []
    if not state.is_main_process:
        return

    # Card, picture and verdict.
    pairings = [comparison.pairing(a, b) for a, b in zip(*sides, strict=True)]
    paired, reason = pairings[0]
    has_picture = paired and comparison.save_picture(picture, sides[0][0], sides[1][0], reason)
    card = {name: [side.entry for side in own] for name, own in zip("ab", sides, strict=True)} | {
        "count": sides[0][0].entry["count"],
        "reference": real.identity | {"count": real.count},
        "extractor": network.identity,
        "licences": network.licences,
        "pairing": {"paired": paired, "reason": reason, "training_seeds": list(runs)},
        "skipped": skipped,
        "warnings": doubts([side.entry for own in sides for side in own], real, network, metrics),
        "picture": picture.name if has_picture else None,
        "options": options.model_dump(mode="json"),
        "processes": state.num_processes,
        "versions": versions(),
        "commit": commit(),
    }
    card |= comparison.differences(sides[0], sides[1], paired)
    card |= {"summary": comparison.summary(card), "markdown": "\n".join(comparison.markdown(card))}
    write_json(options.output, card)
    for warning in card["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{card['markdown']}\n\n{card['summary']}")
