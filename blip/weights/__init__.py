"""The weights bundle: downloaded, read, verified, written and loaded."""
