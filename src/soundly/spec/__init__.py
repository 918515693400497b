"""What is claimed: sets of inputs, claims about a network over them, and specification files."""
