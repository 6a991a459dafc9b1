"""The model: tensor roles, hyperparameters, memory, tokenizer, and the forward and backward pass."""
