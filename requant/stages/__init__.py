"""The stages between a model and what is made of it: one room for the command line and the Python API."""
