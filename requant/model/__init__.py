"""The model level: what names and keys mean."""
