"""One run: planned, fitted into memory, and spread over threads."""
