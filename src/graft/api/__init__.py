"""One function per command, joining the layers below; imports everything but demo and cli."""
