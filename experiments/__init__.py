"""Programs around the method: python -m experiments.NAME, from the root, which imports none."""
