"""How a frozen weight is stored and multiplied; imports graft.kernels and what is below it."""
