"""Testing verifiers, ours first: planted counterexamples, fuzzing by random graphs, seeded faults.

What another verifier is shown here are files and nothing else; what soundly is shown here are its own parts, each with
an independent reference.
"""
