"""A GGUF file and a Modelfile, for Ollama."""
