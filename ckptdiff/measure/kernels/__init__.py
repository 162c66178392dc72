"""The compiled loops of the processor that measure."""
