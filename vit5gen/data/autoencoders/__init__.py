"""The autoencoders between images and latents, one file each; loaded by name, whatever their kind."""

from vit5gen.data.autoencoders.kl import AUTOENCODERS, load_autoencoder, missing
