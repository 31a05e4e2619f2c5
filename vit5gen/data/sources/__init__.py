"""The kinds of data sets that come with the package, one file each; importing them registers them."""

from vit5gen.data.sources import emoji, fashion_mnist, folder, huggingface
