"""Many pictures at once: found in folders, asked about here or of servers, and written beside them or in a table."""
