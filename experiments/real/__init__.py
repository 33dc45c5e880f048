"""Measurements on small real models, which are fetched and not committed."""
