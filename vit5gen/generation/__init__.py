"""From labels to images: the pipeline, many images at once, what they are written to, and their cards."""
