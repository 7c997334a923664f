"""What `python -m blip COMMAND` runs: a module for each command, with a `main` that returns the exit status."""
