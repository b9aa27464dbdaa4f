"""From other tools' bits to codes, statistics and floats."""
