"""Ready-made workers, each small enough to be copied as a start."""
