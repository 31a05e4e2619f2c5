"""The autoencoders between images and latents, one file each."""
