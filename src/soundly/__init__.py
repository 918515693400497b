"""soundly: guarantees about neural networks."""
