"""Model cards: YAML front matter and Markdown for the Hugging Face Hub."""
