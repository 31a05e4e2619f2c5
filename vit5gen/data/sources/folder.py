"""A folder with one folder of images for each class."""

import re
from functools import partial
from pathlib import Path

import torch

from vit5gen.config import DataConfig
from vit5gen.data.images import ImageSet, Source, read_image, register_source
from vit5gen.data.pictures import content_digest, content_hashes, find_classes, folder_names, listing_digest
from vit5gen.system.errors import UserError, listed

# Names of folders that are taken for splits without being named in a configuration.
TRAINING = ("train", "training")
HELD_OUT = ("test", "testing", "val", "valid", "validation", "dev", "eval", "held_out", "holdout")
_SPLITS = (*TRAINING, *HELD_OUT)


@register_source("folder")
class FolderSource(Source):
    """Files of images; the folders of classes may lie below folders of splits. ImageNet's ids get English names."""

    def open(self, split: str) -> ImageSet:
        data, root = self.data, self.folder(split)
        found, instead = find_classes(root, data.rules)
        if not found:
            advice = f"move the images of each class into a folder of its own, e.g. {root / 'cats'}"
            raise UserError(f"data.path {root}: no class folders; {advice}")
        names = list(found)
        # Anything close to ImageNet's thousand ids is meant to be ImageNet; ten of them are a set of one's own.
        if sum(bool(re.fullmatch(r"n\d{8}", name)) for name in found) >= 900:
            names = imagenet_names(list(found))
            instead = {name: instead[wnid] for name, wnid in zip(names, found, strict=True) if wnid in instead}
        files = [file for of_class in found.values() for file in of_class]
        labels = torch.repeat_interleave(torch.tensor([len(of_class) for of_class in found.values()]))
        read, digest = partial(_read_file, files, data), listing_digest if data.rules == 1 else content_digest
        hashes = partial(content_hashes, root, files)
        return ImageSet(names, labels, read, partial(digest, root, files), partial(_file_name, files), instead, hashes)

    def folder(self, split: str) -> Path:
        """Return the folder of a split, or the data set's where its folders are the classes of its only split.

        A folder with the name of a split is one when all folders next to it are, else a class; under a name of the
        user's own it is one in any case. Raises `UserError` where the split is absent, or contains folders as splits do
        while the folders next to it are not splits.
        """
        root, data = self.need_folder(), self.data
        inside, asked = root / split, data.rules == 1 or split not in _SPLITS
        folders, _ = folder_names(root)
        others = [name for name in folders if name.lower() not in _SPLITS and name not in (data.split, split)]
        if inside.is_dir() and (asked or not others):
            return inside
        if split in folders:
            classes, images_beside = folder_names(inside)
            if classes and not images_beside:
                found = f"{split!r} contains folders as a split does, next to folders that are not splits"
                advice = "move these away, or move the classes out of the splits"
                raise UserError(f"data.path {root}: {found}: {listed(others)}; {advice}")
        # Images of the whole folder are no second split.
        if split != data.split or (not asked and folders and not others):
            found = f"no folder {split!r} (it has {listed(folders) or 'none'})"
            raise UserError(f"data.path {root}: {found}; expected the images of that split there: add them")
        return root

    def missing(self) -> dict[str, str]:
        return self.missing_folder("a folder with one folder of images per class, optionally inside train/ and val/")


def imagenet_names(wnids: list[str]) -> list[str]:
    """Return the English names of ImageNet-1k's 1000 sorted WordNet ids; any other list is a `UserError`."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    known = info.label_names()
    if wnids != known:
        missing, extra = sorted(set(known) - set(wnids)), sorted(set(wnids) - set(known))
        found = f"{len(missing)} missing {missing[:3]}, {len(extra)} extra {extra[:3]}"
        advice = "complete the folders, or rename them if the data set is your own"
        raise UserError(f"data.path: not the 1000 classes of ImageNet-1k: {found}; {advice}")
    names = [info.index_to_description(index).split(",")[0] for index in range(len(known))]
    # Two names stand for two classes each (crane, maillot): the later one gets its number, so that names identify.
    return [name if names.index(name) == index else f"{name} ({index})" for index, name in enumerate(names)]


def _file_name(files: list[Path], index: int) -> str:
    return f"image {files[index]}"


def _read_file(files: list[Path], data: DataConfig, index: int) -> torch.Tensor:
    return read_image(files[index], data, _file_name(files, index))
