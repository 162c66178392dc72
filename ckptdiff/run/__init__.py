"""Do one run: planned, fitted into memory, and spread over threads."""
