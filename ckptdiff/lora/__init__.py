"""Write an update as a low-rank adapter: found by the randomized spectra, in files that PEFT reads (needs SciPy)."""

from ckptdiff.lora.extract import Extracted, Extraction, extract_lora

__all__ = ["Extracted", "Extraction", "extract_lora"]
