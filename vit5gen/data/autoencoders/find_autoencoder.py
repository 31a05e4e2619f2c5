"""Autoencoders by name: one that ships, a folder, or a name on the hub; its class stands in its config.json."""

import inspect
from contextlib import suppress
from pathlib import Path

from diffusers import ModelMixin
from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from vit5gen.config import Config
from vit5gen.data.autoencoders.codec import find_codec, normalization_of
from vit5gen.system.errors import UserError
from vit5gen.system.files import read_json
from vit5gen.system.shipped import shipped, shipped_names

# Folders of autoencoders that have a name; beside them, those of generators that ship.
EMOJI, PIXELS = Path(__file__).parents[1] / "emoji_vae", "pixels"
_NAMED = {"emoji": EMOJI, PIXELS: Path(__file__).parents[1] / PIXELS}
_PARTS = ("", "vae")  # where a folder has an autoencoder: by itself, or as a part of a pipeline
_CONFIG = "config.json"
_ON_HUB = [f"{part}/{_CONFIG}".lstrip("/") for part in _PARTS]


def load_autoencoder(name: str) -> ModelMixin:
    """Load a frozen fp32 autoencoder: a folder, one that ships, or a name on the Hugging Face hub.

    ``"emoji"`` (32 px) ships, and under the name of each `vit5gen.shipped` generator its autoencoder; ``"pixels"`` is
    none. A folder or name may be that of a pipeline. Raises `UserError` when there is no such autoencoder, or it cannot
    be fetched.
    """
    try:
        file, here = _find_config(name), not missing(name)
        class_name = str(read_json(file, "autoencoder").get("_class_name"))
        place = {} if _folder(name).is_dir() or file.parent.name not in _PARTS else {"subfolder": file.parent.name}
        source = file.parent if _folder(name).is_dir() else name
        network = find_codec(class_name).network(class_name)
        vae, found = network.from_pretrained(source, output_loading_info=True, local_files_only=here, **place)
        if lacking := found["missing_keys"]:  # diffusers would draw them at random
            raise ValueError(f"it lacks {len(lacking)} weights of an {class_name}")
    except Exception as error:  # file, hub and http errors are those of many libraries
        raise _cannot_load(name, error) from error
    vae.register_to_config(_name_or_path=name)  # as it was asked for: pipelines tell it, not this machine's folder
    normalization_of(vae)  # raises where it is none that `encode` and `decode` know
    return vae.float().eval().requires_grad_(False)


def find_sizes(config: Config, fetch: bool = True) -> Config:
    """Return the configuration with the sizes of latents that it does not state, from the autoencoder's config.json.

    fetch: from the hub, where it is not here. What cannot be read is left out: `load_autoencoder` will say why.
    """
    section = config.vae
    stated = section.model_dump(include={"latent_channels", "downsample"}, exclude_none=True)
    if len(stated) == 2 or (missing(section.name) and not fetch):
        return config
    try:
        values = read_json(_find_config(section.name), "autoencoder")
        codec = find_codec(name := str(values.get("_class_name")))
        parameters = inspect.signature(codec.network(name).__init__).parameters.items()
        channels, downsample, _ = codec.sizes({key: one.default for key, one in parameters} | values)
    except Exception:  # as above, and values of other types
        return config
    found = {"latent_channels": channels, "downsample": downsample}
    return config.model_copy(update={"vae": section.model_copy(update=found | stated)})


def shipped_autoencoders() -> list[str]:
    """Return the names of the autoencoders that ship, those of generators among them."""
    return [*_NAMED, *shipped_names()]


def _cannot_load(name: str, error: Exception) -> UserError:
    detail = " ".join(str(error).split())[:160]
    wanted = "the folder of one (config.json, safetensors), one that ships ({}), or a hub name and a network"
    ships = wanted.format(", ".join(shipped_autoencoders()))
    return UserError(f"vae.name {name!r}: no autoencoder can be loaded ({detail}); expected {ships}")


def _folder(name: str) -> Path:
    """Return the folder of an autoencoder that ships, else the path of that name."""
    if name in _NAMED:
        return _NAMED[name]
    folder = Path(name).expanduser()
    return Path(shipped(name)) if name in shipped_names() and not folder.exists() else folder


def missing(name: str) -> dict[str, str]:
    """Return an autoencoder that is neither a folder here nor fetched yet, with how to get it."""
    if _folder(name).is_dir() or _find_fetched(name):
        return {}
    fetched = "autoencoder on the Hugging Face hub: will be downloaded on first use"
    return {name: f"{fetched}; or set a folder, e.g. one made by `vit5gen autoencoder`"}


def _find_config(name: str) -> Path:
    """Return the config.json of an autoencoder, which is fetched where it is not here; that of a folder may be absent.

    Raises what the hub's client raises.
    """
    if (folder := _folder(name)).is_dir():
        files = [folder / part / _CONFIG for part in _PARTS]
        return next((file for file in files if file.is_file()), files[0])
    if (fetched := _find_fetched(name)) is not None:
        return fetched
    # Without a network this says so; the download would retry for long.
    there = {file.rfilename for file in model_info(name, timeout=10).siblings or []}
    path = next((path for path in _ON_HUB if path in there), _CONFIG)
    return Path(hf_hub_download(name, path))


def _find_fetched(name: str) -> Path | None:
    """Return the config.json of an autoencoder of the hub, if it was fetched before."""
    with suppress(HFValidationError):  # of what is no name on the hub either
        for path in _ON_HUB:
            if isinstance(file := try_to_load_from_cache(name, path), str):
                return Path(file)
    return None
