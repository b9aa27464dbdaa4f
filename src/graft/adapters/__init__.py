"""What is trained beside a frozen weight, and its merge; imports graft.formats and below."""
