"""The Python API: one function per command, and the Model that a caller opens."""
