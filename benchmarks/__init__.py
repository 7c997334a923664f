"""What is measured, and how: run by scripts/bench."""
