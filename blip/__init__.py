"""BLIP captioning, visual question answering and image-text matching behind one predictor."""
