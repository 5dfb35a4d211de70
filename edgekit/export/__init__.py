"""From model folders to bundles."""
