"""Reports on models, plans and outputs: text, page, model card, picture, notebook card, start command."""
