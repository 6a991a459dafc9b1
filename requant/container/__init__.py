"""The file level: GGUF as bytes."""
