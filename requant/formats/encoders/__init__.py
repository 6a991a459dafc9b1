"""The searches of the encoders: scales, codes and codewords of least error, shared by several types."""
