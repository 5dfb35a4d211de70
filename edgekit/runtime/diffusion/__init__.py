"""Few-step generation: recipe, table, kernel, guidance, pipeline."""
