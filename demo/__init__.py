"""The demo bundle: drawn scenes, what can be said about them, and small models trained on both."""
