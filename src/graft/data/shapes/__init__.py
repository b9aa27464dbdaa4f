"""The shapes of rows: which keys a row has, what of it is trained, and what asks for an answer."""
