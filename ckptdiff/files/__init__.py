"""Make files and folders that take their name when they are complete."""
