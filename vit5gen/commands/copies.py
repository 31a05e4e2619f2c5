"""`vit5gen copies`."""

from typing import ClassVar

from vit5gen.commands.evaluate import ExtractorOptions
from vit5gen.commands.options import argument, with_picture
from vit5gen.config import ReadConfig
from vit5gen.section import Plug, UserPath
from vit5gen.system.files import write_json


class CopiesOptions(ReadConfig, ExtractorOptions):
    """Look for copies of training images among samples, by distances of features.

    The samples closest to training images, as against held-out images, are shown beside these.
    """

    unused: ClassVar = ("shuffle",)

    samples: UserPath = argument(..., "SAMPLES", "npz, folder, zip or tar of generated images", option="")
    training: UserPath = argument(..., "DATA", "images of the training: a configuration, or as SAMPLES")
    held_out: UserPath | None = argument(
        None, "DATA", "real images that no training has seen; default: the held-out split of the configuration"
    )
    output: UserPath = argument(..., "CARD.json", "write all numbers to this card; a picture of pairs lies beside it")
    extractor: Plug = argument("dinov2", "NAME", "feature network, as for `evaluate`")


def run(options: CopiesOptions) -> None:
    """Compare samples with training and held-out images; print what was found, write card and picture."""
    from vit5gen.evaluation import load_extractor, nearest_images
    from vit5gen.evaluation.samples import check_used, open_held_out_set, open_image_set
    from vit5gen.generation.card import commit, versions
    from vit5gen.system.distributed import start_processes

    # The images, apart from each other.
    picture = with_picture(options.output)
    state, size, read = start_processes(), options.batch_size, options.part(ReadConfig)
    given = [path for path in (options.samples, options.training, options.held_out) if path]
    opened = [open_image_set(path, size, read=read) for path in given]
    samples, training, held_out = opened if options.held_out else (*opened, open_held_out_set(options.training, size))
    check_used(read, [one.identity for one in opened])
    nearest_images.check_apart(samples, training, held_out)

    # What lies close, and what that means.
    network = load_extractor(options.extractor, state.device, options.weights, options.weights_sha256)
    result, pairs = nearest_images.find_copies(samples, training, held_out, network)
    if not state.is_main_process:
        return
    sets = {"samples": samples, "training": training, "held_out": held_out}
    card = {name: one.identity | {"count": one.count} for name, one in sets.items()} | result
    card |= {"extractor": network.identity, "licences": network.licences, "picture": picture.name}
    card |= {"options": options.model_dump(mode="json"), "processes": state.num_processes}
    nearest_images.save_closest(picture, card, pairs)
    write_json(options.output, card | {"versions": versions(), "commit": commit()})
    for name, one in result["distances"].items():
        shown = ", ".join(f"{quantile} {value:.4g}" for quantile, value in one.items())
        print(f"{name}: {shown} (distance to nearest)")
    nearer = f"{result['nearer_to_training']} of {samples.count} samples are nearer to a training image"
    print(f"{nearer}, by chance {result['by_chance']:.1f}; {result['identical']} are one, pixel by pixel")
    print(f"This proves neither copies nor their absence: look at the closest pairs in {picture}")
