"""The conversions: one artefact in, one out."""
