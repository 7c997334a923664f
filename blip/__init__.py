"""BLIP captioning, visual question answering and image-text matching behind one predictor."""

__version__ = "1.0.0"
