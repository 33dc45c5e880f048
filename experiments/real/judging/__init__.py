"""The phrase judge against a reader: 60 answers each of two chat models, as they come and patched."""
