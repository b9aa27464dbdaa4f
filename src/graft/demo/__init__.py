"""The bundled model and data, trained and exported in one go; imports graft.api and below."""
