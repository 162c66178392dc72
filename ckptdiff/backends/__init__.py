"""What measures: the backends, the record they return, and the formats they know."""
