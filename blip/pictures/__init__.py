"""An image file becomes the pixels that a model takes, in processes that do nothing else."""
