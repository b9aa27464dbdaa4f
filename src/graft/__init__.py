"""graft fine-tunes a language model and ships exactly the weights that it trained."""
