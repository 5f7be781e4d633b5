"""What an artefact must pass before it is written: parity with its parents, and scores of held-out slices."""
